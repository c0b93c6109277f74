"""What a run does, from its configuration to its record and pictures: train, evaluate, write, draw. The same on a laptop and in a cluster's job.

Every part can be repeated: a run that was stopped anywhere goes on from what is whole in its folder.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray

from common import checkpoint
from common.config import RunConfig, evaluated_ema, identity, run_folder
from common.cost import TrainingCost, training_cost
from common.data_notes import data_notes
from common.datasets import ON_DISK, DataSource, load_data
from common.errors import UserError
from common.files import read_rows, write_whole
from common.hardware import peak_bytes, reset_peak
from common.loader import TrainingPlan, training_batches
from common.pictures import image_grid, merged, nearest, neighbour_picture, save_png, training_curves
from common.precision import computing_in
from common.processes import started_processes
from common.progress import say_last
from common.seeds import derive
from common.trainer import Stopped, TrainState, make_accelerator, split_batch, total_steps, train
from evaluation import leaderboard
from evaluation.curve import CURVE, curve_lines, read_curve
from evaluation.evaluate import Evaluation, evaluate_method
from evaluation.generate import generate, quantise
from evaluation.protocol import protocol_hash
from evaluation.ranks import sum_over_ranks
from evaluation.reconstruction import evaluate_reconstruction
from evaluation.record import read_record, write_record
from launch import record
from launch.dry_run import describe_run
from launch.failures import explain
from launch.folder import RESULT, is_finished, locked, open_folder, record_data, removed_if_refused
from launch.provenance import record_start
from launch.remarks import sample_remarks, warning_lines
from launch.stages import earlier_runs, hold_to_stages, stage_runs, with_stages
from methods import get_class
from methods.base import DataInfo, Method

GRID_CLASSES = 10  # rows of the sample grid where there are more classes
GRID_SEED = 0  # the same for every method, so that grids can be laid side by side
RECONSTRUCTION_ROWS = 2
NEIGHBOUR_SAMPLES = 20
HELD_OUT_SAMPLES = 500
NEIGHBOUR_SEARCH = 20_000  # training images searched at most

Grid: TypeAlias = tuple[NDArray[np.uint8], list[str]]  # images (N, 3, H, W) row by row, and the names of the rows

# Samples, their nearest training images (both uint8), their distances, and those of held-out images: the arguments of `neighbour_picture`
FoundNeighbours: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64] | None]


@dataclass(frozen=True)
class Job:
    """One run, with what its parts share."""

    run: RunConfig
    model: Any  # `run.model` with the run folders of earlier stages in place
    folder: Path
    source: DataSource
    info: DataInfo
    accelerator: Accelerator

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @cached_property
    def earlier(self) -> list[dict[str, Any]]:
        """The runs that this one is built on, for the record; looked up once, since every file of their checkpoints is verified."""
        return earlier_runs(self.run, self.model)

    @cached_property
    def training_cost(self) -> TrainingCost:
        """MACs of the training; counted once, since a count runs the method on shapes."""
        return training_cost(get_class(self.run.method), self.model, self.info)

    @property
    def generates(self) -> bool:
        return get_class(self.run.method).task == "generation"


def run_all(runs: Sequence[RunConfig]) -> int:
    """Runs one after the other; a run that fails, runs out of memory or finds the disk full does not keep the next from starting.

    Returns the exit code: that of the last failure, 0 without one.
    """
    code = 0
    for number, run in enumerate(runs):
        if len(runs) > 1:
            print(f"\nrun {number + 1} of {len(runs)}: {run_folder(run)}", file=sys.stderr)
        try:
            told = "\n\n".join(describe_run(each) for each in (*stage_runs(run).values(), run)) if run.dry_run else run_one(run)
            if told:  # the main process speaks for all
                print(told)
        except Stopped as stopped:
            say_last(str(stopped))
            return 128 + stopped.signal_number
        except KeyboardInterrupt:
            say_last(f"interrupted; what is whole is kept in {run_folder(run)}. Run the same command again to go on.")
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
            if started_processes() > 1:  # the others may still wait for this one: the launcher ends them when it ends
                return code
        release_memory()
    return code


def release_memory() -> None:
    """Gives back what a run that is over has left behind, so that the next one has it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_one(run: RunConfig) -> str:
    """Trains, samples, evaluates and records one run, after the stages that it waits for, or finds it finished. Returns what to tell the user."""
    source = load_data(run.data)
    info = DataInfo.of(source.info)
    method_class = get_class(run.method)
    if info.latents and not method_class.takes_moments:
        raise UserError(f"data.latents={run.data.latents} is not read by method={run.method}, which has no autoencoder's latents. Leave it out.")
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


def agreed(answer: bool) -> bool:
    """The main process's answer, in all processes: on a network file system each of them may see other files."""
    return bool(broadcast_object_list([answer])[0])


def finish(job: Job) -> None:
    """Does what the folder lacks: training and evaluation where there is no record, and the pictures that the record names.

    Whoever waited for the lock may find all of it done. The pictures come last, behind everything in which processes wait for each other: the main
    process draws while the others have left, and a start that was stopped while it drew has its scores already.
    """
    if agreed(is_finished(job.folder)):
        return
    if job.main:
        for note in data_notes(job.info, job.run.train.images, job.run.data.path, job.run.data.name in ON_DISK):
            print(f"note: {note}", file=sys.stderr)
        hold_to_stages(job.folder, job.earlier)
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
    """Runs an earlier stage to its end and says so."""
    print(f"{run_folder(waiting)} needs {run_folder(stage)}, which comes first", file=sys.stderr)
    if told := run_one(stage):
        print(told, "\n", file=sys.stderr)


def train_job(job: Job) -> TrainState:
    """Trains the method, or takes up its newest checkpoint."""
    run = job.run
    torch.manual_seed(derive("init", run.seed))
    method = get_class(run.method)(job.model, job.info)
    method.load_external()
    plan = TrainingPlan(job.source.train.labels, run.train.batch, run.seed, job.source.balanced, run.data.flip, run.data.crop == "random")
    batches = partial(_batches, job, plan)
    interludes = [(run.train.preview_images, partial(draw_preview, job)), (run.eval.every_images if run.eval.num_images else 0, partial(score_preview, job))]
    where = (job.folder, run.seed, identity(run), job.accelerator)
    return train(method, run.train, batches, *where, interludes, run.cluster.sharding, evaluated_ema(run))


def _batches(job: Job, plan: TrainingPlan, start_step: int, accumulation: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    accelerator = job.accelerator
    place = (accelerator.process_index, accelerator.num_processes)
    pin = accelerator.device.type == "cuda"
    needs_images = get_class(job.run.method).needs_images(job.info)
    micro_batch = plan.batch // (accumulation * accelerator.num_processes)
    return training_batches(job.source.train, plan, start_step, micro_batch, accumulation, *place, job.run.data.workers, pin, needs_images)


# -- pictures -------------------------------------------------------------------------------------------------------------------


def sample_grid(job: Job, method: Method, together: bool = False) -> Grid:
    """(rows * columns, 3, H, W) uint8 images, row by row, and the class names of the rows.

    together: all processes make their share and get the whole; otherwise this process makes all of it. The images are the same.
    """
    classes = spread(job.info.num_classes, GRID_CLASSES)
    labels = classes.repeat(job.run.eval.grid_columns)
    images = torch.zeros(len(labels), job.info.channels, job.info.image_size, job.info.image_size, dtype=torch.uint8)
    settings = job.run.eval
    where = (settings.batch, job.accelerator.device, settings.precision, settings.uint8)
    for batch, indices in generate(method, job.run.sample, labels, GRID_SEED, *where, distributed=together):
        images[indices] = batch.cpu()
    if together:
        sum_over_ranks(images)  # zeros from all processes but one
    return images.numpy(), [job.source.info.class_names[c] for c in classes]


def final_grid(job: Job, state: TrainState) -> Grid:
    """The sample grid of the finished training, made by all processes together."""
    with state.weights(evaluated_ema(job.run)) as method:
        return sample_grid(job, method, together=True)


def draw_preview(job: Job, state: TrainState) -> None:
    """A small grid during training, from the main process; the weights may take all processes to put together.

    The other processes wait for it in the next step, at most cluster.collective_timeout_min minutes. A grid takes seconds or minutes.
    """
    picture = job.folder / f"previews/images-{state.step * job.run.train.batch:09d}.png"
    with state.preview_weights(evaluated_ema(job.run)) as method:
        if job.main and not (state.step == state.start and picture.exists()):
            picture.parent.mkdir(exist_ok=True)
            images, names = sample_grid(job, method) if job.generates else reconstruction_grid(job, method)
            save_png(image_grid(images, job.run.eval.grid_columns, names), picture)


def draw_job(job: Job, state: TrainState, grid: Grid | None) -> None:
    """training.png; samples.png and neighbours.png of what generates; reconstruction.png of what encodes.

    All processes search for neighbours. The main process draws after the last wait, and the others are free.
    """
    with state.weights(evaluated_ema(job.run)) as method:
        neighbours = find_neighbours(job, grid[0]) if grid else None
        if job.main:
            draw_pictures(job, method, grid, neighbours)


def draw_pictures(job: Job, method: Method, grid: Grid | None, neighbours: FoundNeighbours | None) -> None:
    """The pictures of a run that has its weights, from one process."""
    columns = job.run.eval.grid_columns
    rows = read_rows(job.folder / "metrics.jsonl")
    if rows:
        training_curves(rows, job.folder / "training.png")
    if method.space != "pixel":
        images, names = reconstruction_grid(job, method)
        save_png(image_grid(images, columns, names), job.folder / "reconstruction.png")
    if grid:
        save_png(image_grid(grid[0], columns, grid[1]), job.folder / "samples.png")
    if neighbours:
        save_png(neighbour_picture(*neighbours), job.folder / "neighbours.png")


def reconstruction_grid(job: Job, method: Method) -> tuple[NDArray[np.uint8], list[str]]:
    """Held-out images (training images where none are held out) in one row, what encode and decode make of them in the next."""
    source = job.source.heldout if len(job.source.heldout) else job.source.train
    real = source.fetch(spread(len(source), RECONSTRUCTION_ROWS * job.run.eval.grid_columns))
    with torch.no_grad(), computing_in(job.run.eval.precision, job.accelerator.device):
        inputs = torch.from_numpy(real).to(job.accelerator.device).float() / 127.5 - 1
        rebuilt = torch.cat([quantise(method.decode(method.encode(part)), job.run.eval.uint8) for part in inputs.split(job.run.eval.batch)]).cpu().numpy()
    columns = job.run.eval.grid_columns
    rows = [images[start : start + columns] for start in range(0, len(real), columns) for images in (real, rebuilt)]
    return np.concatenate(rows), ["real", "rebuilt"] * (len(rows) // 2)


def spread(length: int, count: int) -> NDArray[np.int64]:
    """At most `count` positions, evenly spaced over a sequence that may be sorted by class or style."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


def find_neighbours(job: Job, grid: NDArray[np.uint8]) -> FoundNeighbours:
    """For neighbours.png: samples with their nearest training images, and the distances of real held-out images to judge them by.

    Every process searches its share of the training images; a GPU compares them, a CPU where there is none.
    """
    training, held_out, accelerator = job.source.train, job.source.heldout, job.accelerator
    rng = np.random.Generator(np.random.PCG64(derive("neighbours", job.run.seed)))
    positions = rng.permutation(len(training))[:NEIGHBOUR_SEARCH]
    share = np.sort(positions)[accelerator.process_index :: accelerator.num_processes]
    samples = grid[spread(len(grid), NEIGHBOUR_SAMPLES)]
    real = held_out.fetch(spread(len(held_out), HELD_OUT_SAMPLES)) if len(held_out) else samples[:0]
    device = accelerator.device if accelerator.device.type == "cuda" else "cpu"
    part = nearest(np.concatenate([samples, real]), training, job.run.data.flip, share, device)
    found = merged(gather_object([part]))
    count = len(samples)
    images = training.fetch(found.indices[:count], found.mirrored[:count])
    return samples, images, found.distances[:count], found.distances[count:] if len(real) else None


# -- evaluation -----------------------------------------------------------------------------------------------------------------


def score(job: Job, state: TrainState) -> Evaluation:
    """The scores of the run as it is now; noise and labels are the same whenever it is asked."""
    with state.weights(evaluated_ema(job.run)) as method:
        evaluate = evaluate_method if job.generates else evaluate_reconstruction
        return evaluate(method, job.run, job.source, job.accelerator.device, cache=Path(job.run.out) / ".references")


def score_preview(job: Job, state: TrainState) -> None:
    """A line of curve.jsonl during training; the end of the training has none, its scores are the record's."""
    images = state.step * job.run.train.batch
    points = read_curve(job.folder / CURVE)
    known = state.step == state.start and any(point["images"] == images for point in points)
    if state.step == total_steps(job.run.train) or broadcast_object_list([known])[0]:
        return
    scores = score(job, state)
    if job.main:
        macs = record.training_macs(job.run, job.training_cost, job.source, state.step, job.accelerator.num_processes)
        point = {"images": images, "macs_train": macs, "protocol_hash": protocol_hash(scores.protocol), "metrics": scores.metrics}
        earlier = [each for each in points if each["images"] < images]  # later ones are of a start whose last steps were lost
        write_whole(job.folder / CURVE, curve_lines([*earlier, point]))


def evaluate_job(job: Job, state: TrainState, training_peak: int, grid: Grid | None) -> None:
    """Samples, scores, and writes result.json, which marks the run as scored."""
    reset_peak(job.accelerator.device)
    result = score(job, state) if job.run.eval.num_images else None
    if job.main:
        training = job.source.train
        remarks = sample_remarks(grid[0], training.fetch(spread(len(training), len(grid[0])))) if grid and state.step else []
        peaks = (training_peak, peak_bytes(job.accelerator.device))
        built = record.build(job.run, job.model, job.earlier, job.folder, job.source, job.info, job.training_cost, state, result, peaks, remarks)
        write_record(built, job.folder / RESULT)


def summary(job: Job) -> str:
    """The leaderboard of the runs beside this one that share its protocol, this run's scores, and the files that it made."""
    row = read_record(job.folder / RESULT)
    records = leaderboard.read_records(Path(job.run.out))
    warnings = warning_lines(row, records.rows)
    made = [job.folder / name for name in (*row["artifacts"].values(), RESULT) if name]
    newest = checkpoint.latest(job.folder / "checkpoints")
    return "\n".join(
        [
            leaderboard.summary(records, row["protocol_hash"]),
            "\nthis run",
            *(f"  {name:<20} {entry['value']:.4g}{error_of(entry)}" for name, entry in row["metrics"].items()),
            *(["\nwarnings", *warnings] if warnings else []),
            "\nfiles",
            *(f"  {path}" for path in [*made, *([newest] if newest else [])]),
            f"all runs: python evaluation/leaderboard.py --runs {job.run.out}",
        ]
    )


def error_of(entry: Mapping[str, Any]) -> str:
    """ " ± 0.1" for a metric with a standard error."""
    return "" if entry.get("se") is None else f" ± {entry['se']:.2g}"
