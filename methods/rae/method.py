"""Stage 2: flow matching of normalised latents (arXiv 2510.11690, sections 4 and 5).

As everywhere in `common/` and in the released code, t = 1 is noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of
from pixlat.common.frozen.encoders import build_encoder
from pixlat.common.frozen.remember import FeatureTable
from pixlat.common.layers.transformer import drop_labels
from pixlat.common.maths import flow
from pixlat.common.maths.guidance import classifier_free
from pixlat.common.maths.samplers import euler
from pixlat.common.seeds import Noise
from pixlat.common.weights.runs import RunWeights, run_weights
from pixlat.common.weights.tensors import load_strictly
from pixlat.methods.base import Batch, DataInfo, Description, Method, Pretrained, guidance_facts
from pixlat.methods.rae import diffusers_layout
from pixlat.methods.rae.config import RaeConfig, RaeSample
from pixlat.methods.rae.decoder import build_decoder
from pixlat.methods.rae.network import LatentDiT
from pixlat.methods.rae.reference import decoder_from_released, network_from_released, read_released
from pixlat.methods.rae.statistics import KINDS, denormalise, measure, normalise, read_statistics

LARGEST_TIME = 0.999  # largest time in training, before the shift
SMALLEST_TIME = 1e-3  # last time of the official sampler, before the shift


class RaeMethod(Method):
    """Predicts the velocity of latents between a frozen encoder and a frozen decoder.

    Times are shifted; the shift depends on the size of a latent.
    """

    space = "latent_rae"
    latent_mean: Tensor
    latent_var: Tensor

    def __init__(self, config: RaeConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.encoder = build_encoder(config.encoder, config.encoder_weights)
        self.decoder = build_decoder(config.decoder_size, self.encoder, data.image_size).requires_grad_(False)
        channels, grid = self.encoder.channels, self.encoder.grid(data.image_size)
        self.latent_shape = (channels, grid, grid)
        self.network = LatentDiT(config.shape, channels, grid, data.num_classes, xavier=config.init == "xavier")
        self.guide = (
            LatentDiT(config.guide_shape, channels, grid, data.num_classes).requires_grad_(False)
            if config.guide
            else None
        )
        external = {"encoder": Pretrained("encoder", "train"), "decoder": Pretrained("tokenizer", "sample", "decoder")}
        self.external = external | ({"guide": Pretrained("guide", "sample", "guide")} if config.guide else {})
        self.register_buffer("latent_mean", torch.zeros(self.latent_shape))
        self.register_buffer("latent_var", torch.ones(self.latent_shape))
        self.shift = (self.latent_mean.numel() / config.shift_base) ** 0.5 if config.shift_base else 1.0
        self.latents_of = FeatureTable(lambda images: (self.encoder(images),), data.num_train if config.remember else 0)
        self.digests: dict[str, str] = {}  # SHA-256 of the files of decoder and guide

    # -- weights that come from elsewhere ------------------------------------------------------------------------------

    def load_external(self) -> None:
        self.encoder.load()
        self.load_decoder(Path(self.config.decoder))
        if self.config.statistics not in KINDS:
            path = Path(self.config.statistics)
            self.set_statistics(
                *(
                    diffusers_layout.read_latent_statistics(path)
                    if path.is_dir()
                    else read_statistics(path, self.latent_shape)
                )
            )
        if self.guide is not None:
            self.load_guide(self.guide, Path(self.config.guide))

    def load_decoder(self, path: Path) -> None:
        """Loads the decoder from a run folder of stage 1, a released file or a folder of diffusers' AutoencoderRAE.

        From a run it takes the averaged weights that were evaluated.
        """
        if not path.exists():
            raise UserError(
                f"model.decoder={str(path)!r} does not exist. Give a run folder of stage 1 or a released decoder, "
                "or model.decoder=train to train one first."
            )
        if (path / "config.yaml").exists():
            run = run_weights(path)
            self.check_run("decoder", run, {"encoder": "encoder", "size": "decoder_size"})
            load_strictly(self.decoder, part_of(run.state, "decoder"), path)
            self.digests["decoder"] = run.sha256
        else:
            file = path / diffusers_layout.WEIGHTS if path.is_dir() else path
            state = diffusers_layout.read_decoder(path) if path.is_dir() else read_released(path, "decoder")
            load_strictly(self.decoder, decoder_from_released(state, self.decoder.state_dict()), path)
            self.digests["decoder"] = sha256_of(file)

    def load_guide(self, guide: LatentDiT, path: Path) -> None:
        """Loads the guide from a run folder or a released file.

        From a run it also takes the latent statistics, because both models must use the same normalisation.
        """
        if (path / "config.yaml").exists():
            run = run_weights(path)
            settings = {name: f"guide_{name}" for name in ("width", "depth", "heads")}
            same = ("encoder", "head_width", "head_depth", "head_heads", "shift_base")
            self.check_run("guide", run, settings | {name: name for name in same})
            load_strictly(guide, part_of(run.state, "network"), path)
            self.set_statistics(run.state["latent_mean"], run.state["latent_var"])
            self.digests["guide"] = run.sha256
        else:
            load_strictly(
                guide,
                network_from_released(read_released(path), guide.state_dict(), self.config.guide_shape, "guide's "),
                path,
            )
            self.digests["guide"] = sha256_of(path)

    def check_run(self, key: str, run: RunWeights, settings: Mapping[str, str]) -> None:
        """Raises UserError if the earlier run has other settings. settings: setting in that run -> setting here."""
        theirs = run.config["model"]
        for there, here in settings.items():
            if theirs.get(there) != getattr(self.config, here):
                raise UserError(
                    f"model.{key}={run.folder} was trained with model.{there}={theirs.get(there)!r}, "
                    f"but here model.{here}={getattr(self.config, here)!r}. Set model.{here}={theirs.get(there)}, "
                    "or give another run."
                )

    def set_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Copies the latents' mean and variance (C, h, h) into the buffers."""
        self.latent_mean.copy_(mean)
        self.latent_var.copy_(variance)

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        (latents,) = self.latents_of(batch)
        x = normalise(latents, self.latent_mean, self.latent_var)
        return {"loss": self.objective(x, *self.draw(x, batch["label"]))}

    def draw(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws (labels, shifted t, noise) for latents x (B, C, h, h): (B,) int64 with some dropped, (B,), like x."""
        labels = drop_labels(labels, self.config.label_drop, self.data.num_classes)
        if self.config.time == "uniform":
            t = LARGEST_TIME * torch.rand(len(labels), device=x.device)
        else:  # the released code truncates the distribution; times beyond have a probability of only 2e-12
            t = flow.logit_normal(0.0, 1.0, len(labels), device=x.device).clamp(max=LARGEST_TIME)
        return labels, shifted(t, self.shift), torch.randn_like(x)

    def objective(self, x: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """mean (v(z, t) - (n - x))^2."""
        v = self.network(flow.interpolate(x, noise, t), t, labels)
        return (v - flow.target("v", x, noise)).square().mean()

    @torch.no_grad()
    def before_training(self, batches: Iterator[Batch]) -> None:
        """Measures the latent statistics, unless a file or the guide's run has set them."""
        from_run = self.config.guide is not None and (Path(self.config.guide) / "config.yaml").exists()
        if self.config.statistics in KINDS and not from_run:
            self.set_statistics(
                *measure(
                    self.config.statistics, batches, lambda batch: self.latents_of(batch)[0], self.config.stat_images
                )
            )

    def blocks(self) -> list[nn.Module]:
        return list(self.network.blocks)

    def probe(self, images: Tensor, time: float) -> None:
        x, times = self.encode(images), torch.full((len(images),), time, device=images.device)
        self.network(
            flow.interpolate(x, torch.randn_like(x), times),
            times,
            torch.full((len(x),), self.data.num_classes, device=x.device),
        )

    # -- sampling ------------------------------------------------------------------------------------------------------

    def sample(self, labels: Tensor, noise: Noise, config: RaeSample) -> Tensor:
        z = noise.normal(*self.latent_shape)
        return self.decode(
            euler(
                lambda z, t: self.velocity(z, t, labels, config), z, time_grid(config.steps, config.ending, self.shift)
            )
        )

    def velocity(self, z: Tensor, t: float, labels: Tensor, config: RaeSample) -> Tensor:
        """The guided velocity.

        With a guide (a weaker model) it is autoguidance: away from the guide's velocity for the same label.
        Without one, guidance is classifier-free.
        """

        def predict(z: Tensor, labels: Tensor, network: nn.Module = self.network) -> Tensor:
            return network(z, torch.full((len(z),), t, device=z.device), labels).to(z.dtype)

        scale = config.guidance if config.interval[0] <= t <= config.interval[1] else 1.0
        if self.guide is None or scale == 1.0:
            return classifier_free(predict, z, labels, self.data.num_classes, scale)
        weak = predict(z, labels, self.guide)
        return weak + scale * (predict(z, labels) - weak)

    def evaluations(self, config: RaeSample) -> int:
        return config.steps

    def sampling_networks(self) -> dict[str, nn.Module]:
        networks = {"network": self.network, "decoder": self.decoder}
        return networks | ({"guide": self.guide} if self.guide is not None else {})

    def encode(self, images: Tensor) -> Tensor:
        return normalise(self.encoder(images), self.latent_mean, self.latent_var)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(denormalise(latents, self.latent_mean, self.latent_var))

    def describe(self, config: RaeSample) -> Description:
        guided = config.guidance != 1.0
        return Description(
            prediction="v",
            loss_space="v",
            sampler="euler" if config.ending == "official" else "euler, clean ending",
            steps=config.steps,
            **guidance_facts(config, "cfg" if self.guide is None else "autoguidance"),
            variant=None if self.config.head_depth else "LightningDiT",
            pretrained=tuple(part for part in self.components() if guided or part.role != "guide"),
        )

    def digest_of(self, module: str) -> str | None:
        return self.digests.get(module) or super().digest_of(module)

    # -- released weights ----------------------------------------------------------------------------------------------

    def from_reference(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames the tensors of a released network to ours.

        The latent statistics stay as they are: the authors released them as a separate file (`model.statistics`).
        """
        network = network_from_released(state, self.network.state_dict(), self.config.shape)
        statistics = {"latent_mean": self.latent_mean, "latent_var": self.latent_var}
        return statistics | {f"network.{name}": tensor for name, tensor in network.items()}


def part_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one sub-module, without its prefix in their names."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}


def shifted(t: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t): more noise for larger latents, in training and in sampling (section 4.2)."""
    return shift * t / (1 + (shift - 1) * t)


def time_grid(steps: int, ending: str, shift: float) -> list[float]:
    """Times from 1 down to 0.001 (official) or 0 (clean) in equal steps, then shifted.

    The arithmetic is float32, as in the released sampler.
    """
    last = SMALLEST_TIME if ending == "official" else 0.0
    times = shifted(1 - torch.linspace(0, 1 - last, steps + 1, dtype=torch.float32, device="cpu"), shift)
    return times.clamp(max=1.0).tolist()  # rounding could raise the first time above 1, outside the guidance interval
