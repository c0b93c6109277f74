"""The command line of a measurement: the keys of a run, and `speed.*`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from pixlat.common.config.resolve import resolve, split_overrides, sweep
from pixlat.common.config.schema import RunConfig
from pixlat.evaluation.bench.steps import tell
from pixlat.methods import get_spec

DEFAULTS = {"speed.batch": "8", "speed.steps": "10", "speed.sample": "true"}


def configurations(arguments: Sequence[str]) -> Iterator[tuple[RunConfig, dict[str, str]]]:
    """Every run of a sweep, and the options `speed.*`."""
    overrides = split_overrides(arguments)
    options = {key: overrides.pop(key, [default])[0] for key, default in DEFAULTS.items()}
    for choice in sweep(overrides):
        run = resolve(get_spec(choice.get("method", RunConfig.method)), choice)
        yield (run if "train.compile" in choice else without_compiling_on_cpu(run)), options


def without_compiling_on_cpu(run: RunConfig) -> RunConfig:
    """The run without a preset's train.compile where there is no GPU: it would compile for minutes,
    for a rate that no training will have.
    """
    from accelerate import PartialState

    if not run.train.compile or PartialState().device.type != "cpu":
        return run
    tell(
        "this is a CPU: blocks are not compiled, though the preset asks for it (train.compile=true "
        "compiles them here as well)"
    )
    return dataclasses.replace(run, train=dataclasses.replace(run.train, compile=False))
