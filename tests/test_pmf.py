"""pMF's network, sampler, optimizer groups and settings against its paper's description, and against misuse."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from pmf_models import SMALL, TINY, make, mixed_draws, small, wave
from torch import nn

from pixlat.common.accounting.macs import on_meta
from pixlat.common.config.identity import run_folder
from pixlat.common.config.resolve import load_presets, resolve
from pixlat.common.config.schema import TrainConfig
from pixlat.common.errors import UserError
from pixlat.common.seeds import Noise, image_seeds
from pixlat.common.training.optim import build_optimizers
from pixlat.common.training.steps import split_batch
from pixlat.launch.job.execute import run_all
from pixlat.methods import get_spec
from pixlat.methods.base import DataInfo
from pixlat.methods.pmf.config import SPEC, PMFConfig, PMFSample
from pixlat.methods.pmf.method import PMFMethod
from pixlat.methods.pmf.network import Condition, last_samples, norm_tangent
from pixlat.methods.pmf.objective import draw_times

BATCH = {"image": torch.linspace(-1, 1, 6 * 192).reshape(6, 3, 8, 8), "label": torch.tensor([0, 1, 2, 0, 1, 2])}


def condition_of(count, **given):
    values = {"h": 0.5, "omega": 3.0, "t_min": 0.1, "t_max": 0.7, "labels": 1, **given}
    return Condition(**{name: torch.full((count,), value) for name, value in values.items()})


# -- the network -------------------------------------------------------------------------------------------------------


def test_untrained_predictions_are_zero():
    method = make(**TINY)
    assert torch.count_nonzero(method.network(wave(0.13, 2), condition_of(2))) == 0


def test_initialization():
    method = make(**TINY)
    network = method.network
    for stack in (network.blocks, network.head.blocks, method.v_head.blocks):
        block = stack[1]
        for linear in (
            block.attn.q,
            block.attn.k,
            block.attn.v,
            block.attn.out,
            block.mlp.w1,
            block.mlp.w2,
            block.mlp.w3,
        ):
            assert (
                linear.weight.std().item() == pytest.approx(0.32 / math.sqrt(linear.in_features), rel=0.03)
                and linear.bias is None
            )
        assert not block.gate1.any() and not block.gate2.any() and (block.norm1.weight == 1).all()
    for embed in (network.h_embed, network.omega_embed, network.t_min_embed, network.t_max_embed):
        for linear in (embed.mlp[0], embed.mlp[2]):
            assert (
                linear.weight.std().item() == pytest.approx(linear.in_features**-0.5, rel=0.03)
                and not linear.bias.any()
            )
    assert network.class_embed.weight.std().item() == pytest.approx(96**-0.5, rel=0.02)
    tables = torch.cat(
        [network.class_tokens, network.omega_tokens, network.t_min_tokens, network.t_max_tokens, network.h_tokens],
        dim=1,
    )
    assert tables.shape == (1, 20, 96) and tables.std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert network.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in (network.patch_embed.down, network.patch_embed.up):
        bound = math.sqrt(6 / sum(layer.weight.flatten(1).shape))  # fan_out is the channels alone, not times the kernel
        assert 0.95 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    for head in (network.head, method.v_head):
        assert not head.linear.weight.any() and not head.linear.bias.any()


def test_the_scale_enters_as_one_minus_its_inverse_and_the_rest_as_it_is():
    network = make(**TINY).network
    seen = {}
    for name in ("h_embed", "omega_embed", "t_min_embed", "t_max_embed"):
        getattr(network, name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].tolist()})
        )
    network.embed(wave(0.13, 1), condition_of(1, h=0.25, omega=4.0, t_min=0.125, t_max=0.75))
    assert seen == {"h_embed": [0.25], "omega_embed": [0.75], "t_min_embed": [0.125], "t_max_embed": [0.75]}


def test_order_of_the_prefix():
    """8 class, 4 guidance, 2 + 2 interval and 4 step-length tokens: each input moves its own tokens and no other."""
    network = make(**TINY).network
    z, base = wave(0.13, 1), condition_of(1)
    tokens = network.embed(z, base)
    assert tokens.shape == (1, 20 + 16, 96)
    places = {
        "labels": range(8),
        "omega": range(8, 12),
        "t_min": range(12, 14),
        "t_max": range(14, 16),
        "h": range(16, 20),
    }
    for name, place in places.items():
        moved = network.embed(z, base._replace(**{name: getattr(base, name) + 1})) != tokens
        assert [i for i in range(36) if moved[0, i].any()] == list(place), name
    moved = network.embed(z + 1, base) != tokens
    assert [i for i in range(36) if moved[0, i].any()] == list(range(20, 36))


def test_only_image_tokens_are_rotated():
    method = small()
    prefix = method.config.prefix
    block, rope = method.network.blocks[0], method.network.rope
    x = torch.randn(1, prefix + 4, 24)
    swapped = torch.cat((x[:, [1, 0]], x[:, 2:]), dim=1)
    output, other = block(x, rope)[0], block(swapped, rope)[0]
    torch.testing.assert_close(output[:, 2:], other[:, 2:], atol=1e-5, rtol=1e-5)
    images = torch.cat((x[:, :prefix], x[:, [prefix + 1, prefix]], x[:, prefix + 2 :]), dim=1)
    assert (block(images, rope)[0][:, :prefix] - output[:, :prefix]).abs().max() > 1e-3


def test_tangents_of_layers_match_differences():
    """For the last two of three samples, in float64."""
    method = small().double()
    block, rope = method.network.blocks[0], method.network.rope
    torch.manual_seed(1)
    x, step = torch.randn(2, 3, method.config.prefix + 4, 24, dtype=torch.float64)
    for layer in (
        lambda x, dx=None: block(x, rope, dx),
        lambda x, dx=None: method.network.head(x, rope, dx),
        block.mlp,
    ):
        value, tangent = layer(x, step[1:])
        quotient = (layer(x + 1e-6 * step)[0] - layer(x - 1e-6 * step)[0])[1:] / 2e-6
        torch.testing.assert_close(tangent, quotient, atol=1e-8, rtol=1e-7)
        assert torch.equal(value, layer(x)[0]) and value.requires_grad and not tangent.requires_grad
    quotient = (block.norm1(x + 1e-6 * step) - block.norm1(x - 1e-6 * step))[1:] / 2e-6
    torch.testing.assert_close(
        norm_tangent(block.norm1, last_samples(x, step[1:]), step[1:]), quotient, atol=1e-8, rtol=1e-7
    )


def test_separate_heads_share_nothing():
    method = small()
    tokens, _ = method.network.shared(method.network.embed(BATCH["image"], condition_of(6)))
    for head, other in ((method.network.head, method.v_head), (method.v_head, method.network.head)):
        gradients = torch.autograd.grad(
            head(tokens, method.network.rope)[0].sum(), list(other.parameters()), allow_unused=True, retain_graph=True
        )
        assert all(gradient is None for gradient in gradients)


# -- the sampler -------------------------------------------------------------------------------------------------------


def test_one_step_returns_the_networks_image():
    method = small(noise_scale=2.0).eval()
    labels, seeds = torch.tensor([0, 2]), image_seeds(0, [0, 1])
    images = method.sample(labels, Noise(seeds), PMFSample(guidance=5.0, interval=(0.2, 0.6)))
    z = 2.0 * Noise(seeds).normal(3, 8, 8)
    expected = method.network(z, Condition(*(torch.full((2,), value) for value in (1.0, 5.0, 0.2, 0.6)), labels))
    torch.testing.assert_close(images, expected, atol=2e-6, rtol=1e-5)
    assert images.abs().max() > 1.5  # not clamped


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_are_evaluations_and_the_v_head_is_not_among_them(steps):
    method = small().eval()
    del method.v_head
    seen = []
    method.network.register_forward_pre_hook(lambda module, args: seen.append(args[1].h[0].item()))
    config = PMFSample(steps=steps)
    images = method.sample(torch.tensor([1]), Noise([3]), config)
    assert len(seen) == steps == method.evaluations(config)
    assert seen == pytest.approx([1 / steps] * steps, abs=1e-6) and images.isfinite().all()


def test_steps_follow_the_average_velocity():
    """With a network that returns the same image at every time,
    every number of steps lands on it along a straight line.
    """
    method = small()
    target = torch.rand(1, 3, 8, 8)
    passed = []
    method.network.forward = lambda z, condition: (passed.append(z), target)[1]
    images = method.sample(torch.tensor([1]), Noise([3]), PMFSample(steps=4))
    torch.testing.assert_close(images, target, atol=1e-6, rtol=0)
    noise = Noise([3]).normal(3, 8, 8)
    for z, t in zip(passed, (1.0, 0.75, 0.5, 0.25), strict=True):
        torch.testing.assert_close(z, t * noise + (1 - t) * target, atol=1e-6, rtol=0)


def test_an_image_depends_on_its_own_seed_only():
    method = small().eval()
    labels, seeds, config = torch.tensor([0, 1, 2]), image_seeds(5, [0, 1, 2]), PMFSample(steps=3)
    together = method.sample(labels, Noise(seeds), config)
    alone = torch.cat([method.sample(labels[i : i + 1], Noise(seeds[i : i + 1]), config) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)


def test_the_leaderboard_is_told_of_guidance_and_of_the_evaluators_features():
    told = small().describe(PMFSample(guidance=3.0, interval=(0.0, 0.8)))
    assert (told.guidance, told.guidance_scale, told.interval, told.steps, told.variant) == (
        "cfg, as an input",
        3.0,
        (0.0, 0.8),
        1,
        None,
    )
    plain = small(optimizer="adam", time_sampler="diagonal").describe(PMFSample(guidance=1.0))
    assert (plain.guidance, plain.guidance_scale, plain.interval) == ("none", None, None)
    assert plain.variant == "times on the diagonal, optimizer adam"


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_what_muon_takes():
    """Every matrix of the blocks, of the scalar embeddings and both final maps;
    patch maps and class table are Adam's, as are vectors.
    """
    method = small()
    names = {id(p): name for name, p in method.named_parameters()}
    matrices, rest = method.parameters_of("main")
    assert (matrices.kind, rest.kind, matrices.split) == ("muon", "nesterov_adam", 1)
    taken = {names[id(p)] for p in matrices.params}
    expected = {f"network.{name}_embed.mlp.{i}.weight" for name in ("h", "omega", "t_min", "t_max") for i in (0, 2)}
    expected |= {"network.head.linear.weight", "v_head.linear.weight"}
    layers = [f"attn.{name}.weight" for name in ("q", "k", "v", "out")] + [f"mlp.w{i}.weight" for i in (1, 2, 3)]
    expected |= {f"{stack}.blocks.0.{layer}" for stack in ("network", "network.head", "v_head") for layer in layers}
    assert taken == expected
    left = {names[id(p)] for p in rest.params}
    assert taken | left == set(names.values()) and not taken & left
    assert {
        "network.class_embed.weight",
        "network.patch_embed.up.weight",
        "network.patch_embed.down.weight",
        "network.pos_embed",
    } <= left


@pytest.mark.parametrize(("optimizer", "kinds"), [("muon", {"muon", "nesterov_adam"}), ("adam", {"adamw"})])
def test_scalar_embeddings_have_a_rate_of_their_own(optimizer, kinds):
    method = small(optimizer=optimizer, scalar_lr=0.1)
    names = {id(p): name for name, p in method.named_parameters()}
    groups = method.parameters_of("main")
    slow = {names[id(p)] for group in groups if group.lr_scale == 0.1 for p in group.params}
    assert slow == {
        name
        for name in names.values()
        if name.split(".")[1] in ("h_embed", "omega_embed", "t_min_embed", "t_max_embed")
    }
    assert {group.lr_scale for group in groups} == {0.1, 1.0} and {group.kind for group in groups} == kinds
    assert sum(len(group.params) for group in groups) == len(names)


@pytest.mark.parametrize("optimizer", ["muon", "torch_muon", "adam"])
def test_optimizers_step_every_parameter(optimizer):
    method = small(optimizer=optimizer)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    optimizers = build_optimizers(method.parameters_of("main"), TrainConfig(lr=1e-3))
    torch.manual_seed(0)
    method("main", BATCH, 0)["loss"].backward()
    for each in optimizers:
        each.step()
    assert len(optimizers) == (1 if optimizer == "adam" else 2)
    unmoved = {name for name, p in method.named_parameters() if torch.equal(p, before[name])}
    assert not unmoved


# -- precision and compilation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("jvp", ["fused", "func"])
def test_autocast_reaches_every_parameter_and_stays_close(jvp):
    """Weights cast without a graph must not be taken for the forward that needs one."""
    method = small(jvp=jvp)
    draws, x = mixed_draws(dtype=torch.float32), BATCH["image"]
    exact = method.fields(x, BATCH["label"], draws)
    with torch.autocast("cpu", torch.bfloat16):
        fields = method.fields(x, BATCH["label"], draws)
        loss = method.objective(x, BATCH["label"], draws)["loss"]
    assert all(a.dtype == torch.float32 for a in fields) and loss.dtype == torch.float32
    for a, b in zip(fields, exact, strict=True):
        assert 0 <= ((a - b).norm() / b.norm()).item() < 0.02
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_compiled_blocks_give_the_same_loss():
    method = small()
    draws, x = mixed_draws(dtype=torch.float32), BATCH["image"]
    expected = method.fields(x, BATCH["label"], draws)
    for block in method.blocks():
        block.compile(backend="aot_eager")
    compiled = method.fields(x, BATCH["label"], draws)
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    (compiled.u_at_t.sum() + compiled.v.sum()).backward()
    assert all(p.grad is not None for p in method.parameters())


def test_blocks_are_all_the_repeated_ones():
    method = make(**TINY)
    assert len(method.blocks()) == 2 + 2 + 2 and all(isinstance(block, nn.Module) for block in method.blocks())


@pytest.mark.parametrize(
    ("config", "images", "whole"),
    [
        ({}, 1, False),
        ({}, 3, False),
        ({}, 2, True),
        ({}, 128, True),
        ({"flow_share": 0.29}, 100, True),
        ({"flow_share": 0.3}, 4, False),
        ({"time_sampler": "zero"}, 3, True),
        ({"time_sampler": "diagonal"}, 1, True),
    ],
)
def test_a_micro_batch_has_a_whole_number_of_flow_matching_samples(config, images, whole):
    method = make(**TINY, **config)
    if whole:
        method.check_micro_batch(images)
        assert draw_times(method.config, images)[2] == pytest.approx(
            method.config.flow_matching_samples(images), abs=1e-9
        )
        return
    message = (
        rf"^train\.micro_batch={images} .*does not fit model\.flow_share=.*"
        rf"here .* samples, and would round down to \d+ of {images}\."
    )
    with pytest.raises(UserError, match=message):
        method.check_micro_batch(images)


def test_a_run_with_such_a_micro_batch_is_refused_and_leaves_no_folder(tmp_path, capsys):
    keys = {
        "data.name": "synthetic",
        "train.images": "4",
        "train.batch": "4",
        "train.micro_batch": "1",
        "out": str(tmp_path / "runs"),
    }
    run = resolve(SPEC, {"method": "pmf", **keys})
    assert run_all([run]) == 2
    assert "train.micro_batch=1" in capsys.readouterr().err and not run_folder(run).exists()


@pytest.mark.parametrize("preset", load_presets(SPEC.presets))
def test_presets_fit_one_process_and_eight(preset):
    run = resolve(SPEC, {"preset": preset})
    for processes in (1, 8) if run.train.batch % 16 == 0 else (1,):
        on_meta(PMFMethod, run.model, DataInfo("x", 10, run.data.image_size or 32, 1)).check_micro_batch(
            split_batch(run.train, processes)[0]
        )


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": 0}, {"head_depth": 0}, {"head_depth": 17}, {"heads": 5}, {"width": 96, "heads": 16},
        {"patch": 0}, {"bottleneck": -1},
        {"class_tokens": 0}, {"time_tokens": 0}, {"mlp_hidden": 0}, {"prediction": "v"},
        {"preconditioner": "vp"}, {"clip": 0.0},
        {"noise_scale": 0.0}, {"time_sampler": "full"}, {"time_std": 0.0}, {"uniform_share": 1.5},
        {"flow_share": -0.1}, {"label_drop": 2.0},
        {"guidance_max": 1.0}, {"guidance_beta": -1.0}, {"norm_eps": 0.0}, {"norm_power": -1.0},
        {"perceptual": "lpips"}, {"perceptual_size": 8},
        {"lambda1": -1.0}, {"optimizer": "sgd"}, {"jvp": "reverse"},
    ],
)  # fmt: skip
def test_wrong_settings_name_the_key(wrong):
    key = list(wrong)[-1]
    with pytest.raises(UserError, match=rf"^model\.{key}={wrong[key]!r}"):
        PMFConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"guidance": 0.5}, {"interval": (0.5, 0.5)}, {"interval": (-0.1, 1.0)}, {"interval": (0.1, 1.1)}],
)
def test_wrong_sampler_settings_name_the_key(wrong):
    (key,) = wrong
    with pytest.raises(UserError, match=rf"^sample\.{key}="):
        PMFSample(**wrong)


def test_settings_that_exclude_one_another():
    with pytest.raises(UserError, match=r"model\.prediction=x"):
        PMFConfig(preconditioner="edm", prediction="u")
    with pytest.raises(UserError, match=r"model\.patch=5: must divide the image size 32"):
        make(**{**SMALL, "patch": 5})


def test_presets_resolve():
    presets = load_presets(SPEC.presets)
    for name, preset in presets.items():
        path = {"data.path": "/data"} if preset["data"]["name"] == "folder" else {}
        run = resolve(get_spec("pmf"), {"preset": name, **path})
        assert isinstance(run.model, PMFConfig) and isinstance(run.sample, PMFSample) and preset["about"]
        assert not run.data.flip  # the released recipe mirrors nothing
    published = {name: preset for name, preset in presets.items() if name != "demo"}
    assert {preset["data"]["image_size"] / preset["model"]["patch"] for preset in published.values()} == {16.0}
    assert {name: preset["expected"]["fid"] for name, preset in published.items()} == {
        "imagenet256-b": 3.12, "imagenet256-l": 2.52, "imagenet256-h": 2.22, "imagenet512-b": 3.70,
        "imagenet512-l": 2.75, "imagenet512-h": 2.48,
        "imagenet256-b-160": 3.53, "imagenet256-b-mse": 9.56, "imagenet256-b-lpips": 5.62,
        "imagenet64-b": 3.80, "imagenet1024-b": 4.58,
    }  # fmt: skip
    assert [
        PMFConfig(**presets[f"imagenet256-{size}"]["model"]).mlp_hidden or 8 * width // 3
        for size, width in (("b", 768), ("l", 1024), ("h", 1280))
    ] == [
        2048,
        2730,
        3416,
    ]
    recipe = {
        name: tuple(
            getattr(PMFConfig(**preset["model"]), key)
            for key in ("noise_scale", "time_mean", "perceptual_max_t", "guidance_beta", "uniform_share")
        )
        for name, preset in published.items()
    }
    assert [recipe[f"imagenet{size}"] for size in ("256-b", "512-b", "256-l", "512-l", "256-h", "512-h")] == [
        (1.0, 0.8, 0.8, 1.0, 0.0), (2.0, 0.8, 0.8, 1.0, 0.0), (1.0, 0.8, 0.8, 2.0, 0.0),
        (4.0, 0.0, 0.6, 1.0, 0.0), (2.0, 0.0, 0.6, 1.0, 0.1), (4.0, 0.0, 0.6, 1.0, 0.1),
    ]  # fmt: skip


def test_settings_do_not_import_torch():
    script = "import sys, pixlat.methods.pmf.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
