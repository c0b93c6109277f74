"""Measures how many training images per second one core reads, decodes and crops."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pixlat.common.config.schema import RunConfig

DATA_BATCH = 32
DATA_SECONDS = 3.0


def measure_data(run: RunConfig) -> dict[str, Any]:
    """Training images per second that one core reads, decodes and crops, in file order and in random order."""
    from pixlat.common.datasets.batches import TrainingPlan
    from pixlat.common.datasets.load import load_data
    from pixlat.common.hardware import processor_name

    start = time.perf_counter()
    source = load_data(run.data)
    opened = time.perf_counter() - start
    plan = TrainingPlan(source.train.labels, DATA_BATCH, 0, balanced=False)
    count = len(source.train)
    orders: dict[str, Callable[[int], Any]] = {
        "in_order": lambda step: [(step * DATA_BATCH + i) % count for i in range(DATA_BATCH)],
        "random": lambda step: plan.indices(step)[0],
    }
    rates = {}
    for name, order in orders.items():
        source.train.fetch(order(0))
        start, step = time.perf_counter(), 0
        while time.perf_counter() - start < DATA_SECONDS:
            step += 1
            source.train.fetch(order(step))
        rates[f"images_per_s_{name}"] = step * DATA_BATCH / (time.perf_counter() - start)
    facts = {
        "data": run.data.name,
        "image_size": source.info.image_size,
        "images": count,
        "seconds_to_open": opened,
        "processor": processor_name(),
    }
    return facts | rates
