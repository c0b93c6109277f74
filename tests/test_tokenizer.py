"""Stable Diffusion's autoencoder behind the tokenizer's interface, and tokenizers from run folders."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from pixlat.common.accounting.macs import count_macs
from pixlat.common.errors import UserError
from pixlat.common.frozen import tokenizer
from pixlat.common.frozen.export_tokenizer import export_tokenizer
from pixlat.common.frozen.tokenizer import SD_CONFIG, SdTokenizer, build_tokenizer
from pixlat.common.layers.autoencoder import Decoder, Encoder
from pixlat.common.weights import checkpoint
from pixlat.common.weights.checkpoint import Checkpoint
from pixlat.launch import prepare

TINY_SD = SD_CONFIG | {"block_out_channels": (32, 32, 32, 32), "norm_num_groups": 8, "layers_per_block": 1}


def numel(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def sd():
    with torch.device("meta"):
        return SdTokenizer("sd-ft-ema")


def test_sizes_of_stable_diffusions_autoencoder(sd):
    """Published counts leave out the 1 x 1 convolutions around the latents: 72 and 20 numbers."""
    assert numel(sd) == 83_653_863 and numel(sd.encoder) == 34_163_592 + 72 and numel(sd.decoder) == 49_490_179 + 20
    assert (sd.channels, sd.factor) == (4, 8)


@pytest.mark.parametrize(
    ("part", "shape", "gmacs"),
    [("decoder", (4, 32, 32), 311.09), ("encoder", (3, 256, 256), 136.4), ("decoder", (4, 64, 64), 1257.3)],
)
def test_macs_of_stable_diffusions_autoencoder(sd, part, shape, gmacs):
    inputs = torch.zeros(1, *shape, device="meta")
    assert count_macs(lambda: getattr(sd, part)(inputs)) / 1e9 == pytest.approx(gmacs, rel=5e-4)


@pytest.mark.parametrize("old_names", [False, True])
def test_weights_load_and_agree_with_diffusers(tmp_path, old_names):
    """The released files have the names of diffusers' attention before 2023."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    theirs = AutoencoderKL(**TINY_SD).eval()
    state = dict(theirs.state_dict())
    if old_names:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value for key, value in state.items()}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / tokenizer.SD_FILE)
    ours = SdTokenizer("sd-ft-mse", str(tmp_path), TINY_SD)
    ours.load()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, std = ours.encode_moments(images)
        assert torch.equal(mean, posterior.mean) and torch.equal(std, posterior.std)
        latents = ours.normalise(mean)
        torch.testing.assert_close(latents, 0.18215 * posterior.mean)
        torch.testing.assert_close(ours.decode(latents), theirs.decode(posterior.mean).sample, atol=1e-5, rtol=1e-5)
    assert ours.sha256 == checkpoint.sha256_of(tmp_path / tokenizer.SD_FILE)


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"stabilityai/sd-vae-ft-ema.*model\.tokenizer_path"):
        SdTokenizer("sd-ft-ema", None, TINY_SD).load()


# -- run folders -------------------------------------------------------------------------------------------------------

SHAPE = {"widths": [8, 16], "stem": 2, "depth": 1, "latent_channels": 3}


@pytest.fixture
def run_folder(tmp_path):
    """What a finished autoencoder run leaves, with an average that differs from the raw weights."""
    torch.manual_seed(0)
    networks = {"encoder": Encoder(**SHAPE), "decoder": Decoder(**SHAPE)}
    raw = {f"{part}.{key}": value for part, network in networks.items() for key, value in network.state_dict().items()}
    ema = {key: value + 0.01 for key, value in raw.items()}
    moments = {"latent_mean": torch.tensor([0.5, 0.0, -1.0]), "latent_square": torch.tensor([4.25, 1.0, 1.25])}
    tensors = {"model": raw | moments | {"discriminator.out.bias": torch.zeros(1)}, "ema-0.998": ema}
    checkpoint.save(tmp_path / "checkpoints", 5, Checkpoint(tensors, {}), keep=1)
    config = {
        "method": "autoencoder",
        "model": SHAPE | {"kl": 0.1},
        "train": {"ema_decay": [0.998], "ema_halflife_images": []},
        "eval": {"ema": None},
        "data": {"name": "synthetic", "image_size": 16},
        "seed": 0,
    }
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    return tmp_path, ema


def test_tokenizer_of_a_run(run_folder):
    folder, ema = run_folder
    built = build_tokenizer(str(folder))
    assert (built.channels, built.factor) == (3, 4)
    built.load()
    for key, value in ema.items():
        assert torch.equal(built.state_dict()[key], value), key
    torch.testing.assert_close(built.shift.flatten(), torch.tensor([0.5, 0.0, -1.0]))
    torch.testing.assert_close(built.scale.flatten(), torch.tensor([0.5, 1.0, 2.0]))
    z = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(built.decode(built.normalise(z)), built.decoder(z), atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in built.parameters()) and built.sha256


def test_export(run_folder, tmp_path):
    folder, ema = run_folder
    trained = {"images_seen": 64, "macs_total": 12_345, "device_seconds": 1.5, "batch": 8}
    record = {"row_id": "ab" * 32, "train": trained, "pretrained_components": [{"name": "embedded"}]}
    card = export_tokenizer(folder, tmp_path / "small.safetensors", record)
    assert json.loads((tmp_path / "small.json").read_text()) == card
    assert card["bytes"] < 0.6 * 4 * sum(value.numel() for value in ema.values()) and card["model"] == SHAPE | {
        "kl": 0.1
    }
    assert len(card["latent_mean"]) == len(card["latent_std"]) == 3 and card["psnr_heldout"] > 0
    assert (card["macs_total"], card["images_seen"], card["device_seconds"]) == (12_345, 64, 1.5)
    assert card["row_id"] == record["row_id"] and card["pretrained_components"] == record["pretrained_components"]


def test_a_tokenizer_without_the_record_of_its_training_is_not_exported(run_folder, tmp_path, capsys):
    """Its cost would be in no generator's row."""
    folder, _ = run_folder
    assert prepare.main(["tokenizer", f"from={folder}", f"to={tmp_path / 'small.safetensors'}"]) == 2
    assert (
        "the cost of its training is not known" in capsys.readouterr().err
        and not (tmp_path / "small.safetensors").exists()
    )


def test_unknown_tokenizers(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'sd-ft-ema'"):
        build_tokenizer("sd-ft-em")
    (tmp_path / "config.yaml").write_text("model: {depth: 3}\n")
    with pytest.raises(UserError, match="is not the run folder of an autoencoder"):
        build_tokenizer(str(tmp_path))


def test_a_stage_that_is_not_trained_yet_has_the_embedded_shape():
    waiting, embedded = build_tokenizer("train"), build_tokenizer("embedded")
    assert (waiting.channels, waiting.factor) == (embedded.channels, embedded.factor)
