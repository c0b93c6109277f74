"""Runs of a given cost: `budget.train_macs` and `budget.images` set `train.images`.

This happens before anything is allocated or written, so learning-rate schedules end where the budget ends.
The module imports torch only to count MACs for a budget of MACs.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.evaluation.records.record import RESULT, read_record
from pixlat.methods import Stage, get_spec

MAX_STEPS = 2**40


def within_budget(run: RunConfig) -> RunConfig:
    """The run with as many training images as its budgets allow, in complete steps; unchanged if it has no budget.

    UserError if the budget ends before the warm-up does.
    """
    batch, budget = run.train.batch, run.budget
    limits = []
    if budget.images is not None:
        limits.append((budget.images // batch, f"budget.images={budget.images}"))
    if budget.train_macs is not None:
        limits.append((_steps_of(run, budget.train_macs), f"budget.train_macs={budget.train_macs:.4g}"))
    if not limits:
        return run
    steps, key = min(limits)
    if steps * batch <= run.train.warmup_images:
        raise UserError(
            f"{key} allows {steps} steps of {batch} images, and the warm-up alone needs "
            f"train.warmup_images={run.train.warmup_images}. "
            "Give a larger budget, or a smaller train.batch or train.warmup_images."
        )
    return dataclasses.replace(run, train=dataclasses.replace(run.train, images=steps * batch))


def _steps_of(run: RunConfig, macs: float) -> int:
    """How many steps the MACs allow after the cost of the earlier stages."""
    earlier = sum(stage_macs(run, stage) for stage in get_spec(run.method).stages)
    if earlier >= macs:
        raise UserError(
            f"budget.train_macs={macs:.4g} leaves nothing for this run: the earlier stages alone cost {earlier:.4g} "
            "MACs. Give a larger budget."
        )
    cost, batch = macs_of(run), run.train.batch
    return bisect_right(range(MAX_STEPS), macs - earlier, key=lambda steps: cost(steps * batch)) - 1


def stage_macs(run: RunConfig, stage: Stage) -> int:
    """MACs of an earlier stage, whether this run will train it, a finished run has, or its weights are in the package.

    Weights that other people released count 0, as they do in records.
    """
    from pixlat.evaluation.records.parents import shipped_run
    from pixlat.launch.job.stages import stage_runs

    key, place = stage.key, getattr(run.model, stage.key)
    if waiting := stage_runs(run).get(key):
        return macs_of(waiting)(waiting.train.images)
    if place in stage.shipped:
        return int(shipped_run(stage, place)["macs_total"])
    if place is None or not (Path(place) / "config.yaml").exists():
        return 0
    if not (Path(place) / RESULT).exists():
        raise UserError(
            f"budget: the cost of model.{key}={place} is not known, because that run is not finished. Finish it first."
        )
    return int(read_record(Path(place) / RESULT)["train"]["macs_total"])


def macs_of(run: RunConfig) -> Callable[[int], int]:
    """A function from a number of training images to the MACs of training on them.

    It counts the frozen networks' cached outputs as if they were all computed early, so no run exceeds its budget.
    """
    from pixlat.common.accounting.macs import training_cost
    from pixlat.common.datasets.load import summarise
    from pixlat.methods import get_class
    from pixlat.methods.base import DataInfo

    info = DataInfo.of(summarise(run.data))
    cost, distinct = training_cost(get_class(run.method), run.model, info), info.num_train * (2 if run.data.flip else 1)
    return lambda images: cost.total(images, min(images, distinct), run.train.batch)
