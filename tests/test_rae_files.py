"""RAE's files of other projects: diffusers' AutoencoderRAE, written and read and compared with diffusers itself,
and the DINO discriminator.
"""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from rae_models import INFO

import pixlat.methods.rae.decoder
from pixlat.common.errors import UserError
from pixlat.common.frozen.encoders import EmbeddedEncoder
from pixlat.common.frozen.encoders_transformers import HUB_ENCODERS, TransformersEncoder, _classes
from pixlat.methods.base import DataInfo
from pixlat.methods.rae import diffusers_layout
from pixlat.methods.rae.config import DECODERS, DecoderConfig, DecoderShape, RaeConfig
from pixlat.methods.rae.decoder import DecoderMethod, build_decoder
from pixlat.methods.rae.discriminator import DinoFeatures, build_discriminator
from pixlat.methods.rae.method import RaeMethod

SHAPE = DecoderShape(24, 2, 2, 40)
SIZE = 256  # 16 x 16 tokens, the only grid at which diffusers' positions are right
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return module


def small_encoder(name):
    """An encoder of the family with one narrow layer and random weights, as if loaded."""
    pytest.importorskip("transformers")
    spec = HUB_ENCODERS[name]
    encoder = TransformersEncoder(name, dataclasses.replace(spec, config=spec.config | SMALL))
    encoder.network = (
        randomised(encoder._without_affine(_classes(spec.family)[1](encoder.config))).requires_grad_(False).eval()
    )
    return encoder


@pytest.fixture
def pair(monkeypatch):
    """A DINOv2 encoder and a decoder of its tokens, both tiny."""
    monkeypatch.setitem(DECODERS, "demo", SHAPE)
    encoder = small_encoder("dinov2-reg-b")
    return encoder, randomised(build_decoder("demo", encoder, SIZE)).eval()


@pytest.mark.parametrize("name", ["dinov2-reg-b", "mae-b"])  # under transformers 5 diffusers cannot build SigLIP2
def test_diffusers_computes_the_same_from_what_we_write(name, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setitem(DECODERS, "demo", SHAPE)
    encoder = small_encoder(name)
    decoder = randomised(build_decoder("demo", encoder, SIZE)).eval()
    torch.manual_seed(0)
    mean, variance = torch.randn(64, 16, 16), torch.rand(64, 16, 16) + 0.1
    diffusers_layout.write(tmp_path, decoder, encoder, (mean, variance))
    theirs = diffusers.AutoencoderRAE.from_pretrained(tmp_path).eval()
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        tokens = encoder(2 * images - 1)
        latents = (tokens - mean) / (variance + 1e-5).sqrt()
        # They add 1e-5 to the deviation once more: up to 3e-5 of a latent here.
        torch.testing.assert_close(theirs.encode(images).latent, latents, atol=3e-4, rtol=1e-4)
        torch.testing.assert_close(theirs.decode(latents).sample, (decoder(tokens) + 1) / 2, atol=1e-5, rtol=1e-5)


def test_what_diffusers_writes_is_read_back(pair, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    encoder, decoder = pair
    diffusers_layout.write(
        tmp_path / "ours", decoder, encoder, (torch.zeros(64, 16, 16), torch.full((64, 16, 16), 3.0))
    )
    diffusers.AutoencoderRAE.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    state = diffusers_layout.read_decoder(tmp_path / "theirs")
    loaded = pixlat.methods.rae.decoder.decoder_from_released(state, decoder.state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in decoder.state_dict().items())
    mean, variance = diffusers_layout.read_latent_statistics(tmp_path / "theirs")
    assert not mean.any()
    torch.testing.assert_close(variance, torch.full((64, 16, 16), 3.0))


def test_stage_two_takes_decoder_and_statistics_from_the_layout(pair, tmp_path, monkeypatch):
    encoder, decoder = pair
    variance = torch.rand(64, 16, 16) + 0.5
    diffusers_layout.write(tmp_path, decoder, encoder, (torch.ones(64, 16, 16), variance))
    monkeypatch.setattr(encoder, "load", lambda: None)
    monkeypatch.setattr(pixlat.methods.rae.method, "build_encoder", lambda name, weights: encoder)
    network = {"width": 16, "depth": 1, "heads": 2, "head_depth": 0}
    method = RaeMethod(
        RaeConfig(decoder=str(tmp_path), decoder_size="demo", statistics=str(tmp_path), **network),
        DataInfo("x", 3, SIZE, 10),
    )
    method.load_external()
    assert torch.equal(method.decoder.out.weight, decoder.out.weight) and (method.latent_mean == 1).all()
    torch.testing.assert_close(method.latent_var, variance)
    assert len(method.digests["decoder"]) == 64


def test_latents_that_are_not_normalised_have_no_statistics_in_the_layout(pair, tmp_path):
    encoder, decoder = pair
    diffusers_layout.write(tmp_path, decoder, encoder)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (
        config["latents_mean"] is config["latents_std"] is None
        and config["encoder_input_size"] == 224
        and config["image_size"] == SIZE
    )
    mean, variance = diffusers_layout.read_latent_statistics(tmp_path)
    assert not mean.any() and (variance + 1e-5).sqrt().item() == pytest.approx(1, abs=1e-7)


def test_the_layout_refuses_what_it_cannot_hold_and_what_is_there(pair, tmp_path):
    encoder, decoder = pair
    with pytest.raises(UserError, match="no encoder like embedded"):
        diffusers_layout.write(tmp_path, decoder, EmbeddedEncoder())
    diffusers_layout.write(tmp_path, decoder, encoder)
    with pytest.raises(UserError, match="already holds a model"):
        diffusers_layout.write(tmp_path, decoder, encoder)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match="neither a run folder"):
        diffusers_layout.read_decoder(tmp_path)


# -- the discriminator -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """The features with random weights from a file laid out as the released one."""
    features = DinoFeatures(None)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in features.network.state_dict().items()
    }
    state = {
        name: tensor + 1 if "norm" in name and name.endswith("weight") else tensor for name, tensor in state.items()
    }
    file = tmp_path_factory.mktemp("dino") / "dino_vit_small_patch8_224.pth"
    torch.save(state | {"head.weight": torch.zeros(1000, 384), "head.bias": torch.zeros(1000)}, file)
    features = DinoFeatures(str(file))
    features.load()
    return features, state


def plain_taps(state, images):
    """DINO's blocks written down: the outputs of blocks 2, 5, 8 and 11, without the class token."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (384,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = (F.interpolate((images + 1) / 2, size=(224, 224), mode="bilinear", align_corners=False) - mean) / std
    x = (
        F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
        .flatten(2)
        .transpose(1, 2)
    )
    x = torch.cat((state["cls_token"].expand(len(x), -1, -1), x), 1) + state["pos_embed"]
    taps = []
    for i in range(12):
        q, k, v = (
            linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
            .unflatten(-1, (3, 6, 64))
            .permute(2, 0, 3, 1, 4)
        )
        k = k - state[f"blocks.{i}.attn.qkv.bias"][384:768].view(6, 1, 64)
        mixed = (q @ k.transpose(2, 3) / 8).softmax(-1) @ v
        x = x + linear(f"blocks.{i}.attn.proj", mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x)), approximate="tanh")
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
        if i in (2, 5, 8, 11):
            taps.append(x[:, 1:].transpose(1, 2))
    return taps


def test_the_frozen_dino_computes_what_the_specification_says(dino):
    features, state = dino
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        maps, taps = features(images), plain_taps(state, images)
    assert [tuple(m.shape) for m in maps] == [(1, 384, 784)] * 5
    assert torch.equal(maps[0], maps[4])
    for ours, expected in zip(maps[1:], taps, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-4)  # twelve layers of values up to tens
    assert sum(p.numel() for p in features.parameters()) == 21_670_272 and not any(
        p.requires_grad for p in features.parameters()
    )


def test_the_published_discriminator_has_five_heads_and_hides_its_features():
    with torch.device("meta"):
        network = build_discriminator("dino", None)
        logits = network(torch.zeros(2, 3, SIZE, SIZE))
    assert logits.shape == (2, 3920)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 7_386_245
    with torch.device("meta"):
        method = DecoderMethod(DecoderConfig(encoder="embedded", size="demo"), INFO)
    assert tuple(method.external) == ("encoder", "perceptual", "discriminator.features")


def test_missing_dino_weights_name_their_repository(tmp_path):
    with pytest.raises(UserError, match=r"discs/dino_vit_small_patch8_224.pth of nyu-visionx/RAE-collections"):
        DinoFeatures(str(tmp_path)).load()
