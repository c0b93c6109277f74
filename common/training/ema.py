"""Exponential moving averages of the weights, for sampling and evaluation.

An average starts as the initial weights and forgets them step by step. A run may end before it has: what is left
of noise at the start then makes its samples grey, worse than an untrained network's. Such a run gets a shorter average
(`effective_decay`, `effective_halflife`); a run that is long enough for the average that was asked for keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pixlat.common.config.resolve import ema_names
from pixlat.common.config.schema import TrainConfig

START_SHARE = 0.1  # of the initial weights; an average that holds more of them is mostly its beginning
# the length of a run with a shorter average: e^-5 = 0.7 % of the initial weights are left,
# and the average spans about the last fifth
TIME_CONSTANTS = 5


@dataclass
class Ema:
    """One average: average = beta * average + (1 - beta) * parameter after every step."""

    name: str
    average: dict[str, Tensor]
    decay: float | None = None  # per step
    halflife_images: float | None = None
    rampup: float = 0.0  # the half-life is at most this share of the images seen; 0 is off

    def beta(self, images_seen: int, batch: int) -> float:
        """The decay of the step that ended after `images_seen` images.

        Half-lives as in EDM: beta = 0.5^(batch / halflife).
        """
        if self.decay is not None:
            return self.decay
        assert self.halflife_images is not None
        halflife = min(self.halflife_images, self.rampup * images_seen) if self.rampup else self.halflife_images
        return 0.5 ** (batch / max(halflife, 1e-8))

    def start_share(self, steps: int, batch: int) -> float:
        """How much of the average is the initial weights after that many steps, between 1 and 0 (below a millionth it
        may be told as a little too much).
        """
        if self.decay is not None:
            return self.decay**steps
        share = 1.0
        for step in range(1, steps + 1):
            share *= self.beta(step * batch, batch)
            if share < 1e-6:
                break
        return share

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

    return [replace(each, average=start()) for each in _effective_averages(train)]


def effective_decay(decay: float, steps: int) -> float:
    """The decay that a run of that many steps uses: `decay`, or max(0, 1 - 5 / steps) where decay^steps > 0.1."""
    return max(0.0, 1 - TIME_CONSTANTS / steps) if steps and decay**steps > START_SHARE else decay


def effective_halflife(halflife_images: float, rampup: float, steps: int, batch: int) -> float:
    """The half-life that a run of that many steps uses: the given one, or images ln 2 / 5 where more than a tenth
    of the initial weights would be left.
    """
    share = Ema("", {}, halflife_images=halflife_images, rampup=rampup).start_share(steps, batch)
    return steps * batch * math.log(2) / TIME_CONSTANTS if steps and share > START_SHARE else halflife_images


def decays_by_name(train: TrainConfig) -> dict[str, float | None]:
    """The decay a step that each average of a run really has, by the average's name;
    None for those that have a half-life.
    """
    return {each.name: each.decay for each in _effective_averages(train)}


def shortened_averages(train: TrainConfig) -> list[str]:
    """A sentence for each average that is too long for the run and is therefore shorter than the settings say."""
    asked = [
        *(f"train.ema_decay={decay:g}" for decay in train.ema_decay),
        *(f"train.ema_halflife_images={h:g}" for h in train.ema_halflife_images),
    ]
    wanted = [*train.ema_decay, *train.ema_halflife_images]
    used = [each.halflife_images if each.decay is None else each.decay for each in _effective_averages(train)]
    steps = _steps(train)
    return [
        (
            f"{key} is too long an average for a run of {steps} steps, which would leave its samples mostly initial "
            f"noise; {real:.6g} is used instead."
        )
        for key, given, real in zip(asked, wanted, used, strict=True)
        if real != given
    ]


def _steps(train: TrainConfig) -> int:
    return math.ceil(train.images / train.batch)


def _effective_averages(train: TrainConfig) -> list[Ema]:
    """The run's averages without their tensors, in the order of `ema_names`."""
    steps = _steps(train)
    by_decay = [Ema("", {}, decay=effective_decay(decay, steps)) for decay in train.ema_decay]
    halflives = [effective_halflife(h, train.ema_rampup, steps, train.batch) for h in train.ema_halflife_images]
    averages = by_decay + [Ema("", {}, halflife_images=h, rampup=train.ema_rampup) for h in halflives]
    return [replace(each, name=name) for each, name in zip(averages, ema_names(train), strict=True)]
