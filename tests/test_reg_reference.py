"""Released checkpoints of SiT, REPA, REG and DiT under our names, strictly; and the presets of the published rows."""

import argparse

import pytest
import torch
from reg_models import INFO, batch, make, randomized

from pixlat.common.config.resolve import load_presets, resolve
from pixlat.common.errors import UserError
from pixlat.common.training.state import load_state_without_external, state_without_external
from pixlat.common.weights.tensors import read_tensors
from pixlat.methods import get_spec
from pixlat.methods.reg.network import LatentTransformer, Shape

METHODS = ("dit", "sit", "repa", "reg")


def released(method) -> dict[str, torch.Tensor]:
    """A state dict as the authors would save this method's networks."""
    torch.manual_seed(7)
    names = {name.removeprefix("network."): tensor for name, tensor in state_without_external(method).items()}
    return {name: tensor if name == "pos_embed" else torch.randn_like(tensor) for name, tensor in names.items()}


def outputs(method, state):
    load_state_without_external(method, method.from_reference(state))
    z, token = torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8), torch.linspace(-1, 1, 12).view(2, 6)
    with torch.no_grad():
        return method.network(
            z, torch.tensor([0.2, 0.7]), torch.tensor([0, 3]), token if method.network.shape.class_token else None
        ).image


@pytest.mark.parametrize("name", METHODS)
def test_released_names_load_and_come_back(monkeypatch, name):
    method = make(name, monkeypatch)
    state = released(method)
    load_state_without_external(method, method.from_reference(state))
    for key, tensor in state_without_external(method).items():
        assert torch.equal(tensor, state[key.removeprefix("network.")]), key
    assert {key.partition(".")[0] for key in method.from_reference(state)} <= {"network", "projectors"}


def test_sit_head_is_cut_to_the_trained_channels(monkeypatch):
    """The first half of the channels of a network with twice as many is, bit for bit, the network with the cut head."""
    method = make("sit", monkeypatch).eval()
    torch.manual_seed(0)
    wide = randomized(LatentTransformer(Shape(3, 24, 2, 2, 8, 4, 8, 3)))
    cut = outputs(method, wide.state_dict())
    z = torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8)
    with torch.no_grad():
        whole = wide(z, torch.tensor([0.2, 0.7]), torch.tensor([0, 3])).image
    torch.testing.assert_close(cut, whole[:, :4], atol=1e-6, rtol=1e-6)  # another matrix shape may round otherwise
    assert (whole[:, 4:] - whole[:, :4]).abs().max() > 0.1


def test_dit_keeps_its_variance(monkeypatch):
    method = make("dit", monkeypatch)
    assert outputs(method, released(method)).shape == (2, 8, 8, 8)


def test_old_names_of_repa(monkeypatch):
    """`decoder_blocks.k` is the block after the aligned one."""
    method = make("repa", monkeypatch, depth=4, align_after=2)
    state = released(method)
    old = {
        name.replace("blocks.2.", "decoder_blocks.0.").replace("blocks.3.", "decoder_blocks.1."): tensor
        for name, tensor in state.items()
    }
    assert old.keys() != state.keys()
    loaded = method.from_reference(old)
    assert all(torch.equal(loaded[f"network.{name}"], state[name]) for name in state if name.startswith("blocks."))


def test_training_checkpoint_of_reg(monkeypatch, tmp_path):
    """A dictionary with "ema" and an argparse.Namespace beside it."""
    method = make("reg", monkeypatch)
    ema = released(method)
    content = {
        "model": {name: tensor + 1 for name, tensor in ema.items()},
        "ema": ema,
        "opt": {},
        "args": argparse.Namespace(cls=0.03),
        "steps": 4_000_000,
    }
    torch.save(content, tmp_path / "4000000.pt")
    state = read_tensors(tmp_path / "4000000.pt")
    loaded = method.from_reference(state)
    assert torch.equal(loaded["network.wg_norm.weight"], ema["wg_norm.weight"])


def test_every_fault_is_listed(monkeypatch):
    method = make("reg", monkeypatch)
    state = released(method)
    del state["wg_norm.bias"], state["blocks.1.attn.qkv.weight"]
    state["projectors.1.0.weight"] = torch.zeros(2)
    state["cls_projectors2.weight"] = torch.zeros(24, 5)
    with pytest.raises(UserError) as error:
        method.from_reference(state)
    text = str(error.value)
    assert "4 keys differ" in text
    for fault in (
        "missing wg_norm.bias (24,)",
        "missing blocks.1.attn.qkv.weight (72, 24)",
        "not known projectors.1.0.weight (2,)",
        "cls_projectors2.weight is (24, 5), expected (24, 6)",
    ):
        assert fault in text


def test_weights_of_another_method_are_refused(monkeypatch):
    repa = released(make("repa", monkeypatch))
    with pytest.raises(UserError, match=r"missing .*wg_norm"):
        make("reg", monkeypatch).from_reference(repa)
    with pytest.raises(UserError, match="not known projectors"):
        make("sit", monkeypatch).from_reference(repa)


@pytest.mark.parametrize("name", ["sit", "reg"])
def test_another_layout_of_tokens_is_refused(monkeypatch, name):
    method = make(name, monkeypatch)
    state = released(method)
    state["pos_embed"] = state["pos_embed"].flip(1)
    with pytest.raises(UserError, match="another layout"):
        method.from_reference(state)


def test_loaded_weights_leave_the_frozen_networks_alone(monkeypatch):
    method = make("repa", monkeypatch)
    before = method.teacher.mix.weight.clone()
    load_state_without_external(method, method.from_reference(released(method)))
    assert torch.equal(method.teacher.mix.weight, before)
    assert method("main", batch(), 0)["loss"].isfinite() and INFO.num_classes == 3


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_presets_resolve(name):
    spec = get_spec(name)
    for preset in load_presets(spec.presets):
        run = resolve(spec, {"method": name, "preset": preset})
        assert isinstance(run.model, spec.config) and isinstance(run.sample, spec.sample)


@pytest.mark.parametrize(
    ("name", "preset", "fid", "sample"),
    [
        (
            "reg",
            "imagenet256-xl",
            1.36,
            {"steps": 250, "guidance": 2.3, "class_guidance": 2.3, "interval": (0.0, 0.85), "solver": "sde"},
        ),
        (
            "repa",
            "imagenet256-xl",
            1.42,
            {"steps": 250, "guidance": 1.8, "interval": (0.0, 0.7), "guided_channels": None},
        ),
        ("sit", "imagenet256-xl", 2.06, {"steps": 250, "guidance": 1.5, "interval": (0.0, 1.0), "guided_channels": 3}),
        ("dit", "imagenet256-xl", 2.27, {"steps": 250, "guidance": 1.5, "guided_channels": 3}),
        ("reg", "imagenet256-b", 15.22, {"guidance": 1.0}),
        ("repa", "imagenet256-b", 24.4, {"guidance": 1.0}),
        ("sit", "imagenet256-b", 33.02, {"guidance": 1.0}),
        ("dit", "imagenet256-b", 43.5, {"guidance": 1.0}),
    ],
)
def test_published_rows(name, preset, fid, sample):
    spec = get_spec(name)
    run = resolve(spec, {"method": name, "preset": preset})
    assert load_presets(spec.presets)[preset]["expected"]["fid"] == fid
    assert {key: getattr(run.sample, key) for key in sample} == sample
    assert (
        run.train.batch == 256
        and run.train.lr == 1e-4
        and run.train.ema_decay == [0.9999]
        and run.train.betas == [0.9, 0.999]
    )
    assert run.train.clip_grad == (1.0 if name in ("repa", "reg") else 0.0) and run.data.flip == (
        name in ("sit", "dit")
    )


def test_alignment_depth_of_the_sizes():
    for name in ("repa", "reg"):
        depths = {
            size: resolve(get_spec(name), {"method": name, "preset": f"imagenet256-{size}"}).model.align_after
            for size in ("b", "l", "xl")
        }
        assert depths == {"b": 4, "l": 8, "xl": 8}


def test_demo_presets_differ_in_the_method_only():
    """The control group: one network, one optimizer, one sampler.

    Each trains for the same number of MACs, its teacher included, and hence for another number of images.
    """
    runs = {name: resolve(get_spec(name), {"method": name, "train.images": "1600"}) for name in ("sit", "repa", "reg")}
    for key in ("data", "train", "eval"):
        assert getattr(runs["sit"], key) == getattr(runs["repa"], key) == getattr(runs["reg"], key)
    shared = ("depth", "width", "heads", "patch", "tokenizer", "path", "time", "label_drop", "remember")
    assert len({tuple(getattr(run.model, key) for key in shared) for run in runs.values()}) == 1
    assert (
        len({(run.sample.steps, run.sample.solver, run.sample.guidance, run.sample.interval) for run in runs.values()})
        == 1
    )
