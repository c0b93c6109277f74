"""Exponential moving averages of the weights, for sampling and evaluation.

An average starts as the initial weights and forgets them step by step. If a run ends too early, the average still
holds much of the initial noise, and its samples are grey, worse than those of an untrained network.
Such a run uses a shorter average (`effective_decay`, `effective_halflife`). Longer runs use the configured one.
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

START_SHARE = 0.1  # an average that holds a larger share of the initial weights than this draws grey samples
# A shortened average has a time constant of a fifth of the run: it spans about the last fifth of the run,
# and e^-5 = 0.7 % of the initial weights are left at the end.
TIME_CONSTANTS = 5


@dataclass
class Ema:
    """One average: average = beta * average + (1 - beta) * parameter after every step."""

    name: str
    average: dict[str, Tensor]
    decay: float | None = None  # per step; if None, halflife_images is used
    halflife_images: float | None = None
    rampup: float = 0.0  # limits the half-life to this share of the images seen; 0: no limit

    def beta(self, images_seen: int, batch: int) -> float:
        """The decay of the step that ended after `images_seen` images. Half-lives as in EDM: 0.5^(batch / halflife)."""
        if self.decay is not None:
            return self.decay
        assert self.halflife_images is not None
        halflife = min(self.halflife_images, self.rampup * images_seen) if self.rampup else self.halflife_images
        return 0.5 ** (batch / max(halflife, 1e-8))

    def start_share(self, steps: int, batch: int) -> float:
        """The share of the initial weights in the average after `steps` steps, between 0 and 1.

        Below a millionth the result may be a little too large, because the loop stops there.
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
    """The run's averages; each starts as a copy of the parameters."""

    def start() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in parameters.items()}

    return [replace(ema, average=start()) for ema in _effective_averages(train)]


def effective_decay(decay: float, steps: int) -> float:
    """The decay that a run of `steps` steps uses: `decay`, or max(0, 1 - 5 / steps) if decay^steps > 0.1."""
    return max(0.0, 1 - TIME_CONSTANTS / steps) if steps and decay**steps > START_SHARE else decay


def effective_halflife(halflife_images: float, rampup: float, steps: int, batch: int) -> float:
    """The half-life in images that a run of `steps` steps uses.

    It is `halflife_images`, or steps batch ln 2 / 5 if more than a tenth of the initial weights would be left.
    """
    share = Ema("", {}, halflife_images=halflife_images, rampup=rampup).start_share(steps, batch)
    return steps * batch * math.log(2) / TIME_CONSTANTS if steps and share > START_SHARE else halflife_images


def decays_by_name(train: TrainConfig) -> dict[str, float | None]:
    """The decay per step that each average of a run uses, by the average's name; None for half-life averages."""
    return {ema.name: ema.decay for ema in _effective_averages(train)}


def shortened_averages(train: TrainConfig) -> list[str]:
    """One message for each average that is too long for the run, so that the run uses a shorter one."""
    keys = [
        *(f"train.ema_decay={decay:g}" for decay in train.ema_decay),
        *(f"train.ema_halflife_images={h:g}" for h in train.ema_halflife_images),
    ]
    configured = [*train.ema_decay, *train.ema_halflife_images]
    used = [ema.halflife_images if ema.decay is None else ema.decay for ema in _effective_averages(train)]
    steps = _steps(train)
    return [
        (
            f"{key} is too long an average for a run of {steps} steps: samples would show mostly initial noise. "
            f"The run uses {real:.6g} instead."
        )
        for key, given, real in zip(keys, configured, used, strict=True)
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
    return [replace(ema, name=name) for ema, name in zip(averages, ema_names(train), strict=True)]
