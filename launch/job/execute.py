"""Executes a run from its configuration to its record and pictures: train, evaluate, write, draw.

The code path on a laptop is the same as in a cluster's job. Each part can be repeated, so a run that was stopped
anywhere continues from the complete files in its folder.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from pixlat.common.config.identity import identity, run_folder
from pixlat.common.config.resolve import evaluated_ema
from pixlat.common.config.schema import RunConfig
from pixlat.common.datasets.batches import TrainingPlan, training_batches
from pixlat.common.datasets.load import ON_DISK, load_data
from pixlat.common.datasets.notes import data_notes
from pixlat.common.errors import UserError
from pixlat.common.hardware import peak_bytes
from pixlat.common.processes import started_processes
from pixlat.common.progress import say_last
from pixlat.common.seeds import derive
from pixlat.common.training.loop import Stopped, train
from pixlat.common.training.setup import make_accelerator
from pixlat.common.training.state import TrainState
from pixlat.common.training.steps import split_batch
from pixlat.evaluation.judges.panel import check_judges
from pixlat.launch.job.dry_run import describe_run
from pixlat.launch.job.failures import explain
from pixlat.launch.job.folder import RESULT, is_finished, locked, open_folder, record_data, removed_if_refused
from pixlat.launch.job.job import Job, agreed
from pixlat.launch.job.pictures import draw_job, draw_preview, final_grid
from pixlat.launch.job.provenance import record_start
from pixlat.launch.job.scores import evaluate_job, score_preview
from pixlat.launch.job.stages import record_or_check_stages, stage_runs, with_stages
from pixlat.launch.job.summary import summary
from pixlat.methods import get_class
from pixlat.methods.base import DataInfo


def run_all(runs: Sequence[RunConfig]) -> int:
    """Executes the runs one after the other. If one fails, for example on a full disk, the next one still starts.

    Returns the exit code of the last failure, or 0.
    """
    code = 0
    for number, run in enumerate(runs):
        if len(runs) > 1:
            print(f"\nrun {number + 1} of {len(runs)}: {run_folder(run)}", file=sys.stderr)
        try:
            message = (
                "\n\n".join(describe_run(each) for each in (*stage_runs(run).values(), run))
                if run.dry_run
                else run_one(run)
            )
            if message:  # only the main process has one
                print(message)
        except Stopped as stopped:
            say_last(str(stopped))
            return 128 + stopped.signal_number
        except KeyboardInterrupt:
            say_last(f"interrupted. Finished files are in {run_folder(run)}; run the same command again to continue.")
            return 128 + signal.SIGINT
        except UserError as error:
            say_last(f"error: {error}")
            code = 2
        except Exception as error:
            reason = explain(error, run_folder(run))
            if reason is None:
                raise
            say_last(f"error: {reason}")
            code = 1
            if started_processes() > 1:  # other processes may wait for this one; when it exits, the launcher ends them
                return code
        release_memory()
    return code


def release_memory() -> None:
    """Frees the memory that a finished run still holds, so that the next run can use it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_one(run: RunConfig) -> str:
    """Trains, samples, evaluates and records one run, after the earlier stages that it needs, unless it is finished.

    Returns the summary for the user; an empty string in all processes but the main one.
    """
    source = load_data(run.data)
    info = DataInfo.of(source.info)
    check_judges(run.eval.judges, source.info)
    method_class = get_class(run.method)
    if info.latents and not method_class.takes_moments:
        raise UserError(
            f"method={run.method} does not read data.latents={run.data.latents}, "
            "because it does not work on the latents of an autoencoder. Remove data.latents."
        )
    with torch.device("meta"):
        method_class(run.model, info)  # refuses impossible settings before anything is allocated or written
    model = with_stages(run, partial(train_stage, waiting=run))
    accelerator = make_accelerator(run.train, run_folder(run), run.cluster.collective_timeout_min)
    split_batch(run.train, accelerator.num_processes)
    new = accelerator.is_main_process and not run_folder(run).exists()
    with accelerator.main_process_first():
        folder = open_folder(run) if accelerator.is_main_process else run_folder(run)
    job = Job(run, model, folder, source, info, accelerator)
    if agreed(is_finished(folder)):
        end = f"\n\n{folder} is finished. Change a setting for a new run, or remove the folder to repeat it."
    else:
        end = ""
        with locked(folder, enabled=job.main), removed_if_refused(folder, enabled=new):
            finish(job)
    return summary(job) + end if job.main else ""


def finish(job: Job) -> None:
    """Does what the folder lacks: training and evaluation if it has no record, then the pictures in the record.

    A process that waited for the lock may find all of it done. The main process draws the pictures last, after all
    collectives, when the other processes may have left. So a start that is stopped while it draws keeps its scores.
    """
    if agreed(is_finished(job.folder)):
        return
    if job.main:
        for note in data_notes(job.info, job.run.train.images, job.run.data.path, job.run.data.name in ON_DISK):
            print(f"note: {note}", file=sys.stderr)
        record_or_check_stages(job.folder, job.earlier)
        record_data(job.folder, job.source.info)
        record_start(job.folder)
    recorded = agreed((job.folder / RESULT).exists())
    state = train_job(job)
    peak = peak_bytes(job.accelerator.device)
    grid = final_grid(job, state) if job.generates else None
    if not recorded:
        evaluate_job(job, state, peak, grid)
    draw_job(job, state, grid)


def train_stage(stage: RunConfig, waiting: RunConfig) -> None:
    """Executes an earlier stage, and says which run needs it."""
    print(f"{run_folder(waiting)} needs {run_folder(stage)}, which comes first", file=sys.stderr)
    if message := run_one(stage):
        print(message, "\n", file=sys.stderr)


def train_job(job: Job) -> TrainState:
    """Trains the method from the start or from its newest checkpoint."""
    run = job.run
    torch.manual_seed(derive("init", run.seed))
    method = get_class(run.method)(job.model, job.info)
    method.load_external()
    plan = TrainingPlan(
        job.source.train.labels,
        run.train.batch,
        run.seed,
        job.source.balanced,
        run.data.flip,
        run.data.crop == "random",
    )
    batches = partial(_batches, job, plan)
    interludes = [
        (run.train.preview_images, partial(draw_preview, job)),
        (run.eval.every_images if run.eval.num_images else 0, partial(score_preview, job)),
    ]
    where = (job.folder, run.seed, identity(run), job.accelerator)
    return train(method, run.train, batches, *where, interludes, run.cluster.sharding, evaluated_ema(run))


def _batches(
    job: Job, plan: TrainingPlan, start_step: int, accumulation: int
) -> Iterator[list[dict[str, torch.Tensor]]]:
    accelerator = job.accelerator
    place = (accelerator.process_index, accelerator.num_processes)
    pin = accelerator.device.type == "cuda"
    needs_images = get_class(job.run.method).needs_images(job.info)
    micro_batch = plan.batch // (accumulation * accelerator.num_processes)
    return training_batches(
        job.source.train, plan, start_step, micro_batch, accumulation, *place, job.run.data.workers, pin, needs_images
    )
