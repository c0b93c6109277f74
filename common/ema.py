"""Exponential moving averages of the weights, for sampling and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.config import TrainConfig


@dataclass
class Ema:
    """One average: average = beta * average + (1 - beta) * parameter after every step."""

    name: str
    average: dict[str, Tensor]
    decay: float | None = None  # per step
    halflife_images: float | None = None
    rampup: float = 0.0  # the half-life is at most this share of the images seen; 0 is off

    def beta(self, images_seen: int, batch: int) -> float:
        """The decay of the step that ended after `images_seen` images. Half-lives as in EDM: beta = 0.5^(batch / halflife)."""
        if self.decay is not None:
            return self.decay
        assert self.halflife_images is not None
        halflife = min(self.halflife_images, self.rampup * images_seen) if self.rampup else self.halflife_images
        return 0.5 ** (batch / max(halflife, 1e-8))

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], images_seen: int, batch: int) -> None:
        """Moves the average towards the parameters."""
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, [parameters[name] for name in self.average], 1.0 - self.beta(images_seen, batch))

    @contextmanager
    def applied(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Within the block the parameters have the average's values."""
        backup = {name: parameters[name].detach().clone() for name in self.average}
        try:
            _copy(self.average, parameters)
            yield
        finally:
            _copy(backup, parameters)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    torch._foreach_copy_([parameters[name] for name in source], list(source.values()))


def build_emas(parameters: Mapping[str, nn.Parameter], train: TrainConfig) -> list[Ema]:
    """The run's averages, each starting as a copy of the parameters."""

    def start() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in parameters.items()}

    by_decay = [Ema(f"{decay:g}", start(), decay=decay) for decay in train.ema_decay]
    by_halflife = [Ema(f"{h:.0f}img", start(), halflife_images=h, rampup=train.ema_rampup) for h in train.ema_halflife_images]
    return by_decay + by_halflife
