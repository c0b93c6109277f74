"""The seam: what the trainer, the evaluator and the launcher may ask of a method, and nothing else."""

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
    """What a method may know of the data before it is built."""

    name: str
    num_classes: int
    image_size: int  # pixels, square
    num_train: int
    channels: int = 3
    latents: LatentFacts | None = None  # of stored latents: training batches then bring "moments"

    @classmethod
    def of(cls, summary: DataSummary) -> DataInfo:
        """From what `common.datasets` says of a data set."""
        return cls(summary.name, summary.num_classes, summary.image_size, summary.num_train, latents=summary.latents)


@dataclass
class ParamGroup:
    """Parameters that one optimizer treats alike."""

    params: list[nn.Parameter]
    kind: str = "adamw"  # a key of common.optim.BUILDERS
    lr_scale: float = 1.0
    weight_decay: float | None = None  # None: the run's `train.weight_decay`
    betas: tuple[float, float] | None = None  # of AdamW; None: the run's `train.betas`
    # Muon: a matrix is this many matrices stacked along dim 0 (a fused q, k, v has 3), each orthogonalised alone
    split: int = 1


@dataclass(frozen=True)
class Component:
    """A network that was trained elsewhere and that this method needs."""

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
    name: str | None = None  # None: the sub-module's own `name`, or else the name of its class


@dataclass(frozen=True)
class Description:
    """What the leaderboard says of a method and its sampler."""

    prediction: str
    loss_space: str
    sampler: str
    steps: int
    guidance: str = "none"  # "none" where nothing guides, else its kind, e.g. "cfg"
    guidance_scale: float | None = None
    interval: tuple[float, float] | None = None  # in the paper's own time
    size: str | None = None  # "B/16"
    variant: str | None = None
    pretrained: tuple[Component, ...] = ()


def guidance_facts(config: Any, kind: str = "cfg") -> dict[str, Any]:
    """The fields of a `Description` that say how a sample config guides: `guidance` (1: off) and maybe `interval`."""
    if config.guidance == 1.0:
        return {}
    return {"guidance": kind, "guidance_scale": config.guidance, "interval": getattr(config, "interval", None)}


@dataclass(frozen=True)
class Released:
    """A file of a method's authors, opened, and what its shapes tell (`MethodSpec.released`)."""

    state: Mapping[str, Tensor]  # as `Method.from_reference` takes it
    model: dict[str, Any]  # settings of `model.*`; what the shapes do not tell is left out
    num_classes: int
    image_size: int
    weights: str  # which of the file's weights these are, in the file's words
    ema_decay: float | None  # of these weights; None: unknown, or not averaged
    licence: str  # of the repository that released it; a file says nothing of its own
    # settings of `model.*` that fit the shapes equally well: the user must name one of them
    choices: tuple[dict[str, Any], ...] = ()
    why_choose: str = ""  # a sentence that says why the shapes do not decide


# (file, which of its sets of weights; None: the one behind the published numbers) -> what is in it
OpenReleased = Callable[[Path, "str | None"], Released]


class Method(nn.Module):
    """A generative method: networks, loss, sampler. It owns no optimizer, schedule, device, file or metric.

    A subclass sets `phases` where more than one network is trained (a GAN has `("generator", "discriminator")`),
    implements `forward`, `sample`, `evaluations`, `sampling_networks` and `describe`,
    and overrides the rest where it differs from the default.
    """

    phases: tuple[str, ...] = ("main",)
    # or "reconstruction": a stage that is judged by encode and decode and has no `sample`
    task: ClassVar[str] = "generation"
    # sub-modules whose weights come from files (frozen encoders, another run's decoder), by name
    external: Mapping[str, Pretrained] = {}
    # whether training takes "moments" (B, 2 C, h, h) of stored latents from the batch (`data.latents`)
    takes_moments: ClassVar[bool] = False
    space: ClassVar[str] = "pixel"  # "pixel" | "latent_vae" | "latent_rae" | "latent_self", the leaderboard's column

    def __init__(self, config: Any, data: DataInfo) -> None:
        super().__init__()
        self.config = config
        self.data = data

    @classmethod
    def needs_images(cls, data: DataInfo) -> bool:
        """Whether training reads "image" from its batches.

        A method that needs nothing but stored latents spares the loader decoding the images.
        """
        return True

    def load_external(self) -> None:
        """Loads the weights of the `external` sub-modules from their files, in place.

        Checkpoints leave these sub-modules out.

        Called once on a real device, after construction and before anything is trained or sampled;
        never on the meta device, where costs are counted, so construction must not need the files.
        A missing file is a UserError that says which repository and file is wanted.
        By default each sub-module loads itself (`pixlat.common.frozen.base.Frozen.load`).
        """
        for name in self.external:
            network: Any = self.get_submodule(name)
            network.load()

    def train(self, mode: bool = True) -> Method:
        """Training or evaluation mode; external sub-modules are frozen and stay in evaluation mode."""
        super().train(mode)
        for name in self.external:
            self.get_submodule(name).eval()
        return self

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        """The loss of one phase. `forward` is the loss, so that a distributed wrapper sees every gradient.

        batch: "image" (B, C, H, W) float in [-1, 1] (absent unless `needs_images`), "label" (B,) int64 and "index" (B,)
        int64, the images' positions in the training set.
        Returns {"loss": scalar with gradient, "<name>": detached scalars to log}.
        All randomness comes from torch's global generator, which the trainer has just reseeded;
        by convention `forward` makes its draws first and hands them to a pure `objective`.
        """
        raise NotImplementedError

    def parameters_of(self, phase: str) -> list[ParamGroup]:
        """The parameters that the optimizer of this phase steps; default: every parameter that requires a gradient."""
        return [ParamGroup([p for p in self.parameters() if p.requires_grad])]

    def begin_step(self, images_seen: int) -> None:
        """Called once at the beginning of every training step, before its phases: `forward` may depend on the images
        seen so far (an adversarial term that starts late), and what the phases of one step share may be forgotten here.
        Does nothing unless a method overrides it.
        """

    def phase_active(self, phase: str, images_seen: int) -> bool:
        """Whether the phase is stepped at this point ("the discriminator starts at image N").

        A pure query: to ask it, or not, changes no loss.
        """
        return True

    def turning_points(self) -> list[int]:
        """Images seen after which a training step executes something else than before (a discriminator starts),
        for counting what training costs.
        """
        return []

    def schedule_images(self, phase: str, images_seen: int) -> int:
        """The images that the phase's learning-rate schedule has seen;
        a discriminator that starts late starts its own warm-up then.
        """
        return images_seen

    def before_training(self, batches: Iterator[Batch]) -> None:
        """Called once before step 0 of a fresh run (latent statistics into buffers), under the training's autocast.

        Not called on resume.

        batches: endless, the micro-batches of all processes. Nothing is read before the first one is asked for.
        """

    def after_training(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Called once after the last step, before its checkpoint is written,
        with the evaluated average in place and in evaluation mode; `batches` as in `before_training`.
        Returns buffers by name that were measured with these weights (moments of latents); they go into the checkpoint.
        """
        return {}

    def check_micro_batch(self, images: int) -> None:
        """Called before the training, with the images that a process takes at once.

        UserError where the loss needs another number.
        """

    def after_step(self, step: int) -> None:
        """Called after the optimizers of a step (a teacher that is part of the loss).

        State goes into buffers or parameters.
        """

    def alarms(self, means: Mapping[str, float]) -> dict[str, str]:
        """What the user must know at once, name -> sentence, from the means of what `forward` reports (with "<phase>/"
        before the names where there are several phases). The trainer asks when it writes a log line,
        and prints each name once.
        """
        return {}

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the trainer's EMAs follow; default: all trainable ones.

        A discriminator leaves itself out.
        """
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, in order: the unit of compilation, activation checkpointing and sharding."""
        return []

    def frozen_blocks(self) -> list[nn.Module]:
        """Blocks that training runs and never trains, for example of a target's copy of the network.

        They are compiled as `blocks` are, but not recomputed, since they keep nothing for a backward pass, not sharded,
        since `after_step` writes them, and not listened to.
        """
        return []

    def probe(self, images: Tensor, time: float) -> None:
        """One forward pass on images noised to `time` without their class,
        for those who listen to `blocks()` (`pixlat study hidden-states`).
        """
        raise UserError(
            f"{type(self).__name__} has no probe(images, time), the forward pass on noised images "
            "whose blocks are listened to."
        )

    # -- sampling ------------------------------------------------------------------------------------------------------

    def sample(self, labels: Tensor, noise: Noise, config: Any) -> Tensor:
        """Images (B, C, H, W) float, nominally in [-1, 1] and not clamped, for labels (B,) int64;
        `config` is the method's Sample dataclass.
        """
        raise NotImplementedError

    def evaluations(self, config: Any) -> int:
        """Velocity (or score, or one-step) evaluations per image with this sample config;
        guidance branches do not count twice.
        """
        raise NotImplementedError

    def sampling_networks(self) -> dict[str, nn.Module]:
        """The networks that sampling may call, by name; cost counting hooks them to count executed forwards.

        Decoders are called "decoder".
        """
        raise NotImplementedError

    def describe(self, config: Any) -> Description:
        """The method and this sample config in the leaderboard's words."""
        raise NotImplementedError

    def components(self) -> tuple[Component, ...]:
        """The external sub-modules as `Description.pretrained` lists them, in the order of their declaration."""
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
        """Images (B, C, H, W) in [-1, 1] to the space in which the method generates; the identity for pixel methods."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`, up to the autoencoder's error."""
        return latents

    # -- released weights ----------------------------------------------------------------------------------------------

    def from_reference(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' released names to ours. Any missing, extra or misshapen key is a UserError that lists it."""
        raise NotImplementedError
