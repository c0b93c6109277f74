"""Chained stages through the launcher: an autoencoder run that a latent generator is built on."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from pixlat import methods
from pixlat.common.config.identity import run_folder
from pixlat.common.config.resolve import resolve
from pixlat.common.training.state import state_without_external
from pixlat.common.weights.runs import run_weights
from pixlat.evaluation.score.models import load_run
from pixlat.evaluation.score.origin import origin_of
from pixlat.launch.job.execute import run_all
from pixlat.methods import MethodSpec, Stage, get_spec
from pixlat.methods.base import Batch, DataInfo, Description, Method, Pretrained

PATCH = 4


@dataclass
class CodecConfig:
    """A linear autoencoder."""

    channels: int = 12


@dataclass
class LatentConfig:
    """A class-mean generator in the autoencoder's latents."""

    codec: str = "train"
    channels: int = 12


@dataclass
class NoSettings:
    """A sampler without settings."""


class Codec(Method):
    """Patches to latents and back."""

    task, space = "reconstruction", "latent_vae"

    def __init__(self, config: CodecConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.encoder = nn.Conv2d(data.channels, config.channels, PATCH, PATCH)
        self.decoder = nn.ConvTranspose2d(config.channels, data.channels, PATCH, PATCH)

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"loss": (self.decode(self.encode(batch["image"])) - batch["image"]).square().mean()}

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)

    def evaluations(self, config: NoSettings) -> int:
        return 0

    def sampling_networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    def describe(self, config: NoSettings) -> Description:
        return Description("x", "x", "none", 0)


class Latent(Method):
    """The mean latent of each class, decoded by the codec's run."""

    space = "latent_vae"
    external: ClassVar = {"codec": Pretrained("codec", "both")}

    def __init__(self, config: LatentConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.codec = Codec(CodecConfig(config.channels), data).requires_grad_(False)
        self.means = nn.Parameter(
            torch.zeros(data.num_classes, config.channels, data.image_size // PATCH, data.image_size // PATCH)
        )

    def load_external(self) -> None:
        self.codec.load_state_dict(run_weights(Path(self.config.codec)).state)

    def encode(self, images: Tensor) -> Tensor:
        return self.codec.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"loss": (self.encode(batch["image"]) - self.means[batch["label"]]).square().mean()}

    def sample(self, labels, noise, config) -> Tensor:
        return self.decode(self.means[labels] + 0.1 * noise.normal(*self.means.shape[1:]))

    def evaluations(self, config: NoSettings) -> int:
        return 1

    def sampling_networks(self) -> dict[str, nn.Module]:
        return {"decoder": self.codec.decoder}

    def describe(self, config: NoSettings) -> Description:
        return Description("x", "x", "class mean", 1)


PRESETS = """
demo:
  about: for tests
  data: {name: synthetic, image_size: 16}
  train: {images: 64, batch: 16, lr: 1e-2, ema_decay: [0.5], log_images: 32, checkpoint_images: 32, preview_images: 0}
  eval: {num_images: 0, grid_columns: 4}
"""


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Registers both toys; returns the command's overrides."""
    presets = tmp_path / "presets.yaml"
    presets.write_text(PRESETS)
    module = ModuleType("chained_toys")
    module.Codec, module.Latent = Codec, Latent
    module.CODEC = MethodSpec("toy_codec", "toy", "none", "chained_toys:Codec", CodecConfig, NoSettings, str(presets))
    module.LATENT = MethodSpec(
        "toy_latent",
        "toy",
        "none",
        "chained_toys:Latent",
        LatentConfig,
        NoSettings,
        str(presets),
        (Stage("codec", "toy_codec"),),
    )
    monkeypatch.setitem(sys.modules, "chained_toys", module)
    monkeypatch.setitem(methods.METHODS, "toy_codec", "chained_toys:CODEC")
    monkeypatch.setitem(methods.METHODS, "toy_latent", "chained_toys:LATENT")
    return {"method": "toy_latent", "out": str(tmp_path / "runs")}


def configured(overrides):
    return resolve(get_spec("toy_latent"), overrides)


def record(folder: Path):
    return json.loads((folder / "result.json").read_text())


def test_the_earlier_stage_is_trained_first_and_its_price_is_in_the_record(chain):
    run = configured(chain)
    assert run_all([run]) == 0
    latent = run_folder(run)
    (codec,) = [folder for folder in latent.parent.iterdir() if folder.name.startswith("toy_codec")]
    (parent,) = record(latent)["parents"]
    earlier = record(codec)
    assert parent["key"] == "codec" and parent["name"] == codec.name and parent["row_id"] == earlier["row_id"]
    assert parent["checkpoint_sha256"] == earlier["checkpoint"]["sha256"]
    assert parent["macs_total"] == earlier["train"]["macs_total"] > 0 and parent["images_seen"] == 64
    assert record(codec)["parents"] == []
    assert {"samples.png", "reconstruction.png", "neighbours.png", "stages.json"} <= {
        path.name for path in latent.iterdir()
    }
    assert (codec / "reconstruction.png").exists() and not (codec / "samples.png").exists()


def test_the_average_of_the_earlier_run_is_loaded_and_not_kept_again(chain):
    run = configured(chain)
    run_all([run])
    codec = next(folder for folder in Path(chain["out"]).iterdir() if folder.name.startswith("toy_codec"))
    averaged, raw = run_weights(codec), run_weights(codec, "raw")
    assert not torch.equal(averaged.state["encoder.weight"], raw.state["encoder.weight"])
    state = run_weights(run_folder(run)).state
    assert set(state) == {"means"}
    method = Latent(LatentConfig(str(codec)), DataInfo("synthetic", 10, 16, 1))
    method.load_external()
    assert torch.equal(method.codec.encoder.weight, averaged.state["encoder.weight"])
    assert set(state_without_external(method)) == {"means"} and not method.train().codec.training


def test_a_finished_chain_is_not_trained_again(chain, capsys):
    run = configured(chain)
    run_all([run])
    before = {path: path.stat().st_mtime_ns for path in Path(chain["out"]).rglob("*") if path.is_file()}
    assert run_all([run]) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in Path(chain["out"]).rglob("*") if path.is_file()}


def test_another_earlier_checkpoint_is_refused(chain, capsys):
    run = configured({**chain, "train.images": "32"})
    run_all([run])
    latent = run_folder(run)
    (latent / "result.json").unlink()
    codec = next(folder for folder in latent.parent.iterdir() if folder.name.startswith("toy_codec"))
    shutil.rmtree(codec / "checkpoints" / "step-00000004")
    assert run_all([run]) == 2
    assert "was built on another checkpoint of model.codec" in capsys.readouterr().err


def test_seeds_and_evaluations_of_a_chain_have_one_configuration(chain):
    """The earlier run counts by its own configuration, whether `train` or its folder names it."""
    first, second = (configured({**chain, "seed": seed}) for seed in ("0", "1"))
    assert run_all([first, second]) == 0
    one, two = (record(run_folder(run)) for run in (first, second))
    assert one["config"] == two["config"] and one["config"]["settings"] == {}
    assert one["parents"][0]["config"] == two["parents"][0]["config"]
    assert one["parents"][0]["checkpoint_sha256"] != two["parents"][0]["checkpoint_sha256"]
    evaluated = origin_of(load_run(run_folder(first), {}, None, torch.device("cpu")))
    assert evaluated.config == one["config"] and evaluated.parents == one["parents"]
    raw = origin_of(load_run(run_folder(first), {}, "raw", torch.device("cpu"))).config
    assert raw["digest"] != one["config"]["digest"] and raw["settings"] == {"eval.ema": "raw"}
    codec = run_folder(first).parent / one["parents"][0]["name"]
    named = configured({**chain, "model.codec": str(codec), "seed": "2"})
    assert run_all([named]) == 0
    assert record(run_folder(named))["config"]["digest"] == one["config"]["digest"]


def test_a_stage_without_that_preset_says_how_to_go_on(chain, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(PRESETS.replace("demo:", "big:"))
    sys.modules["chained_toys"].CODEC = MethodSpec(
        "toy_codec", "toy", "none", "chained_toys:Codec", CodecConfig, NoSettings, str(other)
    )
    assert run_all([configured(chain)]) == 2
    message = capsys.readouterr().err
    assert "no preset 'demo'" in message and "give its run folder as model.codec" in message
    assert not Path(chain["out"]).exists()


def test_a_dry_run_describes_both_stages_and_writes_nothing(chain, capsys):
    assert run_all([configured({**chain, "dry_run": "true"})]) == 0
    told = capsys.readouterr().out
    folders = [line for line in told.splitlines() if line.startswith("folder ")]
    assert ["toy_codec" in folders[0], "toy_latent" in folders[1]] == [True, True] and not Path(chain["out"]).exists()
