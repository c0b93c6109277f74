"""`pixlat import` and `pixlat export`: from a file laid out like a released one to a run folder that samples
and is evaluated, and out again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import rae_models
import torch
from evaluated_run import MODEL, Projections, image_folder, run_folder
from safetensors.torch import load_file
from torch import Tensor

from pixlat.common.config.resolve import load_presets, resolve
from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of
from pixlat.common.training.state import state_without_external
from pixlat.evaluation import run
from pixlat.evaluation.records.record import read_record
from pixlat.evaluation.score.generate import generate
from pixlat.evaluation.score.models import load_run
from pixlat.launch import prepare
from pixlat.launch.released import fitting_preset, importable
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo, Method, Released
from pixlat.methods.jit.reference import released_name, released_shape
from pixlat.methods.pmf.reference import V_HEAD, to_released
from pixlat.methods.rae.reference import decoder_to_released, network_to_released

CPU = torch.device("cpu")
SMALL = {"depth": 2, "width": 16, "heads": 2, "patch": 2}


def built(name: str, info: DataInfo, **model: object) -> Method:
    """A method with every weight drawn, for a file."""
    torch.manual_seed(5)
    method = get_class(name)(get_spec(name).config(**model), info)
    for key, p in method.named_parameters():
        if p.requires_grad and not key.endswith("pos_embed"):
            torch.nn.init.normal_(p, std=0.1)
    return method.eval()


def jit_state(method: Method) -> dict[str, Tensor]:
    return {
        released_name(name): tensor.reshape(released_shape(name, tensor.shape))
        for name, tensor in method.state_dict().items()
    }


@pytest.fixture(scope="module")
def jit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Method]:
    """A training checkpoint with three sets of weights and the settings, as released;
    and the method of the first average.
    """
    method = built("jit", DataInfo("imagenet", 3, 8, 1), **{**MODEL, "context_tokens": 2})
    state = jit_state(method)
    file = tmp_path_factory.mktemp("released") / "checkpoint-last.pth"
    averages = {
        name: {
            key: factor * tensor if tensor.is_floating_point() and "pos_embed" not in key else tensor
            for key, tensor in state.items()
        }
        for name, factor in (("model", 3.0), ("model_ema1", 1.0), ("model_ema2", 2.0))
    }
    torch.save(
        {
            **averages,
            "optimizer": {},
            "epoch": 599,
            "args": argparse.Namespace(model="JiT-B/16", ema_decay1=0.9998, ema_decay2=0.999),
        },
        file,
    )
    return file, method


JIT_KEYS = ("preset=imagenet256-b", "model.context_start=0", "sample.steps=2")


def imported(*arguments: str) -> int:
    return prepare.main(["import", *arguments])


def assert_same_images(folder: Path, method: Method, overrides: dict[str, str] | None = None) -> None:
    """The run folder's model makes the images of the method behind the file."""
    model = load_run(folder, overrides or {}, None, CPU)
    labels = torch.arange(3)
    (ours, _), (theirs, _) = (
        next(iter(generate(m, model.run.sample, labels.numpy(), 0, 3, "cpu"))) for m in (model.method, method)
    )
    assert torch.equal(ours, theirs) and ours.float().std() > 1


# -- JiT, whole way ----------------------------------------------------------------------------------------------------


def test_a_released_file_becomes_a_run_that_samples_is_evaluated_and_says_where_it_is_from(
    jit, tmp_path, monkeypatch, capsys
):
    file, method = jit
    monkeypatch.setattr("pixlat.evaluation.judges.panel.EmbeddedExtractor", Projections)
    data = image_folder(tmp_path / "data")
    assert imported("method=jit", f"file={file}", "name=jit-b", f"out={tmp_path}", *JIT_KEYS) == 0, (
        capsys.readouterr().err
    )
    origin = json.loads((tmp_path / "jit-b" / "imported.json").read_text())
    assert (
        origin["sha256"] == sha256_of(file)
        and origin["licence"] == "MIT"
        and origin["weights"] == "model_ema1"
        and origin["ema_decay"] == 0.9998
    )
    assert "not verified" in origin["licence_source"]
    assert (
        origin["tensors"] == len(jit_state(method))
        and origin["architecture"]["width"] == 16
        and origin["architecture"]["num_classes"] == 3
    )
    told = capsys.readouterr().out
    assert "depth=1" in told and "every one accounted for" in told and origin["sha256"] in told
    assert_same_images(tmp_path / "jit-b", method)
    run.work([f"run={tmp_path}/jit-b", f"data.path={data}", "num_images=24", "device=cpu"])
    (record,) = [read_record(path) for path in (tmp_path / "jit-b").rglob("evaluations/*/result.json")]
    assert record["checkpoint"] == {
        "sha256": sha256_of(file),
        "step": None,
        "ema_decay": 0.9998,
        "ema_kind": "model_ema1",
    }
    assert (
        record["kind"] == "evaluated" and record["metrics"]["fd"]["value"] > 0 and record["system"]["method"] == "jit"
    )


def test_another_set_of_weights_and_another_licence_are_kept(jit, tmp_path):
    file, _ = jit
    assert (
        imported(
            "method=jit",
            f"file={file}",
            "name=second",
            f"out={tmp_path}",
            "weights=model_ema2",
            "licence=mine",
            *JIT_KEYS,
        )
        == 0
    )
    origin = json.loads((tmp_path / "second" / "imported.json").read_text())
    assert (origin["weights"], origin["ema_decay"], origin["licence"]) == ("model_ema2", 0.999, "mine")
    assert origin["licence_source"] == "given"
    first, second = (
        load_run(tmp_path / "second", {}, None, CPU).method,
        torch.load(file, weights_only=False)["model_ema2"],
    )
    assert torch.equal(first.state_dict()["network.final.linear.bias"], second["net.final_layer.linear.bias"])


def damaged(tmp_path: Path, file: Path, change) -> Path:
    content = torch.load(file, weights_only=False)
    change(content["model_ema1"])
    torch.save(content, tmp_path / "damaged.pth")
    return tmp_path / "damaged.pth"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda state: state.pop("net.blocks.0.mlp.w3.bias"), "missing net.blocks.0.mlp.w3.bias"),
        (lambda state: state.update({"net.extra": torch.zeros(3)}), "not known net.extra"),
        (lambda state: state.update({"net.pos_embed": state["net.pos_embed"].flip(1)}), "another layout"),
    ],
)
def test_every_key_must_be_accounted_for_and_nothing_is_left_behind(jit, tmp_path, capsys, change, fault):
    file = damaged(tmp_path, jit[0], change)
    assert imported("method=jit", f"file={file}", "name=x", f"out={tmp_path}/runs", *JIT_KEYS) == 2
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_mistakes_are_explained(jit, tmp_path, capsys):
    file, _ = jit
    for arguments, message in [
        ((f"file={file}",), "method= is missing"),
        (("method=jit",), "file= is missing"),
        (("method=jit", f"file={tmp_path}/none.pth"), "no such file"),
        (("method=vae", f"file={file}"), "opens no released files"),
        (("method=jit", f"file={file}", "weights=ema"), "is not in a JiT checkpoint"),
        (("method=jit", f"file={file}"), "no preset of method=jit has depth=1, width=16"),
        (("method=jit", f"file={file}", *JIT_KEYS, "model.heads=4"), "keys differ"),
        (("method=sit", f"file={file}"), "not the state dict of a released"),
    ]:
        assert imported(*arguments, f"out={tmp_path}/runs") == 2
        assert message in capsys.readouterr().err, message
    run_folder(tmp_path / "taken", image_folder(tmp_path / "data"))
    assert imported("method=jit", f"file={file}", "name=taken", f"out={tmp_path}", *JIT_KEYS) == 2
    assert "is a run folder already" in capsys.readouterr().err


# -- the other methods -------------------------------------------------------------------------------------------------


def test_a_released_pmf(tmp_path):
    info = DataInfo("imagenet", 3, 16, 1)
    method = built("pmf", info, **{**SMALL, "head_depth": 1, "patch": 4, "bottleneck": 8})
    torch.save(
        {name: tensor for name, tensor in to_released(method).items() if not name.startswith(V_HEAD)},
        tmp_path / "pMF-B-16.pt",
    )
    tokens = "imagenet256-b-mse"  # a preset without perceptual networks, which sampling does not need
    assert imported("method=pmf", f"file={tmp_path}/pMF-B-16.pt", f"out={tmp_path}", f"preset={tokens}") == 0
    assert_same_images(tmp_path / "pMF-B-16", method)
    assert json.loads((tmp_path / "pMF-B-16" / "imported.json").read_text())["architecture"]["mlp_hidden"] is None


@pytest.mark.parametrize("name", ["sit", "repa", "reg", "dit"])
def test_released_latent_transformers(name, tmp_path):
    """With the packaged autoencoder and teacher in the place of the released models' own."""
    info = DataInfo("emoji32", 10, 32, 1)
    align = {"teacher": "embedded", "align_after": 1, "projector_width": 24} if name in ("repa", "reg") else {}
    align |= {"class_token": "mean"} if name == "reg" else {}
    method = built(name, info, **SMALL, **align)
    method.load_external()
    state = {key.removeprefix("network."): tensor for key, tensor in state_without_external(method).items()}
    torch.save(
        {"ema": state, "model": {key: tensor + 1 for key, tensor in state.items()}, "opt": {}}, tmp_path / "last.pt"
    )
    ours = ["model.tokenizer=embedded", "model.heads=2", "data.image_size=32", "sample.steps=2"]
    ours += [f"model.{key}={value}" for key, value in align.items() if key != "projector_width"]
    ours += ["sample.interval=[0,1]"] if name != "dit" else []
    assert (
        imported(
            f"method={name}",
            f"file={tmp_path}/last.pt",
            f"name={name}",
            f"out={tmp_path}",
            "preset=imagenet256-xl",
            *ours,
        )
        == 0
    )
    assert_same_images(tmp_path / name, method)
    origin = json.loads((tmp_path / name / "imported.json").read_text())
    assert origin["licence"] == ("CC BY-NC 4.0" if name == "dit" else "MIT") and origin["ema_decay"] == 0.9999


def test_a_released_dit_dh_with_its_decoder(tmp_path, monkeypatch):
    rae_models.use_toys(monkeypatch)
    method = rae_models.stage2(load=False, decoder="", head_width=24)
    for p in (*method.network.parameters(), *method.decoder.parameters()):
        torch.nn.init.normal_(p, std=0.1)
    positions = rae_models.stage1().decoder.state_dict()["positions"]
    method.decoder.load_state_dict(method.decoder.state_dict() | {"positions": positions})
    torch.save(decoder_to_released(method.decoder.state_dict()), tmp_path / "decoder.pt")
    fresh = rae_models.stage2(load=False).network.state_dict()["pos_embed"]
    state = method.network.state_dict() | {"pos_embed": fresh}
    method.network.load_state_dict(state)
    torch.save(network_to_released(state, method.config.shape), tmp_path / "stage2_model.pt")
    keys = (
        "model.encoder=toy",
        f"model.decoder={tmp_path}/decoder.pt",
        "model.decoder_size=demo",
        "model.statistics=exact",
        "data.image_size=8",
    )
    assert (
        imported(
            "method=rae",
            f"file={tmp_path}/stage2_model.pt",
            f"out={tmp_path}",
            "preset=imagenet256-dh-xl",
            "sample.steps=2",
            *keys,
        )
        == 0
    )
    assert_same_images(tmp_path / "stage2_model", method.eval())


def test_a_rae_whose_head_is_as_wide_as_its_backbone_is_asked_about(monkeypatch, tmp_path, capsys):
    """Its two stacks lie in one list of blocks: nothing in the file says where the head begins."""
    rae_models.use_toys(monkeypatch)
    method = rae_models.stage2(load=False, width=16, depth=2, heads=2, head_width=16, head_depth=1, head_heads=4)
    for p in method.network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = method.network.state_dict() | {"pos_embed": rae_models.stage2(load=False).network.state_dict()["pos_embed"]}
    torch.save(network_to_released(state, method.config.shape), tmp_path / "equal.pt")
    torch.save(decoder_to_released(rae_models.stage1().decoder.state_dict()), tmp_path / "decoder.pt")
    keys = (
        "model.encoder=toy",
        f"model.decoder={tmp_path}/decoder.pt",
        "model.decoder_size=demo",
        "model.statistics=exact",
        "data.image_size=8",
    )
    command = ("method=rae", f"file={tmp_path}/equal.pt", f"out={tmp_path}", "preset=imagenet256-dh-xl", *keys)
    assert imported(*command) == 2
    told = capsys.readouterr().err
    assert "both 16 wide" in told and "Add model.head_depth=" in told and "model.head_depth=2, model.depth=1" in told
    assert imported(*command, "model.head_depth=3") == 2 and not (tmp_path / "equal").exists()
    assert imported(*command, "model.head_depth=1") == 0
    origin = json.loads((tmp_path / "equal" / "imported.json").read_text())
    assert origin["architecture"]["depth"] == 2 and origin["architecture"]["head_depth"] == 1


def test_released_sizes_find_their_presets():
    """With the numbers that recognition reads from the published shapes (tests of each method's reference)."""
    cases = {
        "jit": (
            {"depth": 32, "width": 1280, "heads": 16, "patch": 16, "bottleneck": 256, "context_tokens": 32},
            256,
            "imagenet256-h",
        ),
        "pmf": (
            {
                "depth": 16,
                "head_depth": 8,
                "width": 768,
                "heads": 12,
                "mlp_hidden": None,
                "patch": 32,
                "bottleneck": 128,
            },
            512,
            "imagenet512-b",
        ),
        "rae": (
            {"width": 1152, "depth": 28, "heads": 16, "head_width": 2048, "head_depth": 2, "head_heads": 16},
            256,
            "imagenet256-dh-xl",
        ),
        "sit": ({"depth": 28, "width": 1152, "heads": 16, "patch": 2, "qk_norm": False}, 256, "imagenet256-xl"),
        "repa": (
            {"depth": 28, "width": 1152, "heads": 16, "patch": 2, "qk_norm": False, "projector_width": 2048},
            256,
            "imagenet256-xl",
        ),
        "reg": (
            {"depth": 28, "width": 1152, "heads": 16, "patch": 2, "qk_norm": False, "projector_width": 2048},
            256,
            "imagenet256-xl",
        ),
        "dit": ({"depth": 28, "width": 1152, "heads": 16, "patch": 2, "qk_norm": False}, 512, "imagenet512-xl"),
    }
    assert set(cases) == set(importable())
    for name, (model, size, preset) in cases.items():
        assert fitting_preset(get_spec(name), Released({}, model, 1000, size, "ema", None, "MIT")) == preset, name


# -- export ------------------------------------------------------------------------------------------------------------


def test_an_exported_run_says_what_it_is_and_comes_back(tmp_path, capsys):
    run_folder(tmp_path / "mine", image_folder(tmp_path / "data"))
    assert prepare.main(["export", f"from={tmp_path}/mine", f"to={tmp_path}/out", "licence=Apache-2.0"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.yaml",
        "model.safetensors",
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    method = load_run(tmp_path / "mine", {}, None, CPU).method
    for text in (
        "license: apache-2.0",
        "# mine",
        "arXiv 2511.13720",
        sha256_of(tmp_path / "out" / "model.safetensors"),
        "Weights: 0.9",
        "448 images shown",
    ):
        assert text in card, text
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in state_without_external(method).items())
    assert imported("method=jit", f"file={tmp_path}/out", "name=back", f"out={tmp_path}") == 0, capsys.readouterr().err
    assert_same_images(tmp_path / "back", method)
    assert prepare.main(["export", f"from={tmp_path}/mine", f"to={tmp_path}/out"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert prepare.main(["export", f"from={tmp_path}/data", f"to={tmp_path}/other"]) == 2


def test_a_card_of_an_imported_run_names_the_released_file(jit, tmp_path):
    file, _ = jit
    assert imported("method=jit", f"file={file}", "name=official", f"out={tmp_path}", *JIT_KEYS) == 0
    assert prepare.main(["export", f"from={tmp_path}/official", f"to={tmp_path}/out"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        sha256_of(file) in card
        and "license: mit" in card
        and "Published for this preset: FID 3.66" in card
        and "Not evaluated" in card
    )


def test_every_preset_that_is_expected_to_reach_a_score_says_so_on_its_card():
    from pixlat.launch.export import expected

    spec = get_spec("jit")
    for name, preset in load_presets(spec.presets).items():
        assert bool(expected(spec, name)) == ("expected" in preset)
    with pytest.raises(UserError):
        resolve(spec, {"preset": "none"})
