"""Small methods and batches for tests of what is common to all methods."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.config.schema import TrainConfig
from pixlat.common.datasets.batches import TrainingPlan, training_batches
from pixlat.common.images.image_set import ArrayImages
from pixlat.common.training.loop import train
from pixlat.common.training.optim import optimizer_state
from pixlat.common.training.setup import make_accelerator
from pixlat.common.training.state import TrainState
from pixlat.methods.base import Batch, DataInfo, Method, ParamGroup
from pixlat.methods.jit.config import JiTConfig
from pixlat.methods.jit.method import JiTMethod

INFO = DataInfo("toy", num_classes=3, image_size=8, num_train=40)
TINY_JIT = JiTConfig(
    depth=4, width=16, heads=2, patch=4, bottleneck=8, context_tokens=2, context_start=2, dropout=0.1, noise_scale=1.0
)


def toy_images() -> ArrayImages:
    """40 noisy 8x8 images in 3 classes."""
    rng = np.random.Generator(np.random.PCG64(0))
    return ArrayImages(
        rng.integers(0, 256, (INFO.num_train, 3, 8, 8), dtype=np.uint8), rng.integers(0, 3, INFO.num_train), "toy"
    )


def tiny_jit() -> JiTMethod:
    """The same untrained network each time."""
    torch.manual_seed(0)
    return JiTMethod(TINY_JIT, INFO)


class TinyGan(Method):
    """A generator of one image a class and a linear discriminator: two phases, two optimizers,
    a teacher and a statistic.
    """

    phases = ("generator", "discriminator")

    def __init__(self) -> None:
        super().__init__(None, INFO)
        torch.manual_seed(0)
        self.generator = nn.Embedding(3, 3 * 8 * 8)
        self.discriminator = nn.Linear(3 * 8 * 8, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("teacher", self.generator.weight.detach().clone())

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        fake = self.generator(batch["label"]) + 0.1 * torch.randn(len(batch["label"]), 192)
        if phase == "generator":
            return {
                "loss": -self.discriminator(fake).mean() + 0.01 * (fake - self.teacher[batch["label"]]).square().mean()
            }
        real = batch["image"].flatten(1)
        loss = F.relu(1 - self.discriminator(real)).mean() + F.relu(1 + self.discriminator(fake.detach())).mean()
        return {"loss": loss, "real": self.discriminator(real).mean().detach()}

    def parameters_of(self, phase: str) -> list[ParamGroup]:
        network = self.generator if phase == "generator" else self.discriminator
        return [ParamGroup(list(network.parameters()), lr_scale=1.0 if phase == "generator" else 2.0)]

    def phase_active(self, phase: str, images_seen: int) -> bool:
        return phase == "generator" or images_seen >= 16

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        return {"generator.weight": self.generator.weight}

    def before_training(self, batches: Iterator[Batch]) -> None:
        self.mean += torch.stack([next(batches)["image"].mean() for _ in range(3)]).mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        self.teacher.lerp_(self.generator.weight, 0.1)


def settings(**changes: object) -> TrainConfig:
    """A run of 20 steps of 8 images."""
    defaults = {
        "images": 160,
        "batch": 8,
        "lr": 1e-2,
        "warmup_images": 24,
        "schedule": "cosine",
        "ema_decay": [0.9],
        "log_images": 24,
    }
    return TrainConfig(**{**defaults, "checkpoint_images": 40, "preview_images": 0, **changes})  # type: ignore[arg-type]


def fit(
    method: Method,
    folder: Path,
    config: TrainConfig | None = None,
    stop_after: int | None = None,
    seed: int = 3,
    identity: str = "toy",
) -> TrainState:
    """Trains on the toy images; `stop_after` raises Killed once that many steps have been fed."""
    config = config or settings()
    images = toy_images()
    plan = TrainingPlan(images.labels, config.batch, seed, balanced=True)
    accelerator = make_accelerator(config, folder)
    folder.mkdir(exist_ok=True)
    batches = partial(
        batches_until, images, plan, config, accelerator.process_index, accelerator.num_processes, stop_after
    )
    return train(method, config, batches, folder, seed, identity, accelerator)


class Killed(Exception):
    """Stands in for a process that ends without warning."""


def batches_until(images, plan, config, rank, world, stop_after, start_step, accumulation):
    """The training batches, cut off by Killed before step `stop_after`."""
    micro_batch = config.batch // (accumulation * world)
    batches = training_batches(
        images, plan, start_step, micro_batch, accumulation, rank, world, workers=0, pin_memory=False
    )
    for step, batch in enumerate(batches, start_step):
        if step == stop_after:
            raise Killed
        yield batch


def state_of(result: TrainState) -> dict[str, Tensor]:
    """Everything that must be equal after a resume."""
    state = {name: value.clone() for name, value in result.method.state_dict().items()}
    state |= {f"ema/{ema.name}/{name}": value.clone() for ema in result.emas for name, value in ema.average.items()}
    names = {p: name for name, p in result.method.named_parameters()}
    for phase, optimizers in result.optimizers.items():
        for optimizer in optimizers:
            state |= {f"{phase}/{key}": value.clone() for key, value in optimizer_state(optimizer, names).items()}
    return state
