"""Measures the memory of a training step, and the effect of settings that do not change the mathematics.

Every measurement runs in a new process.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.methods import get_class

# With these settings glibc maps every tensor separately and returns its memory when the tensor is freed. The memory of
# the process is then the memory of its tensors.
EXACT_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

PLAIN = {"train.recompute_blocks": "false", "train.compile": "false"}
VARIANTS = {
    "plain": {},
    "blocks recomputed": {"train.recompute_blocks": "true"},
    "blocks compiled": {"train.compile": "true"},
    "blocks compiled and recomputed": {"train.compile": "true", "train.recompute_blocks": "true"},
    "exact attention": {"model.attention": "reference"},
    "frozen networks' outputs kept": {"model.remember": "true"},
}


def with_exact_allocator() -> None:
    """Restarts this process with the allocator settings that the measurement needs, unless they are already set."""
    if not EXACT_ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | EXACT_ALLOCATOR)


def measure_memory(run: RunConfig, batch: int) -> dict[str, Any]:
    """Peak bytes of a training step, measured and as predicted by common/accounting/memory.py.

    The measured number is the peak minus the bytes that remain after the method is deleted. Neither includes averages
    of the weights.
    """
    from pixlat.common.accounting.memory import step_memory
    from pixlat.common.hardware import reset_peak, tensor_bytes, tensor_peak_bytes
    from pixlat.common.training.setup import make_accelerator
    from pixlat.evaluation.bench.steps import build, training_step

    accelerator = make_accelerator(run.train)
    method = build(run, accelerator.device)
    data, train = (
        method.data,
        dataclasses.replace(run.train, precision=accelerator.mixed_precision, ema_decay=[], ema_halflife_images=[]),
    )
    step = training_step(method, run, batch, accelerator)
    step()
    reset_peak(accelerator.device)
    step()
    peak = tensor_peak_bytes(accelerator.device)
    del method, step
    accelerator.free_memory()
    gc.collect()
    taken = peak - tensor_bytes(accelerator.device)
    if taken <= 0:
        raise UserError(
            f"a training step of {run.method} with speed.batch={batch} needs too little memory to measure. "
            "Raise speed.batch."
        )
    predicted = step_memory(get_class(run.method), run.model, train, data, batch).peak
    facts = {"method": run.method, "preset": run.preset, "batch": batch}
    return facts | {"step_bytes": taken, "predicted_bytes": predicted, "error": predicted / taken - 1}


def compare_knobs(arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Training rate and memory of each variant of one configuration, and both relative to the plain one."""
    from pixlat.evaluation.bench.options import configurations

    run, _ = next(configurations(arguments))
    plain: dict[str, Any] = {}
    for name, settings in possible(run):
        given = [*arguments, *(f"{key}={value}" for key, value in settings.items())]
        row = {
            "images_per_s": measured(*given, "speed.sample=false")["train"]["images_per_s"],
            "step_bytes": measured("memory", *given)["step_bytes"],
        }
        plain = plain or row
        yield {"variant": name} | row | {f"{key}_to_plain": row[key] / plain[key] for key in row}


def possible(run: RunConfig) -> Iterator[tuple[str, dict[str, str]]]:
    """(name, settings) of the variants that the method supports."""
    known = {f"model.{field.name}" for field in dataclasses.fields(run.model)}
    without_cache = {key: "false" for key in ("model.remember",) if key in known}
    for name, settings in VARIANTS.items():
        if all(key in known for key in settings if key.startswith("model.")):
            yield name, PLAIN | without_cache | settings


def measured(*arguments: str) -> dict[str, Any]:
    """The JSON that `pixlat bench` prints for these arguments. It runs in a new process."""
    ended = subprocess.run(
        [sys.executable, "-m", "pixlat.evaluation.speed", *arguments], capture_output=True, text=True
    )
    if ended.returncode:
        raise UserError(ended.stderr.strip().removeprefix("error: "))
    result: dict[str, Any] = json.loads(ended.stdout)
    return result
