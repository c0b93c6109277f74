"""DSD: the theory in closed form through the method's own loss, where gradients flow and stop, the two averages,
the terms, and the sampler.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dsd_models import ABLATIONS, INFO, SMALL, batch, make
from toys import fit, settings

from pixlat.common.accounting.macs import on_meta, parameter_counts, sampling_cost
from pixlat.common.config.resolve import load_presets, resolve
from pixlat.common.config.schema import TrainConfig
from pixlat.common.errors import UserError
from pixlat.common.files import read_rows
from pixlat.common.images.image_set import ArrayImages
from pixlat.common.layers.dit import DitBlock
from pixlat.common.maths.spectrum import covariance, effective_rank, latent_health
from pixlat.common.seeds import Noise, seed_step
from pixlat.common.training import compiled
from pixlat.common.training.setup import prepare_blocks
from pixlat.common.weights import checkpoint
from pixlat.evaluation.studies.block_features import block_features
from pixlat.methods import get_spec
from pixlat.methods.base import DataInfo
from pixlat.methods.dsd.config import DsdConfig, DsdSample
from pixlat.methods.dsd.method import DsdMethod, momentum
from pixlat.methods.dsd.network import Block
from pixlat.methods.dsd.objective import diffusion_loss, draw_hidden, noised, velocity_loss

PRESETS = load_presets(get_spec("dsd").presets)


# -- the theory, section 2 of the specification: independent Gaussian channels and the best linear predictor -----------


def gaussian_channel(std, a=1.0, points=4000):
    """Latents a z, noise and times whose sample moments are exact: z = +-std and n = +-1 in all combinations,
    t on midpoints of [0, 1].
    """
    t = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    z = a * std * signs[:, 0].repeat_interleave(points).view(-1, 1, 1)
    return z, signs[:, 1].repeat_interleave(points).view(-1, 1, 1), t.repeat(4)


def best_linear(predict, std, t):
    """k(t) that minimises E (k z_t - target)^2, from the moments of z_t = (1 - t) z + t n."""
    variance = (1 - t) ** 2 * std**2 + t**2
    wanted = (1 - t) * std**2 if predict == "z" else t - (1 - t) * std**2
    return (wanted / variance).view(-1, 1, 1)


def drift(std, **switches):
    """dL / d log a at a = 1: how the loss pulls on the scale of a channel, the predictor being held.

    Positive: gradient descent shrinks it.
    """
    config = DsdConfig(**{**SMALL, "ema": False, "mask": False, **switches})
    a = torch.ones((), dtype=torch.float64, requires_grad=True)
    z, n, t = gaussian_channel(std, a)
    output = best_linear(config.predict, std, t) * noised(config, z, n, t)
    loss = diffusion_loss(config, output, z, n)
    return loss.item(), torch.autograd.grad(loss, a)[0].item() if loss.requires_grad else 0.0


@pytest.mark.parametrize("std", [0.1, 0.5, 1.0, 4.0])
def test_the_least_velocity_loss_is_pi_half_times_the_standard_deviation(std):
    loss, gradient = drift(std, predict="v", target="live")
    assert loss == pytest.approx(math.pi / 2 * std, rel=1e-5)
    # with live gradients every direction is shrunk, in proportion to its scale
    assert gradient == pytest.approx(math.pi / 2 * std, rel=1e-5)


STDS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.25, 2.0)
DRIFTS = {
    "v": (0.108, 0.195, 0.194, 0.102, 0.000, -0.159, -0.776),
    "z": (-0.001, -0.015, -0.050, -0.136, -0.215, -0.333, -0.792),
}


@pytest.mark.parametrize("predict", DRIFTS)
def test_drift_of_a_direction_behind_a_stopped_target(predict):
    found = [drift(std, predict=predict)[1] for std in STDS]
    assert found == pytest.approx(DRIFTS[predict], abs=6e-4)


def test_stopped_v_prediction_has_an_unstable_fixed_point_at_unit_scale_and_z_prediction_shrinks_nothing():
    assert drift(1.0, predict="v")[1] == pytest.approx(0, abs=1e-9)
    below, above = drift(0.99, predict="v")[1], drift(1.01, predict="v")[1]
    assert below > 0 > above  # a direction below unit scale dies, one above grows: rank is lost
    assert all(drift(std, predict="z")[1] < 0 for std in (0.01, 0.1, 0.5, 1.0, 2.0, 5.0))
    assert drift(0.5, input_grad=False) == (pytest.approx(drift(0.5)[0]), 0.0)  # nothing pulls on a detached encoder


def test_a_velocity_made_of_a_live_noisy_latent_pulls_on_the_target_again():
    """Section 2's trap: the same value as the loss on the output weighted by 1 / t^2, and another gradient."""
    config = DsdConfig(**{**SMALL, "ema": False, "mask": False})

    def pull(std, live, method=False):
        a = torch.ones((), dtype=torch.float64, requires_grad=True)
        z, n, t = gaussian_channel(std, a)
        t = 0.05 + 0.95 * t  # the weight has no integral down to 0
        z_t, time = noised(config, z, n, t), t.view(-1, 1, 1)
        output = best_linear("z", std, t) * z_t
        if method:
            loss = ((output - z.detach()) / time).square().mean()
        else:
            loss = ((z_t if live else z_t.detach()) / time - output / time - (n - z.detach())).square().mean()
        return loss.item(), torch.autograd.grad(loss, a)[0].item()

    for std in (0.1, 0.5, 1.0):
        (value, right), (same_value, also_right), (third_value, wrong) = (
            pull(std, True, method=True),
            pull(std, False),
            pull(std, True),
        )
        assert value == pytest.approx(same_value, rel=1e-12) == pytest.approx(third_value, rel=1e-12)
        assert also_right == pytest.approx(right, rel=1e-9) and right < 0
        assert wrong > 0  # shrinks what the comparison of the output does not


def test_the_methods_gradient_is_that_of_the_detached_form_and_not_of_the_trap():
    method, images = make(ema=False, mask=False), batch()["image"]
    seed_step(0, 0, 0)
    draws = method.draw(batch())

    def gradient(form):
        z = method.network.encoder(images).z
        z_t, t = noised(method.config, z, draws.noise, draws.t), draws.t.view(-1, 1, 1)
        output = method.denoise(z_t, draws.t, draws.labels).output
        losses = {
            "method": lambda: diffusion_loss(method.config, output, z, draws.noise),
            "detached": lambda: (t * ((z_t.detach() - output) / t - (draws.noise - z.detach()))).square().mean(),
            "live": lambda: (t * ((z_t - output) / t - (draws.noise - z.detach()))).square().mean(),
        }
        loss = losses[form]()
        return loss.item(), torch.autograd.grad(loss, method.network.encoder.out.weight)[0]

    (value, ours), (same, detached), (trapped, live) = gradient("method"), gradient("detached"), gradient("live")
    assert value == pytest.approx(same, rel=1e-5) == pytest.approx(trapped, rel=1e-5)
    torch.testing.assert_close(ours, detached, rtol=1e-3, atol=1e-6)
    assert (live - ours).norm() > 0.25 * ours.norm()


# -- where gradients flow ----------------------------------------------------------------------------------------------


def sides(**switches):
    """Whether the diffusion loss reaches the latent of the input branch and that of the target branch."""
    config = DsdConfig(**{**SMALL, "ema": False, **switches})
    z1, z2 = (torch.randn(2, 4, 8, requires_grad=True) for _ in range(2))
    noise, t = torch.randn(2, 4, 8), torch.rand(2)
    diffusion_loss(
        config, 0.5 * noised(config, z1, noise, t) + torch.zeros(8, requires_grad=True), z2, noise
    ).backward()
    return z1.grad is not None, z2.grad is not None


def test_the_switches_open_and_close_the_two_ways_into_the_encoder():
    assert sides() == (True, False)
    assert sides(predict="v") == (True, False)
    assert sides(target="live") == (True, True)
    assert sides(input_grad=False) == (False, False)
    z1, z2, noise = (torch.randn(2, 4, 8, requires_grad=True) for _ in range(3))
    velocity_loss(z1, z2, noise).backward()
    assert z2.grad is None and z1.grad is not None


def test_the_velocity_heads_loss_stops_before_the_trunk():
    for detach in (True, False):
        method = make(velocity_head_detach=detach)
        noise, t, labels = torch.randn(2, 16, 8), torch.rand(2), torch.tensor([0, 3])
        velocity_loss(method.denoise(torch.randn(2, 16, 8), t, labels).velocity, noise, noise).backward()
        reached = {name.partition(".")[0] for name, p in method.network.named_parameters() if p.grad is not None}
        assert (
            reached == {"velocity_head"}
            if detach
            else {"velocity_head", "encoder", "latent_embed", "class_embed"} <= reached
        )


def test_a_velocity_head_that_sees_the_noisy_latent_sends_nothing_back_through_it():
    method = make(velocity_latent=True)
    z, t, labels = torch.randn(2, 16, 8, requires_grad=True), torch.rand(2), torch.tensor([0, 3])
    before = method.denoise(z, t, labels).velocity
    before.square().mean().backward()
    reached = {name.partition(".")[0] for name, p in method.network.named_parameters() if p.grad is not None}
    assert z.grad is None and reached == {"velocity_head", "velocity_latent"}
    torch.testing.assert_close(before, -method.network(z, 1 - t, labels, "velocity"))


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains_all_its_parameters(name):
    method = make(**ABLATIONS[name])
    seed_step(0, 0, 0)
    out = method("generator", batch(), 0)
    assert out["loss"].isfinite() and out["loss"].item() == pytest.approx(
        sum(method.weight_of(k) * v.item() for k, v in out.items() if k in TERMS), rel=1e-5
    )
    out["loss"].backward()
    assert all(p.grad is not None for p in method.parameters_of("generator")[0].params)
    assert method.phases == ("generator",)
    told = method.describe(DsdSample())
    assert (told.variant is None) == (name in ("full", "no reconstruction", "no auxiliary terms", "logit-normal times"))


TERMS = ("diffusion", "velocity", "reconstruction", "perceptual", "gan", "align", "self", "cls")


def test_the_target_is_what_its_branch_says():
    images, hidden = batch()["image"], torch.ones(6, 16, dtype=torch.bool)
    full = make()
    with torch.no_grad():
        full.target_encoder.out.bias += 1
    online = full.network.encoder(images, hidden)
    expected = full.target_encoder(images)
    found = full.target_of(images, online)
    torch.testing.assert_close(found.z, expected.z)
    assert not found.z.requires_grad and not torch.allclose(found.z, full.network.encoder(images).z)
    masked = make(ema=False)
    online = masked.network.encoder(images, hidden)
    torch.testing.assert_close(masked.target_of(images, online).z, masked.network.encoder(images).z)
    assert not masked.target_of(images, online).z.requires_grad
    assert make(ema=False, target="live").target_of(images, online).z.requires_grad
    assert make(ema=False, mask=False).target_of(images, online) is online


# -- one trunk ---------------------------------------------------------------------------------------------------------


def test_all_three_passes_go_through_the_same_blocks():
    method, calls = make(), []
    for block in method.network.encoder.trunk.blocks:
        block.register_forward_hook(lambda module, args, output: calls.append(id(module)))
    method("generator", batch(), 1)
    once = [id(block) for block in method.network.encoder.trunk.blocks]
    assert calls == 3 * once  # encode, denoise, decode; the target's encoder has blocks of its own
    calls.clear()
    labels = torch.tensor([0, 1])
    method.sample(labels, Noise([1, 2]), DsdSample(steps=2))
    assert calls == 3 * once  # two evaluations and the decoding
    names = [name for name, _ in method.named_parameters() if "blocks.0.attn.qkv.weight" in name]
    heads = ["network.diffusion_head.blocks.0.attn.qkv.weight", "network.velocity_head.blocks.0.attn.qkv.weight"]
    assert names == [
        "network.encoder.trunk.blocks.0.attn.qkv.weight",
        *heads,
        "target_encoder.trunk.blocks.0.attn.qkv.weight",
    ]


@pytest.mark.parametrize(
    ("preset", "millions"), [("imagenet256-s", 42), ("imagenet256-m", 118), ("imagenet256-b", 205)]
)
def test_sizes_have_the_published_counts(preset, millions):
    run = resolve(get_spec("dsd"), {"preset": preset})
    run.sample.steps = 2
    method = on_meta(DsdMethod, run.model, DataInfo("imagenet", 1000, 256, 1_281_167))
    counts = parameter_counts(method)
    assert counts.gen_trainable == sum(p.numel() for p in method.network.parameters())
    assert counts.gen_trainable == pytest.approx(millions * 1e6, rel=0.02) and counts.decoder == 0
    assert method.describe(run.sample).size == f"{preset[-1].upper()}/16"
    cost = sampling_cost(method, run.sample)
    trunk = run.model.depth * (12 * 256 * run.model.width**2 + 2 * 256**2 * run.model.width)
    ends = 256 * run.model.width * (32 + 768)  # from the latent, to the pixels
    assert cost.macs_decoder == trunk + ends  # the same trunk again, counted once more
    assert cost.macs_per_image == 2 * cost.macs_per_forward["network"] + cost.macs_decoder and cost.net_forwards == {
        "network": 2.0,
        "decoder": 1.0,
    }
    assert trunk < cost.macs_per_forward["network"] < 1.1 * trunk + 2 * ends


def test_the_decoder_owns_no_tensor_and_follows_the_network():
    method = make()
    assert not list(method.decoder.parameters()) and not any(name.startswith("decoder") for name in method.state_dict())
    images = batch()["image"]
    latents = method.encode(images)
    assert latents.shape == (6, 8, 4, 4)
    torch.testing.assert_close(method.decode(latents), method.network.decode(method.network.encoder(images).z))
    with torch.no_grad():
        method.target_encoder.out.weight.zero_()
    torch.testing.assert_close(method.encode(images), latents)  # the average of the loss is not what encodes
    tokens = latents.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(6, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.square().mean(-1), torch.ones(6, 16), atol=1e-3, rtol=0)


def test_roles_time_and_class_are_told_apart():
    method = make()
    z, labels = torch.randn(2, 16, 8), torch.tensor([0, 1])
    at = [method.network(z, torch.full((2,), time), labels, "latent") for time in (0.1, 0.9)]
    assert not torch.allclose(at[0], at[1])
    assert not torch.allclose(at[0], method.network(z, torch.full((2,), 0.1), labels + 1, "latent"))
    # our time 0.9 is the paper's 0.1, and our velocity goes towards the noise
    denoised = method.denoise(z, torch.full((2,), 0.9), labels)
    torch.testing.assert_close(denoised.output, at[0])
    torch.testing.assert_close(denoised.velocity, -method.network(z, torch.full((2,), 0.1), labels, "velocity"))
    by_v = make(predict="v")
    torch.testing.assert_close(
        by_v.denoise(z, torch.full((2,), 0.9), labels).output, -by_v.network(z, torch.full((2,), 0.1), labels, "latent")
    )


def test_blocks_are_heard_as_they_denoise():
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
    images, method = ArrayImages(pixels, np.zeros(6, dtype=np.int64), "noise"), make()
    low, high = (block_features(method, images, np.arange(6), time, 3, torch.device("cpu")) for time in (0.1, 0.9))
    assert [f.shape for f in low] == [(6, 32)] * (3 + 2)
    assert not any(torch.equal(a, b) for a, b in zip(low, high, strict=True))


# -- masking and draws -------------------------------------------------------------------------------------------------


def test_hidden_shares_are_uniform_and_negative_ones_hide_nothing():
    torch.manual_seed(0)
    share = draw_hidden((-0.1, 0.7), 4000, 100, torch.device("cpu")).float().mean(dim=1)
    # below half a patch is none
    assert share.max() <= 0.7 and (share == 0).float().mean() == pytest.approx(0.105 / 0.8, abs=0.02)
    assert share.mean() == pytest.approx(0.35 * 0.7 / 0.8, abs=0.01)
    places = draw_hidden((0.5, 0.5), 4000, 10, torch.device("cpu")).float()
    assert (places.sum(dim=1) == 5).all() and (places.mean(dim=0) - 0.5).abs().max() < 0.04


def test_a_hidden_patch_does_not_reach_the_latents():
    method, images = make(), batch()["image"]
    hidden = torch.zeros(6, 16, dtype=torch.bool)
    hidden[:, 5] = True  # row 1, column 1 of 4 x 4
    changed = images.clone()
    changed[:, :, 2:4, 2:4] += 1
    torch.testing.assert_close(method.network.encoder(images, hidden).z, method.network.encoder(changed, hidden).z)
    assert not torch.allclose(method.network.encoder(images).z, method.network.encoder(changed).z)


def test_decoded_latents_are_noised_as_configured():
    method = make(clean_share=0.25, noise_max=0.4, noise_scale=2.0)
    torch.manual_seed(0)
    tau = method.draw(batch(4000)).tau
    assert (tau == 0).float().mean() == pytest.approx(0.25, abs=0.03) and 0.39 < tau.max() <= 0.4
    draws = method.draw(batch())._replace(tau=torch.full((6,), 0.3))
    z = torch.randn(6, 16, 8)
    found = method.reconstruction_terms(batch()["image"], z, draws)["reconstruction"]
    expected = F.mse_loss(method.network.decode(0.7 * z + 0.3 * 2.0 * draws.decode_noise), batch()["image"])
    torch.testing.assert_close(found, expected)


# -- terms -------------------------------------------------------------------------------------------------------------


def test_feature_terms_are_cosines_and_cross_entropy():
    method, data = make(align="embedded"), batch()
    method.load_external()
    seed_step(0, 0, 0)
    draws = method.draw(data)
    taught = method.features_of(data)[0]
    assert taught.shape == (6, 16, 112) and method.pool == 2
    online = method.network.encoder(data["image"], draws.hidden)
    clean = method.target_of(data["image"], online)
    denoised = method.denoise(online.z, draws.t, draws.labels)
    terms = method.feature_terms(data["label"], online, denoised, clean, taught)

    def cosines(features, target):
        return F.cosine_similarity(features, target, dim=-1).mean()

    shallow = [method.network.encoder.trunk.blocks[0]]  # a third of three blocks
    seen = []
    shallow[0].register_forward_hook(lambda module, args, output: seen.append(output))
    method.network.encoder(data["image"], draws.hidden)
    method.denoise(online.z, draws.t, draws.labels)
    torch.testing.assert_close(
        terms["align"], -sum(cosines(method.projector(features), taught) for features in seen) / 2
    )
    target = method.target_encoder(data["image"]).features.last
    last = (online.features.last, denoised.features.last)
    torch.testing.assert_close(
        terms["self"], -sum(cosines(method.predictor(features), target) for features in last) / 2
    )
    logits = method.classifier(online.features.last.mean(dim=1)).log_softmax(dim=1)
    smooth = 0.9 * F.one_hot(data["label"], 3) + 0.1 / 3
    torch.testing.assert_close(terms["cls"], -(smooth * logits).sum(dim=1).mean())
    method("generator", data, 1)["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters()) and method.projector[0].weight.grad is not None
    assert (
        method.components()[0].role == "teacher"
        and method.components()[0].used_at == "train"
        and method.components()[0].sha256
    )


def test_the_discriminator_starts_late_and_hears_only_its_own_loss():
    method, data = make(gan_weight=0.1, gan_start=16, discriminator_widths=[8, 8], perceptual="embedded"), batch()
    method.load_external()
    assert method.phases == ("generator", "discriminator") and method.parameters_of("discriminator")[0].betas == (
        0.5,
        0.9,
    )
    assert method.phase_active("generator", 0) and not method.phase_active("discriminator", 0)
    assert "gan" not in method("generator", data, 1) and "perceptual" in method("generator", data, 1)
    assert method.phase_active("discriminator", 16) and method.schedule_images("discriminator", 20) == 4
    method.begin_step(16)
    seed_step(0, 0, 0)
    out = method("generator", data, 1)
    seed_step(0, 0, 0)
    draws = method.draw(data)
    assert out["gan"].isfinite() and method.weight_of("gan") == 0.1
    out["loss"].backward()
    judged = method("discriminator", data, 1)
    method.zero_grad()
    judged["loss"].backward()
    assert {name.partition(".")[0] for name, p in method.named_parameters() if p.grad is not None} == {"discriminator"}
    assert draws.augmentation is not None


def test_the_targets_blocks_are_compiled_and_neither_recomputed_nor_listened_to(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    method, plain = make(), make()
    prepare_blocks(method, TrainConfig(compile=True))
    own, target = method.blocks(), method.frozen_blocks()
    assert len(target) == len(method.network.encoder.trunk.blocks) and not set(own) & set(target)
    repeated = [module for module in method.modules() if isinstance(module, Block | DitBlock)]
    assert set(repeated) == {*own, *target}, "no repeated block is left to the interpreter"
    assert all(block.forward.func is compiled._call for block in (*own, *target))
    losses = []
    for each in (method, plain):
        seed_step(0, 0, 0)
        losses.append(each("generator", batch(), 1)["loss"])
    torch.testing.assert_close(*losses)
    losses[0].backward()
    assert all(p.grad is None for p in method.target_encoder.parameters())
    prepare_blocks(plain, TrainConfig(recompute_blocks=True))
    assert all("forward" in vars(block) for block in plain.blocks()) and not any(
        "forward" in vars(block) for block in plain.frozen_blocks()
    )
    assert make(ema=False).frozen_blocks() == []


# -- two averages ------------------------------------------------------------------------------------------------------


def test_momentum_rises_along_half_a_cosine():
    config = DsdConfig(**{**SMALL, "ema_momentum": 0.9, "ema_momentum_end": 1.0, "ema_steps": 100})
    assert [momentum(config, step) for step in (0, 50, 100, 1000)] == pytest.approx([0.9, 0.95, 1.0, 1.0])
    assert momentum(DsdConfig(**{**SMALL, "ema_momentum": 0.9}), 1000) == 0.9


def test_the_targets_average_moves_by_its_own_momentum_and_only_after_a_step():
    method = make(ema_momentum=0.75)
    before = {name: p.clone() for name, p in method.target_encoder.named_parameters()}
    with torch.no_grad():
        for p in method.network.encoder.parameters():
            p += 1
    assert all(torch.equal(p, before[name]) for name, p in method.target_encoder.named_parameters())
    online = dict(method.network.encoder.named_parameters())
    method.after_step(0)
    for name, p in method.target_encoder.named_parameters():
        torch.testing.assert_close(p, 0.75 * before[name] + 0.25 * online[name].detach())
        assert not p.requires_grad
    assert make(ema=False).after_step(0) is None


def test_the_average_of_the_loss_and_that_of_the_trainer_are_two(tmp_path):
    """Momentum 0.9 in the method, decay 0.5 in the trainer: after each step of a run both follow their own rule,
    in their own place.
    """
    method = make(ema_momentum=0.9)
    teacher = {name: p.clone() for name, p in method.target_encoder.named_parameters()}
    evaluated = {name: p.detach().clone() for name, p in method.averaged_parameters().items()}
    own_after_step = method.after_step

    def follow(step):
        own_after_step(step)
        for name, p in method.network.encoder.named_parameters():
            teacher[name].lerp_(p.detach(), 0.1)
        for name, p in method.averaged_parameters().items():
            evaluated[name].lerp_(p.detach(), 0.5)

    method.after_step = follow
    state = fit(method, tmp_path, settings(images=40, ema_decay=[0.5]))
    saved = checkpoint.load(checkpoint.latest(tmp_path / "checkpoints")).tensors
    assert {name for name in saved["ema-0.5"] if "target_encoder" in name} == set() and saved[
        "ema-0.5"
    ].keys() == evaluated.keys()
    for name, value in teacher.items():
        torch.testing.assert_close(saved["model"][f"target_encoder.{name}"], value)
    for name, value in evaluated.items():
        torch.testing.assert_close(saved["ema-0.5"][name], value)
    weight = "out.weight"
    averages = (
        saved["model"][f"target_encoder.{weight}"],
        saved["ema-0.5"][f"network.encoder.{weight}"],
        saved["model"][f"network.encoder.{weight}"],
    )
    assert all(not torch.allclose(averages[i], averages[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    # what is sampled is the trainer's average; the target's encoder stays what it is
    with state.weights("0.5") as sampled:
        torch.testing.assert_close(sampled.network.encoder.out.weight, evaluated[f"network.encoder.{weight}"])
        torch.testing.assert_close(sampled.target_encoder.out.weight, teacher[weight])


def test_a_stopped_run_goes_on_with_the_same_target(tmp_path):
    first = fit(make(), tmp_path / "whole", settings(images=32, checkpoint_images=16)).method.state_dict()
    fit(make(), tmp_path / "cut", settings(images=32, checkpoint_images=16))
    newest = checkpoint.latest(tmp_path / "cut/checkpoints")
    newest.rename(tmp_path / "away")
    again = fit(make(), tmp_path / "cut", settings(images=32, checkpoint_images=16)).method.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first) and any(
        "target_encoder" in name for name in first
    )


# -- latent health -----------------------------------------------------------------------------------------------------


def test_effective_rank():
    full = torch.eye(8).repeat(4, 1).view(4, 8, 8)
    assert effective_rank(full).item() == pytest.approx(8, rel=1e-9)
    assert effective_rank(3.7 * full).item() == pytest.approx(8, rel=1e-9)
    assert effective_rank(torch.ones(5, 3, 8)).item() == pytest.approx(1, abs=1e-5)
    two = torch.diag(torch.tensor([3.0, 1.0, 0.0])).view(1, 3, 3)
    assert effective_rank(two).item() == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-5
    )
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(10, 4, 6, generator=generator)
    values = torch.linalg.svdvals(z.flatten(0, 1).double())
    p = values / values.sum()
    assert effective_rank(z).item() == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-9)


def test_health_tells_a_constant_code_with_residue_from_a_full_one():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 4, 8, generator=generator)
    full, collapsed = latent_health(z), latent_health(1 + 0.01 * z)
    assert full["erank"] > 7.9 and collapsed["erank"] < 1.5  # centred, both would be full
    assert full["std_between"] == pytest.approx(1, abs=0.05) and collapsed["std_between"] == pytest.approx(
        0.01, abs=0.001
    )
    assert full["edof"] == pytest.approx(4, abs=0.1) and collapsed["edof"] < 1e-2
    assert collapsed["latent_rms"] == pytest.approx(1, abs=0.01)
    scaled = latent_health(z * torch.tensor([3.0, *[1.0] * 6, 0.5]))
    assert scaled["channel_std_max"] == pytest.approx(3, rel=0.1) and scaled["channel_std_min"] == pytest.approx(
        0.5, rel=0.1
    )
    assert scaled["edof"] == pytest.approx(9 / 10 + 6 / 2 + 0.25 / 1.25, abs=0.1)


def test_the_covariance_is_that_between_images():
    # a fixed code of each position is not spread between images
    positions = 10 * torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1))
    z = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(2))
    each = torch.stack([torch.cov(z[:, n].T.double()) for n in range(4)]).mean(dim=0)
    torch.testing.assert_close(covariance(z + positions), each, rtol=1e-4, atol=1e-5)


def test_health_is_measured_now_and_then():
    method = make(health_every=3)
    keys = {
        "erank",
        "erank_share",
        "latent_rms",
        "std_between",
        "channel_std_min",
        "channel_std_max",
        "edof",
        "erank_predicted",
    }
    assert [keys <= method("generator", batch(), step).keys() for step in range(4)] == [True, False, False, True]
    assert not keys & method("generator", batch(1), 0).keys()  # one image does not differ from others


class Collapsed(DsdMethod):
    """Its latents are the same for all images."""

    def target_of(self, images, online):
        clean = super().target_of(images, online)
        return clean._replace(z=clean.z[:1].expand_as(clean.z))


def test_a_collapse_is_told_once(tmp_path, capsys):
    torch.manual_seed(0)
    state = fit(Collapsed(DsdConfig(**SMALL), INFO), tmp_path / "collapsed")
    told = capsys.readouterr().err
    assert told.count("the latents are collapsing: effective rank") == 1 and "warning after 24 images" in told
    rows = read_rows(tmp_path / "collapsed/metrics.jsonl")
    assert len(rows) > 3 and all("erank" in row for row in rows) and state.step == 20
    fit(make(), tmp_path / "sound")
    assert "collapsing" not in capsys.readouterr().err


def test_alarms_read_the_means_of_any_phase():
    method = make()
    sound = {"erank": 4.0, "erank_share": 0.5, "std_between": 0.7, "latent_rms": 1.0}
    assert method.alarms({}) == {} and method.alarms(sound) == {}
    assert (
        "0.100 of 1.000"
        in method.alarms({f"generator/{k}": v for k, v in (sound | {"std_between": 0.1}).items()})["collapse"]
    )
    assert "rank 1.20 of 8" in method.alarms(sound | {"erank": 1.2, "erank_share": 0.15})["collapse"]


# -- sampling ----------------------------------------------------------------------------------------------------------


class PointMass:
    """Stands in for the network of data that are one latent a class; class 3 is "no class"."""

    def __init__(self):
        self.means = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(3))
        self.calls = []

    def __call__(self, z, time, labels, head):
        assert (time < 1).all()
        self.calls.append((len(z), round(time[0].item(), 6), head))
        clean = self.means[labels]
        return clean if head == "latent" else (clean - z) / (1 - time.view(-1, 1, 1))


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
@pytest.mark.parametrize("head", ["velocity", "latent"])
def test_every_sampler_lands_on_the_data(monkeypatch, solver, head):
    method, network = make(), PointMass()
    monkeypatch.setattr(method.network, "forward", network)
    monkeypatch.setattr(method.decoder, "forward", lambda z: z)
    config = DsdSample(steps=10, solver=solver, head=head)
    labels = torch.tensor([0, 2])
    torch.testing.assert_close(
        method.sample(labels, Noise([1, 2]), config), network.means[labels], rtol=1e-4, atol=1e-4
    )
    assert len(network.calls) == method.evaluations(config) == (19 if solver == "heun" else 10)
    assert network.calls[0] == (2, 0.0, head) and network.calls[-1][1] == 0.9


def gaussian_velocity(z, time, mean, std):
    """Towards the data, for latents N(mean, std^2), at the paper's time."""
    variance = time**2 * std**2 + (1 - time) ** 2
    return mean + (time * std**2 - (1 - time)) / variance * (z - time * mean)


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_samplers_give_a_gaussian_its_moments(monkeypatch, solver):
    method = make()
    monkeypatch.setattr(
        method.network, "forward", lambda z, time, labels, head: gaussian_velocity(z, time.view(-1, 1, 1), 0.5, 0.3)
    )
    monkeypatch.setattr(method.decoder, "forward", lambda z: z)
    z = method.sample(
        torch.zeros(300, dtype=torch.int64), Noise(range(300)), DsdSample(steps=100, solver=solver, diffusion=2.0)
    )
    assert z.mean() == pytest.approx(0.5, abs=0.01) and z.std() == pytest.approx(0.3, abs=0.012)


def test_guidance_moves_away_from_no_class_inside_its_interval(monkeypatch):
    method, network = make(), PointMass()
    monkeypatch.setattr(method.network, "forward", network)
    config = DsdSample(guidance=3.0, interval=(0.2, 0.5))
    z, labels = torch.randn(2, 16, 8), torch.tensor([0, 1])
    guided = method.velocity(z, 0.6, labels, config)
    extrapolated = network.means[3] + 3 * (network.means[labels] - network.means[3])
    torch.testing.assert_close(guided, (z - extrapolated) / 0.6, rtol=1e-4, atol=1e-5)
    assert network.calls[-1][0] == 4
    method.velocity(z, 0.4, labels, config)
    assert network.calls[-1][0] == 2
    told = method.describe(config)
    assert (told.guidance, told.guidance_scale, told.interval) == (
        "cfg",
        3.0,
        (0.2, 0.5),
    ) and told.sampler == "euler, velocity head"


def test_the_diffusion_head_is_not_run_for_the_velocity(monkeypatch):
    method = make()
    monkeypatch.setattr(method.network.diffusion_head, "forward", None)
    assert method.sample(torch.tensor([0]), Noise([0]), DsdSample(steps=2)).shape == (1, 3, 8, 8)
    with pytest.raises(TypeError):
        method.sample(torch.tensor([0]), Noise([0]), DsdSample(steps=2, head="latent"))


def test_batch_norm_uses_running_moments_in_evaluation():
    method, images = make(latent_norm="bn"), batch()["image"]
    z = method.network.encoder(images).z.flatten(0, 1)
    torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(8), atol=1e-2, rtol=0)
    method.eval()
    torch.testing.assert_close(method.encode(images)[:2], method.encode(images[:2]), rtol=1e-4, atol=1e-5)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "model.heads=3: must divide model.width=32"),
        ({"target": "live"}, "model.target='live': needs model.ema=false"),
        ({"predict": "x"}, "model.predict='x' is not one of z, v"),
        ({"latent_norm": "layer"}, "model.latent_norm='layer' is not one of ln, bn, none"),
        ({"mask_ratio": (0.5, 0.1)}, "must be two numbers in order"),
        ({"align_after": 4}, "must be the number of one of the 3 blocks"),
        ({"velocity_weight": 0.0}, "model.velocity_weight=0.0: must be positive"),
        ({"latent_channels": 1}, "must be at least 2"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DsdConfig(**{**SMALL, **changes})


def test_what_does_not_fit_the_data_is_refused():
    with pytest.raises(UserError, match=r"model.patch=3: must divide the image size 8"):
        make(patch=3)
    with pytest.raises(UserError, match=r"gives 1 x 1 tokens|which must divide the 8 x 8"):
        DsdMethod(DsdConfig(**{**SMALL, "align": "embedded", "patch": 4}), DataInfo("odd", 3, 12, 40))
    with pytest.raises(UserError, match="encoder='dinov3' is not known"):
        make(align="dinov3")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves_and_off_is_off(preset):
    run = resolve(
        get_spec("dsd"), {"preset": preset, "model.ema": "on"} if preset.startswith("imagenet") else {"preset": preset}
    )
    assert run.model.velocity_head_detach and run.model.input_grad
    assert ("expected" in PRESETS[preset]) == preset.startswith("imagenet")
