"""From a finished run to its row of the leaderboard (`evaluation/records/result.v1.schema.json`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixlat.common.accounting.macs import TrainingCost, on_meta, sampling_cost
from pixlat.common.config.identity import config_entry
from pixlat.common.config.resolve import evaluated_ema, sampling_seeds, settings_tried
from pixlat.common.config.schema import RunConfig
from pixlat.common.datasets.batches import TrainingPlan
from pixlat.common.datasets.load import DataSource
from pixlat.common.files import read_rows
from pixlat.common.hardware import device_name, peak_kind
from pixlat.common.origin import code_state
from pixlat.common.precision import executed_precision
from pixlat.common.training.state import TrainState
from pixlat.common.training.steps import split_batch
from pixlat.common.weights import checkpoint
from pixlat.evaluation.records.contact import contact_fields
from pixlat.evaluation.records.parents import stage_digests
from pixlat.evaluation.records.record import Record, build_record
from pixlat.evaluation.records.selection import selection_of_preset
from pixlat.evaluation.score.embedded import Evaluation
from pixlat.evaluation.score.models import cost_fields, system_fields
from pixlat.evaluation.score.origin import networks_used
from pixlat.evaluation.score.outcome import speed_fields
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo


def build(
    run: RunConfig,
    model: Any,
    earlier: list[dict[str, Any]],
    folder: Path,
    source: DataSource,
    info: DataInfo,
    cost: TrainingCost,
    state: TrainState,
    evaluation: Evaluation | None,
    peaks: tuple[int, int],
    remarks: Sequence[str] = (),
) -> Record:
    """The validated record.

    model: `run.model` with the folders of earlier stages in the place of `train`.
    earlier: their entries by `evaluation.records.parents.earlier_runs`.
    peaks: bytes in training and in sampling. remarks: visible faults of the samples.
    """
    method_class = get_class(run.method)
    method = on_meta(method_class, model, info)
    description = state.method.describe(run.sample)
    sampling, processes = sampling_cost(method, run.sample), state.accelerator.num_processes
    where = state.accelerator.device
    device, dtype = device_name(where), executed_precision(run.eval.precision, where)
    images_seen = state.step * run.train.batch
    assert state.saved is not None
    pretrained = [dataclasses.asdict(component) for component in description.pretrained]
    protocol = evaluation.protocol if evaluation else None
    fields: dict[str, Any] = {
        "name": folder.name,
        "system": system_fields(run, description, method.space),
        "data": {
            "name": source.info.name,
            "revision": source.info.digest,
            "resolution": source.info.image_size,
            "num_classes": source.info.num_classes,
            "train_images": source.info.num_train,
        },
        "checkpoint": {
            "sha256": checkpoint.digest(state.saved),
            "step": state.step,
            "ema_decay": next((ema.decay for ema in state.emas if ema.name == evaluated_ema(run)), None),
            "ema_kind": evaluated_ema(run),
        },
        "code": code_state(),
        "seeds": {"train": run.seed, "sample": sampling_seeds(run)},
        "train": {
            "epochs": images_seen / max(1, source.info.num_train),
            "images_seen": images_seen,
            "batch": run.train.batch,
            "precision": executed_precision(run.train.precision, where),
            "optimizer": ", ".join(
                sorted({type(o).__name__ for optimizers in state.optimizers.values() for o in optimizers})
            ),
            "macs_total": training_macs(run, cost, source, state.step, processes),
            "device_seconds": state.seconds * processes,
            "device": device,
            "images_per_s": images_seen / state.seconds if state.seconds else None,
            "budget": dataclasses.asdict(run.budget),
        },
        "pretrained_components": pretrained,
        "parents": earlier,
        **contact_fields(networks_used(state.method, description), earlier, protocol),
        "config": config_entry(run, get_spec(run.method), stage_digests(earlier)),
        **cost_fields(method, description, sampling, dtype),
        "speed": speed_fields(evaluation, run.eval.batch, dtype, device, run.train.compile),
        "memory": {
            "peak_bytes_train": peaks[0],
            "peak_bytes_sample": peaks[1],
            "kind": peak_kind(state.accelerator.device),
        },
        "protocol": protocol,
        "selection": selection_of_preset(settings_tried(get_spec(run.method), run.preset)),
        "metrics": evaluation.metrics if evaluation else {},
        **(evaluation.judged if evaluation else {}),
        "artifacts": artifacts(folder, method_class.task == "generation", method.space != "pixel"),
        "notes": " ".join(
            [
                *remarks,
                *(
                    [f"{len(source.train.broken)} unreadable training images were skipped."]
                    if source.train.broken
                    else []
                ),
            ]
        ),
    }
    return build_record(fields)


def training_macs(run: RunConfig, cost: TrainingCost, source: DataSource, step: int, processes: int) -> int:
    """MACs of the first `step` steps on so many processes, if nothing interrupts them.

    A resumed run starts with an empty feature cache and computes cached features again, which is not counted.
    """
    encoded = 0
    if cost.encoding:
        plan = TrainingPlan(
            source.train.labels, run.train.batch, run.seed, source.balanced, run.data.flip, run.data.crop == "random"
        )
        encoded = plan.distinct(step, split_batch(run.train, processes)[0], processes)
    return cost.total(step * run.train.batch, encoded, run.train.batch)


def artifacts(folder: Path, generates: bool, encodes: bool) -> dict[str, str | None]:
    """The log, and the pictures that `launch.job.pictures.draw_job` draws after the record.

    A later start draws those that are missing.
    """
    logged = bool(read_rows(folder / "metrics.jsonl"))
    there = {
        "grid_png": ("samples.png", generates),
        "reconstruction_png": ("reconstruction.png", encodes),
        "neighbours_png": ("neighbours.png", generates),
        "curve_png": ("training.png", logged),
        "log": ("metrics.jsonl", logged),
    }
    return {key: name if exists else None for key, (name, exists) in there.items()}
