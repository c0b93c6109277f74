"""The interface of a method: all that the trainer, the evaluator and the launcher may use of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from pixlat.common.datasets.summary import DataSummary
from pixlat.common.errors import UserError
from pixlat.common.images.image_set import LatentFacts
from pixlat.common.seeds import Noise

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class DataInfo:
    """What a method's constructor may know about the data."""

    name: str
    num_classes: int
    image_size: int  # pixels, square
    num_train: int
    channels: int = 3
    latents: LatentFacts | None = None  # facts of the stored latents, if any: training batches then contain "moments"

    @classmethod
    def of(cls, summary: DataSummary) -> DataInfo:
        """Takes the facts from the summary of a data set (`common.datasets`)."""
        return cls(summary.name, summary.num_classes, summary.image_size, summary.num_train, latents=summary.latents)


@dataclass
class ParamGroup:
    """Parameters that share an optimizer and its settings."""

    params: list[nn.Parameter]
    kind: str = "adamw"  # a key of common.optim.BUILDERS
    lr_scale: float = 1.0
    weight_decay: float | None = None  # None: the run's `train.weight_decay`
    betas: tuple[float, float] | None = None  # AdamW's betas; None: the run's `train.betas`
    # Muon: how many matrices are stacked along dim 0 of each parameter (3 for a fused q, k, v).
    # Muon orthogonalises each of them alone.
    split: int = 1


@dataclass(frozen=True)
class Component:
    """A network that the method needs and that was trained elsewhere."""

    name: str
    role: str  # "teacher", "tokenizer", ...
    params: int
    sha256: str | None
    used_at: str  # "train" | "sample" | "both"


@dataclass(frozen=True)
class Pretrained:
    """How records list one of a method's `external` sub-modules; the fields are those of `Component`."""

    role: str
    used_at: str
    name: str | None = None  # None: the sub-module's `name` attribute, or the name of its class if it has none


@dataclass(frozen=True)
class Description:
    """The facts that the leaderboard shows about a method and its sampler."""

    prediction: str
    loss_space: str
    sampler: str
    steps: int
    guidance: str = "none"  # the kind of guidance, e.g. "cfg"; "none" if guidance is off
    guidance_scale: float | None = None
    interval: tuple[float, float] | None = None  # in the paper's time convention
    size: str | None = None  # "B/16"
    variant: str | None = None
    pretrained: tuple[Component, ...] = ()


def guidance_facts(config: Any, kind: str = "cfg") -> dict[str, Any]:
    """The guidance fields of a `Description`, from a sample config with `guidance` (1: off) and maybe `interval`."""
    if config.guidance == 1.0:
        return {}
    return {"guidance": kind, "guidance_scale": config.guidance, "interval": getattr(config, "interval", None)}


@dataclass(frozen=True)
class Released:
    """The content of a file that the authors released, with the settings that its shapes reveal."""

    state: Mapping[str, Tensor]  # the tensors that `Method.from_reference` takes
    model: dict[str, Any]  # settings of `model.*` that the shapes reveal; the others are left out
    num_classes: int
    image_size: int
    weights: str  # which of the file's sets of weights this is; the name that the file gives it
    ema_decay: float | None  # decay of this average; None: unknown, or not an average
    licence: str  # licence of the authors' repository; the files themselves name none
    # combinations of `model.*` settings that fit the shapes equally well: the user must choose one of them
    choices: tuple[dict[str, Any], ...] = ()
    why_choose: str = ""  # a sentence that says why the shapes do not decide


# Opens a released file (`MethodSpec.released`). Arguments: the file, and the name of one of its sets of weights;
# None means the set behind the published numbers.
OpenReleased = Callable[[Path, "str | None"], Released]


class Method(nn.Module):
    """A generative method: networks, loss, sampler. It owns no optimizer, schedule, device, file or metric.

    A subclass implements `forward`, `sample`, `evaluations`, `sampling_networks` and `describe`.
    It sets `phases` if it trains several networks in turn (a GAN has `("generator", "discriminator")`)
    and overrides other methods if their defaults do not fit.
    """

    phases: tuple[str, ...] = ("main",)
    # "generation", or "reconstruction" for a stage that has no `sample`: evaluation then uses `encode` and `decode`
    task: ClassVar[str] = "generation"
    # sub-modules whose weights come from files (frozen encoders, another run's decoder), by name
    external: Mapping[str, Pretrained] = {}
    # whether training can read "moments" (B, 2 C, h, h) of stored latents from the batch (`data.latents`)
    takes_moments: ClassVar[bool] = False
    space: ClassVar[str] = "pixel"  # "pixel" | "latent_vae" | "latent_rae" | "latent_self", the leaderboard's column

    def __init__(self, config: Any, data: DataInfo) -> None:
        super().__init__()
        self.config = config
        self.data = data

    @classmethod
    def needs_images(cls, data: DataInfo) -> bool:
        """Whether training reads "image" from its batches.

        If it reads stored latents only, the loader need not decode the images.
        """
        return True

    def load_external(self) -> None:
        """Loads the weights of the `external` sub-modules from their files, in place.

        Checkpoints do not contain these sub-modules. The program calls this once on a real device, after construction
        and before training or sampling. It never calls it on the meta device, where it counts costs: so construction
        must not need the files. If a file is missing, raises UserError with its repository and name.
        By default each sub-module loads itself (`pixlat.common.frozen.base.Frozen.load`).
        """
        for name in self.external:
            network: Any = self.get_submodule(name)
            network.load()

    def train(self, mode: bool = True) -> Method:
        """Sets training or evaluation mode; external sub-modules are frozen and stay in evaluation mode."""
        super().train(mode)
        for name in self.external:
            self.get_submodule(name).eval()
        return self

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        """The loss of one phase. It is `forward`, so that a distributed wrapper (DDP, FSDP) sees every gradient.

        batch: "image" (B, C, H, W) float in [-1, 1] (absent unless `needs_images`), "label" (B,) int64 and "index" (B,)
        int64, the images' positions in the training set.
        Returns {"loss": scalar with gradient, "<name>": detached scalars to log}.
        All random numbers come from torch's global generator, which the trainer reseeds before each call.
        By convention `forward` draws them first and passes them to `objective`, which draws none.
        """
        raise NotImplementedError

    def parameters_of(self, phase: str) -> list[ParamGroup]:
        """The parameters that the optimizers of this phase update; default: all that require a gradient."""
        return [ParamGroup([p for p in self.parameters() if p.requires_grad])]

    def begin_step(self, images_seen: int) -> None:
        """The trainer calls this once at the beginning of every training step, before its phases.

        A method may note the images seen so far here, if `forward` depends on them (an adversarial term that starts
        late), and clear values that the phases of one step share. The default does nothing.
        """

    def phase_active(self, phase: str, images_seen: int) -> bool:
        """Whether the trainer runs this phase at this point (for example, the discriminator starts at image N).

        It has no side effects: calling it changes no loss.
        """
        return True

    def turning_points(self) -> list[int]:
        """Numbers of images seen at which the work of a training step changes (a discriminator starts, for example).

        The program counts the cost of training separately between them.
        """
        return []

    def schedule_images(self, phase: str, images_seen: int) -> int:
        """The position in the phase's learning-rate schedule, in images.

        A discriminator that starts late begins its warm-up at that point.
        """
        return images_seen

    def before_training(self, batches: Iterator[Batch]) -> None:
        """The trainer calls this once before step 0 of a fresh run, under the training's autocast; not after a resume.

        A method may measure latent statistics here and store them in buffers.
        batches: endless, the micro-batches of all processes. No data is read before the first `next`.
        """

    def after_training(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """The trainer calls this once after the last step, before it writes that checkpoint.

        The method then holds the averaged weights that are evaluated and is in evaluation mode.
        batches: see `before_training`.
        Returns buffers, by name, measured with these weights (moments of latents); the checkpoint stores them.
        """
        return {}

    def check_micro_batch(self, images: int) -> None:
        """The program calls this before training with the micro-batch size of one process.

        Raises UserError if the loss does not work with this size.
        """

    def after_step(self, step: int) -> None:
        """The trainer calls this after the optimizers of a step (to update a teacher in the loss, for example).

        Any state must be in buffers or parameters, because checkpoints store nothing else.
        """

    def alarms(self, means: Mapping[str, float]) -> dict[str, str]:
        """Warnings that the user must see at once, name -> sentence.

        means: means of the scalars that `forward` reports, with "<phase>/" before their names if there are several
        phases. The trainer calls this when it writes a log line, and prints each name once.
        """
        return {}

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the trainer's EMAs follow; default: all trainable ones.

        A method with a discriminator excludes the discriminator's parameters.
        """
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, in order: the unit of compilation, activation checkpointing and sharding."""
        return []

    def frozen_blocks(self) -> list[nn.Module]:
        """Blocks that training runs but never trains, for example those of a target copy of the network.

        The trainer compiles them like `blocks`. It does not recompute them, because they keep nothing for a backward
        pass, and does not shard them, because `after_step` writes them. Probes ignore them.
        """
        return []

    def probe(self, images: Tensor, time: float) -> None:
        """Runs one forward pass on images noised to `time`, without their class.

        `pixlat study hidden-states` hooks `blocks()` and reads their outputs during this pass.
        """
        raise UserError(
            f"{type(self).__name__} does not implement probe(images, time), the forward pass on noised images "
            "during which the outputs of its blocks are read. Implement it, or study another method."
        )

    # -- sampling ------------------------------------------------------------------------------------------------------

    def sample(self, labels: Tensor, noise: Noise, config: Any) -> Tensor:
        """Generates images (B, C, H, W) float, nominally in [-1, 1] and not clamped, for labels (B,) int64.

        config: an instance of the method's Sample dataclass.
        """
        raise NotImplementedError

    def evaluations(self, config: Any) -> int:
        """Velocity (or score, or one-step) evaluations per image with this sample config.

        Two branches of guidance at the same point count as one evaluation.
        """
        raise NotImplementedError

    def sampling_networks(self) -> dict[str, nn.Module]:
        """The networks that sampling may call, by name; a decoder must have the name "decoder".

        The program hooks them to count their forward passes.
        """
        raise NotImplementedError

    def describe(self, config: Any) -> Description:
        """Describes the method and this sample config for the leaderboard."""
        raise NotImplementedError

    def components(self) -> tuple[Component, ...]:
        """The external sub-modules in the form of `Description.pretrained`, in the order of `external`."""
        return tuple(self._component(module, listed) for module, listed in self.external.items())

    def _component(self, module: str, listed: Pretrained) -> Component:
        network = self.get_submodule(module)
        name: str = listed.name or getattr(network, "name", None) or type(network).__name__
        return Component(
            name, listed.role, sum(p.numel() for p in network.parameters()), self.digest_of(module), listed.used_at
        )

    def digest_of(self, module: str) -> str | None:
        """The SHA-256 of the file that an external sub-module was loaded from; None before `load_external`."""
        return getattr(self.get_submodule(module), "sha256", None)

    def encode(self, images: Tensor) -> Tensor:
        """Maps images (B, C, H, W) in [-1, 1] to the space in which the method generates; identity by default."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`, up to the autoencoder's error."""
        return latents

    # -- released weights ----------------------------------------------------------------------------------------------

    def from_reference(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames the authors' released tensors to ours.

        Raises UserError with the list of all missing, extra and misshapen keys.
        """
        raise NotImplementedError
