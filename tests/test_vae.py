"""The KL autoencoder: its networks, the terms of its loss, its phases,
and the tokenizer that ships with the package.
"""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT

from pixlat.common.accounting.macs import empty_batch, on_meta
from pixlat.common.config.identity import run_folder
from pixlat.common.config.resolve import load_presets, resolve
from pixlat.common.datasets.batches import TrainingPlan
from pixlat.common.datasets.load import load_data, summarise
from pixlat.common.errors import UserError
from pixlat.common.frozen.tokenizer import EMBEDDED, build_tokenizer, read_autoencoder_card
from pixlat.common.layers.autoencoder import Decoder, Encoder
from pixlat.common.seeds import seed_step
from pixlat.common.weights.runs import run_weights
from pixlat.launch.job.budget import macs_of
from pixlat.launch.job.execute import run_one
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo
from pixlat.methods.vae.config import SPEC, VaeConfig
from pixlat.methods.vae.method import VaeMethod, gaussian_kl

INFO = DataInfo("toy", num_classes=3, image_size=16, num_train=40)
SMALL = {"widths": [8, 16], "depth": 1, "latent_channels": 3, "perceptual": "none"}


def make(**config) -> VaeMethod:
    torch.manual_seed(0)
    return VaeMethod(VaeConfig(**{**SMALL, **config}), INFO)


def batch(size: int = 4) -> dict[str, torch.Tensor]:
    filled = empty_batch(INFO, size, "cpu")
    filled["image"].uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    return filled


# -- the networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "stem", "factor"), [([8], 1, 1), ([8, 16], 2, 4), ([8, 16, 24], 2, 8), ([16], 4, 4)]
)
def test_shapes(widths, stem, factor):
    assert VaeConfig(widths=widths, stem=stem).factor == factor
    images = torch.randn(2, 3, 16, 16)
    mean, std = Encoder(widths, stem, 1, 5)(images)
    assert mean.shape == std.shape == (2, 5, 16 // factor, 16 // factor) and (std > 0).all()
    assert Decoder(widths, stem, 1, 5)(mean).shape == images.shape


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_kl_against_torch():
    mean, std = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) + 0.1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(gaussian_kl(mean, std), expected, atol=1e-5, rtol=1e-5)


def test_terms_of_the_loss():
    method = make(kl=0.25).eval()
    x = batch()["image"]
    mean, std = method.encoder(x)
    z = mean + std
    out = method.objective(x, z, mean, std, None)
    l1 = (method.decoder(z) - x).abs().mean()
    kl = gaussian_kl(mean, std).flatten(1).sum(dim=1).mean() / (3 * 16 * 16)
    assert out.keys() == {"loss", "l1", "kl"}
    assert out["loss"].item() == pytest.approx((l1 + 0.25 * kl).item(), rel=1e-5)


def test_perceptual_term_is_added():
    method = make(perceptual="embedded", perceptual_weight=0.5)
    method.load_external()
    seed_step(0, 0, 0)
    out = method("autoencoder", batch(2), 0)
    assert out["perceptual"] > 0
    assert out["loss"].item() == pytest.approx(
        (out["l1"] + 1e-3 * out["kl"] + 0.5 * out["perceptual"]).item(), rel=1e-5
    )
    assert not [name for name in method.averaged_parameters() if name.startswith("perceptual")]
    assert {id(p) for p in method.parameters_of("autoencoder")[0].params} == {
        id(p) for p in method.averaged_parameters().values()
    }


def test_forward_draws_from_the_posterior():
    method = make()
    losses = []
    for seed in (1, 1, 2):
        seed_step(seed, 0, 0)
        losses.append(method("autoencoder", batch(), 0)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_running_moments_follow_the_latents():
    method = make()
    for _ in range(2000):
        with torch.no_grad():
            method.follow(torch.full((2, 3, 4, 4), 2.0), torch.full((2, 3, 4, 4), 0.5))
    torch.testing.assert_close(method.latent_mean, torch.full((3,), 2.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(method.latent_square, torch.full((3,), 4.25), atol=1e-3, rtol=0)
    before = method.latent_mean.clone()
    method.eval()("autoencoder", batch(), 0)
    assert torch.equal(method.latent_mean, before)
    method.train()("autoencoder", batch(), 0)
    assert not torch.equal(method.latent_mean, before)


def test_a_finished_run_has_the_moments_of_the_averages_encoder(tmp_path):
    """After eight steps the running moments are still nearly their 0 and 1, and they are those of the raw encoder."""
    keys = {
        "data.name": "synthetic",
        "data.image_size": "16",
        "model.widths": "[8]",
        "model.depth": "1",
        "model.latent_channels": "3",
        "train.batch": "8",
    }
    keys |= {
        "model.perceptual": "none",
        "train.images": "64",
        "train.lr": "1e-2",
        "train.warmup_images": "0",
        "train.ema_decay": "[0.5]",
    }
    run = resolve(
        SPEC, {"method": "vae", **keys, "eval.num_images": "0", "train.preview_images": "0", "out": str(tmp_path)}
    )
    run_one(run)
    weights = run_weights(run_folder(run))
    method = VaeMethod(run.model, DataInfo("synthetic", 10, 16, 1))
    method.load_state_dict(weights.state)
    source = load_data(run.data)
    plan = TrainingPlan(source.train.labels, 8, run.seed, source.balanced, run.data.flip)
    count = len(source.train)
    indices = np.concatenate([plan.indices(8 + step)[0] for step in range(-(-count // 8))])[:count]
    with torch.no_grad():
        mean, std = method.encoder(torch.from_numpy(source.train.fetch(indices)).float() / 127.5 - 1)
    square = (mean.square() + std.square()).mean(dim=(0, 2, 3))
    torch.testing.assert_close(method.latent_mean, mean.mean(dim=(0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(method.latent_square, square, atol=1e-5, rtol=1e-4)
    tokenizer = build_tokenizer(str(run_folder(run)))
    tokenizer.load()
    normalised = tokenizer.normalise(mean + std * torch.randn_like(mean))
    torch.testing.assert_close(normalised.std(dim=(0, 2, 3)), torch.ones(3), atol=0.05, rtol=0)


# -- the discriminator -------------------------------------------------------------------------------------------------


def test_without_a_discriminator_there_is_one_phase():
    assert make().phases == ("autoencoder",) and make(adversarial=0.5).phases == VaeMethod.phases


def test_the_discriminator_starts_late():
    method = make(adversarial=0.5, adversarial_start=100, discriminator_widths=[8, 16])
    assert not method.phase_active("discriminator", 99) and method.phase_active("autoencoder", 99)
    assert "adversarial" not in method("autoencoder", batch(), 0)
    assert method.phase_active("discriminator", 100) and method.schedule_images("discriminator", 130) == 30
    method.begin_step(100)
    assert "adversarial" in method("autoencoder", batch(), 0)


def test_each_phase_trains_its_own_network():
    method = make(adversarial=0.5, discriminator_widths=[8, 16])
    names = dict(method.named_parameters())
    owned = {phase: {id(p) for group in method.parameters_of(phase) for p in group.params} for phase in method.phases}
    assert owned["discriminator"] == {id(p) for name, p in names.items() if name.startswith("discriminator.")}
    assert owned["autoencoder"].isdisjoint(owned["discriminator"])
    method("discriminator", batch(), 0)["loss"].backward()
    assert all(p.grad is None for name, p in names.items() if not name.startswith("discriminator."))


def test_the_encoder_keeps_no_graph_for_the_discriminator():
    method = make(adversarial=0.5, discriminator_widths=[8, 16])
    outputs = []
    method.encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output[0].requires_grad))
    for phase in method.phases:
        method(phase, batch(), 0)
    assert outputs == [True, False]


def test_adversarial_term_pulls_with_its_share():
    """On the last layer the weighted adversarial gradient has `adversarial` times the norm of the rest."""
    method = make(adversarial=0.3, discriminator_widths=[8, 16])
    last = method.decoder.last.weight

    def gradient(share: float) -> torch.Tensor:
        method.config.adversarial = share
        seed_step(0, 0, 0)
        return torch.autograd.grad(method("autoencoder", batch(), 0)["loss"], last)[0]

    rest = gradient(0.0)
    # 1e-6 is added to a norm of about 1e-2
    assert (gradient(0.3) - rest).norm().item() == pytest.approx(0.3 * rest.norm().item(), rel=1e-3)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"widths": []}, "at least one level"),
        ({"widths": [12]}, "multiple of 8"),
        ({"kl": -1.0}, "0 or more"),
        ({"perceptual": "vgg"}, "not one of"),
    ],
)
def test_impossible_settings(setting, message):
    with pytest.raises(UserError, match=message):
        VaeConfig(**{**SMALL, **setting})


def test_image_size_must_fit():
    with pytest.raises(UserError, match="multiple of the model's 8 pixels"):
        on_meta(VaeMethod, VaeConfig(widths=[8, 8, 8]), DataInfo("x", 2, 20, 5))


def test_presets_resolve():
    for name in load_presets(SPEC.presets):
        run = resolve(get_spec("vae"), {"method": "vae", "preset": name})
        assert isinstance(run.model, VaeConfig)


# -- the tokenizer in the package --------------------------------------------------------------------------------------


def test_embedded_tokenizer_is_small():
    assert EMBEDDED.stat().st_size == read_autoencoder_card()["bytes"] <= 4 * 2**20
    assert str(EMBEDDED.relative_to(ROOT)) == "common/data/autoencoder32.safetensors"


def test_embedded_tokenizer_is_of_the_preset():
    card = read_autoencoder_card()
    run = resolve(get_spec("vae"), {"method": "vae", "preset": "demo"})
    assert card["model"] == {name: getattr(run.model, name) for name in card["model"]}
    assert {key: card["train"][key] for key in ("images", "batch", "lr")} == {
        key: getattr(run.train, key) for key in ("images", "batch", "lr")
    }


def test_embedded_tokenizer_tells_what_its_training_costs():
    """As the suite counts its preset today, and which network of others took part."""
    card, run = read_autoencoder_card(), resolve(get_spec("vae"), {"method": "vae", "preset": "demo"})
    assert card["images_seen"] == run.train.images and card["macs_total"] == macs_of(run)(run.train.images)
    assert [part["role"] for part in card["pretrained_components"]] == ["perceptual loss"]
    method = get_class("vae")(run.model, DataInfo.of(summarise(run.data)))
    assert card["pretrained_components"][0]["params"] == method.describe(run.sample).pretrained[0].params


def test_embedded_tokenizer_rebuilds_held_out_emoji():
    """At least 24 dB on average over held-out images; the card's figure is reproduced;
    normalised latents have variance 1.
    """
    tokenizer = build_tokenizer("embedded")
    tokenizer.load()
    images = load_data(resolve(get_spec("vae"), {"method": "vae"}).data).heldout
    pixels = torch.from_numpy(images.fetch(range(len(images)))).float() / 127.5 - 1
    mean, std = tokenizer.encode_moments(pixels)
    latents = tokenizer.normalise(mean)
    rebuilt = tokenizer.decode(latents).clamp(-1, 1)
    psnr = (-10 * ((rebuilt - pixels) / 2).square().mean(dim=(1, 2, 3)).log10()).mean().item()
    assert psnr >= 24 and psnr == pytest.approx(read_autoencoder_card()["psnr_heldout"], abs=0.01)
    variance = latents.var(dim=(0, 2, 3)) + (std * tokenizer.scale).square().mean(dim=(0, 2, 3))
    # held-out images are not the training images
    torch.testing.assert_close(variance, torch.ones(tokenizer.channels), atol=0.1, rtol=0)
    assert math.prod(latents.shape[1:]) < 0.5 * 3 * 32 * 32


def test_embedded_weights_are_checked(tmp_path, monkeypatch):
    damaged = tmp_path / "weights.safetensors"
    damaged.write_bytes(EMBEDDED.read_bytes()[:-4] + b"0000")
    monkeypatch.setattr("pixlat.common.frozen.tokenizer.EMBEDDED", damaged)
    with pytest.raises(UserError, match="Reinstall the package"):
        build_tokenizer("embedded").load()
