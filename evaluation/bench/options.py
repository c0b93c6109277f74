"""The command line of a measurement: it takes the keys of a run and `speed.*`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pixlat.common.config.resolve import resolve, split_overrides, sweep
from pixlat.common.config.schema import RunConfig
from pixlat.evaluation.bench.steps import tell
from pixlat.evaluation.command import groups_of_a_run, parse
from pixlat.methods import get_spec


@dataclass
class SpeedKeys:
    """The keys `speed.*`."""

    batch: int = 8  # images per training step and per sampling batch
    steps: int = 10  # number of timed steps
    sample: bool = True  # false: time training only, for example for a stage that does not sample


@dataclass
class Keys:
    """The command's keys beside those of a run."""

    speed: SpeedKeys = field(default_factory=SpeedKeys)


GROUPS = groups_of_a_run()


def configurations(arguments: Sequence[str]) -> Iterator[tuple[RunConfig, SpeedKeys]]:
    """Every run of a sweep, and the keys `speed.*`."""
    keys, rest = parse(Keys, arguments, tuple(GROUPS))
    for choice in sweep(split_overrides([f"{key}={value}" for key, value in rest.items()])):
        run = resolve(get_spec(choice.get("method", RunConfig.method)), choice)
        yield (run if "train.compile" in choice else without_compiling_on_cpu(run)), keys.speed


def without_compiling_on_cpu(run: RunConfig) -> RunConfig:
    """The run with train.compile=false if there is no GPU.

    Compiling would take minutes here and give a rate that no training will have.
    """
    from accelerate import PartialState

    if not run.train.compile or PartialState().device.type != "cpu":
        return run
    tell(
        "this is a CPU: blocks are not compiled, although the preset says so (train.compile=true on the command line "
        "compiles them here as well)"
    )
    return dataclasses.replace(run, train=dataclasses.replace(run.train, compile=False))
