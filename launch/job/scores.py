"""Scores of a run: while it trains (curve.jsonl) and at its end (result.json)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from accelerate.utils import broadcast_object_list

from pixlat.common.cache import features_folder
from pixlat.common.config.resolve import evaluated_ema
from pixlat.common.files import write_whole
from pixlat.common.hardware import peak_bytes, reset_peak
from pixlat.common.pictures.grids import spread
from pixlat.common.training.state import TrainState
from pixlat.common.training.steps import total_steps
from pixlat.evaluation.protocols.identity import protocol_hash
from pixlat.evaluation.records.curve import CURVE, curve_lines, read_curve
from pixlat.evaluation.records.record import write_record
from pixlat.evaluation.score.embedded import Evaluation, evaluate_method
from pixlat.evaluation.score.reconstruction import evaluate_reconstruction
from pixlat.launch.job import record
from pixlat.launch.job.folder import RESULT
from pixlat.launch.job.job import Grid, Job
from pixlat.launch.job.remarks import sample_remarks


def score(job: Job, state: TrainState) -> Evaluation:
    """The scores of the current weights. Each call uses the same noise and labels."""
    with state.weights(evaluated_ema(job.run)) as method:
        settings = (method, job.run, job.source, job.accelerator.device, features_folder(Path(job.run.out)))
        if not job.generates:
            return evaluate_reconstruction(*settings)
        met = [dataclasses.asdict(component) for component in method.components()], job.earlier
        return evaluate_method(*settings, met=met)


def score_preview(job: Job, state: TrainState) -> None:
    """Appends a line to curve.jsonl during training. The last step gets no line, since its scores are the record's."""
    images = state.step * job.run.train.batch
    points = read_curve(job.folder / CURVE)
    known = state.step == state.start and any(point["images"] == images for point in points)
    if state.step == total_steps(job.run.train) or broadcast_object_list([known])[0]:
        return
    scores = score(job, state)
    if job.main:
        macs = record.training_macs(job.run, job.training_cost, job.source, state.step, job.accelerator.num_processes)
        point = {
            "images": images,
            "macs_train": macs,
            "protocol_hash": protocol_hash(scores.protocol),
            "metrics": scores.metrics,
        }
        # later points come from a start that stopped before it saved those steps
        earlier = [each for each in points if each["images"] < images]
        write_whole(job.folder / CURVE, curve_lines([*earlier, point]))


def evaluate_job(job: Job, state: TrainState, training_peak: int, grid: Grid | None) -> None:
    """Samples and scores the run, then writes result.json, which marks it as scored."""
    reset_peak(job.accelerator.device)
    result = score(job, state) if job.run.eval.num_images else None
    if job.main:
        training = job.source.train
        remarks = (
            sample_remarks(grid[0], training.fetch(spread(len(training), len(grid[0])))) if grid and state.step else []
        )
        peaks = (training_peak, peak_bytes(job.accelerator.device))
        built = record.build(
            job.run,
            job.model,
            job.earlier,
            job.folder,
            job.source,
            job.info,
            job.training_cost,
            state,
            result,
            peaks,
            remarks,
        )
        write_record(built, job.folder / RESULT)
