"""RAE's first stage: published sizes of the decoder, an independent plain computation,
its losses and their timing, released files.
"""

import math

import pytest
import torch
from rae_models import INFO, ToyEncoder, batch, stage1, use_toys
from toys import Killed, fit, settings, state_of

import pixlat.methods.rae.decoder
from pixlat.common.accounting.macs import count_macs
from pixlat.common.errors import UserError
from pixlat.common.maths.adversarial import augment, quantise
from pixlat.common.seeds import seed_step
from pixlat.common.training.state import load_state_without_external, state_without_external
from pixlat.methods.rae.config import DECODERS, DecoderConfig, DecoderShape
from pixlat.methods.rae.decoder import build_decoder
from pixlat.methods.rae.reference import decoder_from_released, decoder_to_released, read_released
from pixlat.methods.rae.vit import ViTDecoder

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TINY = DecoderShape(16, 2, 2, 24)


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    use_toys(monkeypatch)


def on_meta(size, grid=16, patch=16):
    with torch.device("meta"):
        return ViTDecoder(DECODERS[size], 768, grid, patch, *IMAGENET)


@pytest.mark.parametrize(
    ("size", "grid", "patch", "params", "frozen", "gmacs"),
    [
        ("b", 16, 16, 86_435_328, 197_376, 23.35),
        ("l", 16, 16, 304_150_272, 263_168, 81.26),
        ("xl", 16, 16, 415_352_704, 296_064, 110.82),
        ("xl", 32, 16, 416_237_440, 1_180_800, 492.8),
        ("xl", 16, 32, 418_009_216, 296_064, None),
    ],
)
def test_parameters_and_macs_of_the_published_decoders(size, grid, patch, params, frozen, gmacs):
    decoder = on_meta(size, grid, patch)
    assert sum(tensor.numel() for tensor in decoder.state_dict().values()) == params
    assert decoder.positions.numel() == frozen == params - sum(p.numel() for p in decoder.parameters())
    if gmacs:
        with torch.no_grad():
            macs = count_macs(lambda: decoder(torch.zeros(1, 768, grid, grid, device="meta")))
        assert macs / 1e9 == pytest.approx(gmacs, abs=0.005 if gmacs < 200 else 0.05)


def filled(shape=TINY, channels=5, grid=3, patch=2):
    """A decoder in which every number matters."""
    torch.manual_seed(0)
    decoder = ViTDecoder(shape, channels, grid, patch, *IMAGENET)
    with torch.no_grad():
        for p in decoder.parameters():
            p.normal_(std=0.3)
    return decoder.double()


def plain_decoder(state, heads, z, patch):
    """The released decoder written down from its description, on released names; pixels in [0, 1]."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        variance = x.var(-1, correction=0, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (variance + 1e-12).sqrt() * state[f"{name}.weight"] + state[
            f"{name}.bias"
        ]

    x = linear("decoder_embed", z.flatten(2).transpose(1, 2))
    x = torch.cat((state["trainable_cls_token"].expand(len(z), -1, -1), x), 1) + state["decoder_pos_embed"]
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("decoder_layers"))):
        block = f"decoder_layers.{i}"
        h = norm(f"{block}.layernorm_before", x)
        q, k, v = (
            linear(f"{block}.attention.attention.{part}", h).chunk(heads, -1) for part in ("query", "key", "value")
        )
        mixed = [
            (a @ b.transpose(1, 2) / math.sqrt(a.shape[-1])).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)
        ]
        x = x + linear(f"{block}.attention.output.dense", torch.cat(mixed, -1))
        h = linear(f"{block}.intermediate.dense", norm(f"{block}.layernorm_after", x))
        x = x + linear(f"{block}.output.dense", 0.5 * h * (1 + torch.erf(h / math.sqrt(2))))
    tokens = linear("decoder_pred", norm("decoder_norm", x))[:, 1:]
    grid = z.shape[-1]
    images = torch.zeros(len(z), 3, grid * patch, grid * patch, dtype=z.dtype)
    for token in range(grid * grid):
        row, column = divmod(token, grid)
        pixels = tokens[:, token].reshape(-1, patch, patch, 3).permute(0, 3, 1, 2)  # the channel is fastest
        images[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = pixels
    mean, std = (torch.tensor(values, dtype=z.dtype).view(3, 1, 1) for values in IMAGENET)
    return images * std + mean


def test_the_decoder_computes_what_the_specification_says():
    decoder = filled()
    z = torch.randn(2, 5, 3, 3).double()
    with torch.no_grad():
        images = decoder(z)
        expected = plain_decoder(decoder_to_released(decoder.state_dict()), 2, z, 2)
    assert expected.std() > 0.05
    # pixel means and deviations are float32
    torch.testing.assert_close((images + 1) / 2, expected, atol=1e-7, rtol=1e-6)


def test_the_position_table_is_the_published_one():
    table = on_meta("b").positions
    assert table.shape == (1, 257, 768)
    positions = filled(DecoderShape(8, 1, 2, 8), grid=4).positions[0]
    assert not positions[0].any()
    row, column = 2, 3
    half = [f(p * 10000 ** (-k / 2)) for p in (column, row) for f in (math.sin, math.cos) for k in range(2)]
    torch.testing.assert_close(positions[1 + row * 4 + column].tolist(), half, atol=1e-6, rtol=0)


# -- losses ------------------------------------------------------------------------------------------------------------


def test_noise_has_one_deviation_an_image_uniform_or_half_normal():
    latents = torch.zeros(20_000, 2, 2, 2)
    torch.manual_seed(0)
    uniform = stage1().draw_noise(latents)
    halfnormal = stage1(noise_distribution="halfnormal").draw_noise(latents)
    # E[sigma^2] = tau^2 / 3 and tau^2; over 20,000 images the standard errors are 1 % and 1.4 %.
    assert uniform.square().mean().item() == pytest.approx(0.64 / 3, rel=0.05)
    assert halfnormal.square().mean().item() == pytest.approx(0.64, rel=0.06)
    per_image = uniform.square().mean(dim=(1, 2, 3))
    assert per_image.std() > 0.15  # one deviation each; with a common one it would be 0.11
    assert not stage1(noise=0.0).draw_noise(latents).any()


def test_the_generators_loss_is_the_sum_of_its_parts():
    method = stage1(gan_scale=0.75)
    for _ in range(20):  # power iterations, so that the logits are of order one
        method.discriminator(batch()["image"])
    images, draws = batch()["image"], method.draw_augmentation(batch()["image"])
    noisy = method.encoder(images)
    out = method.generator_objective(images, noisy, draws)
    rebuilt = method.decoder(noisy)
    l1 = ((rebuilt + 1) / 2 - (images + 1) / 2).abs().mean()
    method.discriminator.eval()
    gan = -method.discriminator(augment(rebuilt, draws)).mean()
    wanted, found = (
        torch.autograd.grad(loss, method.decoder.out.weight, retain_graph=True)[0].norm() for loss in (l1, gan)
    )
    weight = wanted / (found + 1e-6)
    torch.testing.assert_close(out["gan_weight"], weight)
    torch.testing.assert_close(out["loss"], l1 + 0.75 * weight.detach() * gan)
    assert weight > 0.01


def test_a_perceptual_distance_is_added_and_shapes_the_adaptive_weight():
    method = stage1(perceptual_scale=2.0)
    method.perceptual = SquaredDistance()
    images = batch()["image"]
    draws, noisy = method.draw_augmentation(images), method.encoder(images)
    out = method.generator_objective(images, noisy, draws)
    rebuilt = method.decoder(noisy)
    distance = (rebuilt - images).square().mean()
    torch.testing.assert_close(out["perceptual"], distance.detach())
    rest = out["loss"] - 0.75 * out["gan_weight"] * out["gan"]
    torch.testing.assert_close(rest, out["l1"] + 2 * distance)


def test_the_discriminator_sees_rounded_noise_free_fakes_and_the_decoder_gets_no_gradient(monkeypatch):
    method, augmented = stage1(), []
    monkeypatch.setattr(pixlat.methods.rae.decoder, "augment", lambda images, draws: augmented.append(images) or images)
    modes = []
    method.discriminator.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    out = method("discriminator", batch(), 0)
    with torch.no_grad():
        rebuilt = method.decoder(method.encoder(batch()["image"]))
    torch.testing.assert_close(augmented[0], quantise(rebuilt))
    assert torch.equal(augmented[1], batch()["image"]) and modes == [True, True]
    out["loss"].backward()
    assert all(p.grad is None for p in method.decoder.parameters())
    assert all(p.grad is not None for p in method.discriminator.parameters())


def test_spectral_norms_stand_still_in_the_decoders_phase():
    method = stage1()
    before = {name: value.clone() for name, value in method.discriminator.state_dict().items()}
    method("generator", batch(), 0)["loss"].backward()
    assert all(torch.equal(value, before[name]) for name, value in method.discriminator.state_dict().items())
    method("discriminator", batch(), 0)
    assert any(not torch.equal(value, before[name]) for name, value in method.discriminator.state_dict().items())


def test_the_losses_start_when_they_are_told_to():
    method = stage1(discriminator_start=100, gan_start=200)
    assert method.phase_active("generator", 0) and not method.phase_active("discriminator", 99)
    method.begin_step(99)
    assert set(method("generator", batch(), 0)) == {"loss", "l1"}
    assert method.phase_active("discriminator", 100) and method.schedule_images("discriminator", 130) == 30
    assert method.schedule_images("generator", 130) == 130
    method.begin_step(199)
    assert "gan" not in method("generator", batch(), 0)
    method.begin_step(200)
    assert "gan" in method("generator", batch(), 0)


def test_without_a_discriminator_there_is_one_phase():
    method = stage1(discriminator="none")
    assert method.phases == ("generator",) and method.discriminator is None
    assert set(method("generator", batch(), 0)) == {"loss", "l1"}
    assert not [name for name in method.state_dict() if name.startswith("discriminator")]


def test_averages_follow_the_decoder_only_and_checkpoints_leave_frozen_networks_out():
    method = stage1()
    names = dict(method.named_parameters())
    assert method.averaged_parameters().keys() == {name for name in names if name.startswith("decoder.")}
    assert {name.split(".")[0] for name in state_without_external(method)} == {"decoder", "discriminator"}


def test_noise_is_for_training_the_decoder_only():
    method = stage1()
    images = batch()["image"]
    torch.testing.assert_close(method.encode(images), method.encoder(images))
    assert torch.equal(method.decode(method.encode(images)), method.decode(method.encode(images)))


class SquaredDistance(torch.nn.Module):
    """Stands in for a perceptual distance."""

    def forward(self, x, y):
        return (x - y).square().mean(dim=(1, 2, 3))


def test_training_resumes_bit_for_bit_with_late_losses_and_cached_latents(tmp_path):
    def fresh():
        method = stage1(discriminator_start=40, gan_start=80, remember=True)
        method.perceptual = SquaredDistance()
        return method

    config = settings(images=120, checkpoint_images=40)
    whole = fit(fresh(), tmp_path / "whole", config)
    with pytest.raises(Killed):
        fit(fresh(), tmp_path / "cut", config, stop_after=12)
    resumed = fit(fresh(), tmp_path / "cut", config)
    a, b = state_of(whole), state_of(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_remembered_latents_are_those_of_the_encoder_and_encoded_once():
    method, forgetful = stage1(remember=True), stage1()
    for step in range(2):
        seed_step(0, step, 0)
        remembered = method("generator", batch(), step)["loss"]
        seed_step(0, step, 0)
        assert torch.equal(remembered, forgetful("generator", batch(), step)["loss"])
    assert method.encoder.batches.count(1) == len(method.encoder.batches) and len(forgetful.encoder.batches) == 2
    seen = len(method.encoder.batches)
    method("discriminator", batch(), 2)
    assert len(method.encoder.batches) == seen


def test_the_discriminators_phase_takes_the_latents_of_the_generators():
    """Two micro-batches a step, as the trainer takes them: each is encoded once a step,
    and the losses are those of a second encoding.
    """
    config = {"discriminator_start": 8, "gan_start": 16}
    method, forgetful = stage1(**config), stage1(**config)
    for images_seen, encodings in ((0, 2), (8, 2), (16, 2)):
        method.begin_step(images_seen)
        forgetful.begin_step(images_seen)
        method.encoder.batches.clear()
        batches = [batch(seed=images_seen + j) for j in range(2)]
        for phase in (phase for phase in method.phases if method.phase_active(phase, images_seen)):
            for micro_batch in batches:
                seed_step(0, images_seen, 0)
                # a distributed wrapper makes a new dict of the same tensors
                loss = method(phase, dict(micro_batch), 0)["loss"]
                forgetful.latents_of_step.clear()
                seed_step(0, images_seen, 0)
                assert torch.equal(loss, forgetful(phase, micro_batch, 0)["loss"])
        assert len(method.encoder.batches) == encodings and not method.latents_of_step
    assert len(forgetful.encoder.batches) == 2 + 4 + 4


def test_latents_are_kept_only_where_the_discriminator_follows_and_for_one_step():
    method, data = stage1(discriminator_start=8, gan_start=8), batch()
    method("generator", data, 0)
    assert not method.latents_of_step
    method.begin_step(8)
    method("generator", data, 0)
    assert len(method.latents_of_step) == 1
    method.begin_step(16)
    assert not method.latents_of_step


# -- released files ----------------------------------------------------------------------------------------------------


def test_released_decoders_round_trip():
    decoder = filled().float()
    state = decoder_to_released(decoder.state_dict())
    loaded = decoder_from_released(state, decoder.state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in decoder.state_dict().items())


def test_released_names_are_the_published_ones():
    decoder = on_meta("xl")
    state = decoder_to_released(decoder.state_dict())
    expected = {
        "decoder_embed.weight": (1152, 768),
        "decoder_pos_embed": (1, 257, 1152),
        "trainable_cls_token": (1, 1, 1152),
    }
    expected |= {"decoder_norm.bias": (1152,), "decoder_pred.weight": (768, 1152)}
    expected |= {
        f"decoder_layers.27.attention.attention.{part}.weight": (1152, 1152) for part in ("query", "key", "value")
    }
    expected |= {
        "decoder_layers.0.attention.output.dense.bias": (1152,),
        "decoder_layers.0.intermediate.dense.weight": (4096, 1152),
    }
    expected |= {
        "decoder_layers.0.output.dense.weight": (1152, 4096),
        "decoder_layers.0.layernorm_before.weight": (1152,),
    }
    expected |= {"decoder_layers.0.layernorm_after.bias": (1152,)}
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert len(state) == 8 + 28 * 16


def test_training_checkpoints_give_their_averaged_decoder(tmp_path):
    decoder = filled().float()
    raw, averaged = (
        {f"module.decoder.{name}": tensor + shift for name, tensor in decoder_to_released(decoder.state_dict()).items()}
        for shift in (1.0, 0.0)
    )
    encoder = {"module.encoder.encoder.layer.weight": torch.zeros(2)}
    torch.save(
        {"step": 3, "model": raw | encoder, "ema": averaged | encoder, "disc": {"head": torch.zeros(2)}},
        tmp_path / "ep-last.pt",
    )
    loaded = decoder_from_released(read_released(tmp_path / "ep-last.pt", "decoder"), decoder.state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in decoder.state_dict().items())


def test_a_decoder_of_another_size_is_refused_with_its_size():
    state = decoder_to_released(on_meta("l").state_dict())
    with pytest.raises(UserError, match=r"the file's is size l for 768 latent channels"):
        decoder_from_released(state, on_meta("xl").state_dict())


def test_missing_and_unknown_names_are_refused():
    decoder = filled().float()
    state = decoder_to_released(decoder.state_dict())
    del state["decoder_norm.bias"]
    state["disc.head"] = torch.zeros(1)
    with pytest.raises(
        UserError, match=r"2 keys differ:\n  missing decoder_norm.bias \(16,\)\n  not known disc.head \(1,\)"
    ):
        decoder_from_released(state, decoder.state_dict())
    state = decoder_to_released(decoder.state_dict())
    state["decoder_pos_embed"] = state["decoder_pos_embed"].flip(1)
    with pytest.raises(UserError, match="another layout of tokens"):
        decoder_from_released(state, decoder.state_dict())


def test_a_released_decoder_loads_into_the_method_and_leaves_its_discriminator():
    source, method = stage1(), stage1()
    with torch.no_grad():
        for p in source.decoder.parameters():
            p.normal_()
    load_state_without_external(method, method.from_reference(decoder_to_released(source.decoder.state_dict())))
    assert torch.equal(method.decoder.out.weight, source.decoder.out.weight)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"model.discriminator_start=5: must not be after model.gan_start=4"):
        DecoderConfig(discriminator_start=5, gan_start=4)
    with pytest.raises(UserError, match=r"model.size='x'"):
        DecoderConfig(size="x")


def test_the_patch_follows_from_image_and_grid():
    assert build_decoder("demo", ToyEncoder(), INFO.image_size).patch == 2
    encoder = ToyEncoder()
    encoder.grid = lambda image_size: 3
    with pytest.raises(UserError, match=r"data.image_size=8: must be a multiple of 3, the number of tokens"):
        build_decoder("demo", encoder, 8)
