"""The pictures of a run: the sample grid, previews, nearest training images, reconstructions."""

from __future__ import annotations

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray

from pixlat.common.config.resolve import evaluated_ema
from pixlat.common.files import read_rows
from pixlat.common.pictures.curves import training_curves
from pixlat.common.pictures.grids import image_grid, save_png, spread
from pixlat.common.pictures.neighbours import merged, nearest, neighbour_picture
from pixlat.common.precision import computing_in
from pixlat.common.seeds import derive
from pixlat.common.training.state import TrainState
from pixlat.evaluation.features.ranks import sum_over_ranks
from pixlat.evaluation.score.generate import generate, quantise
from pixlat.launch.job.job import FoundNeighbours, Grid, Job
from pixlat.methods.base import Method

GRID_CLASSES = 10  # most rows of the sample grid
GRID_SEED = 0  # the same for every method, so that grids can be compared side by side
RECONSTRUCTION_ROWS = 2
NEIGHBOUR_SAMPLES = 20
HELD_OUT_SAMPLES = 500
NEIGHBOUR_SEARCH = 20_000  # most training images that are searched


def sample_grid(job: Job, method: Method, together: bool = False) -> Grid:
    """(rows * columns, 3, H, W) uint8 images, row by row, and the class names of the rows.

    together: each process samples its share, and all of them receive the complete grid. Otherwise this process
    samples all images. The images are the same.
    """
    classes = spread(job.info.num_classes, GRID_CLASSES)
    labels = classes.repeat(job.run.eval.grid_columns)
    images = torch.zeros(len(labels), job.info.channels, job.info.image_size, job.info.image_size, dtype=torch.uint8)
    settings = job.run.eval
    where = (settings.batch, job.accelerator.device, settings.precision, settings.uint8)
    for batch, indices in generate(method, job.run.sample, labels, GRID_SEED, *where, distributed=together):
        images[indices] = batch.cpu()
    if together:
        sum_over_ranks(images)  # each image is zero in all processes but one
    return images.numpy(), [job.source.info.class_names[c] for c in classes]


def final_grid(job: Job, state: TrainState) -> Grid:
    """The sample grid after the training, which all processes sample together."""
    with state.weights(evaluated_ema(job.run)) as method:
        return sample_grid(job, method, together=True)


def draw_preview(job: Job, state: TrainState) -> None:
    """Draws a small grid during training in the main process.

    All processes take part in gathering the weights. Then the others wait in the next step, for at most
    cluster.collective_timeout_min minutes; a grid takes seconds or minutes.
    """
    picture = job.folder / f"previews/images-{state.step * job.run.train.batch:09d}.png"
    with state.preview_weights(evaluated_ema(job.run)) as method:
        if job.main and not (state.step == state.start and picture.exists()):
            picture.parent.mkdir(exist_ok=True)
            images, names = sample_grid(job, method) if job.generates else reconstruction_grid(job, method)
            save_png(image_grid(images, job.run.eval.grid_columns, names), picture)


def draw_job(job: Job, state: TrainState, grid: Grid | None) -> None:
    """Draws training.png, samples.png and neighbours.png of generators, reconstruction.png of latent methods.

    All processes search for neighbours. After that no process waits for another, and the main process draws alone.
    """
    with state.weights(evaluated_ema(job.run)) as method:
        neighbours = find_neighbours(job, grid[0]) if grid else None
        if job.main:
            draw_pictures(job, method, grid, neighbours)


def draw_pictures(job: Job, method: Method, grid: Grid | None, neighbours: FoundNeighbours | None) -> None:
    """Draws the pictures of a trained run, in one process."""
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
    """Rows of held-out images, each above the row of their reconstructions. Without held-out images: training images.

    Returns the images (N, 3, H, W) uint8 row by row, and the names of the rows.
    """
    source = job.source.heldout if len(job.source.heldout) else job.source.train
    real = source.fetch(spread(len(source), RECONSTRUCTION_ROWS * job.run.eval.grid_columns))
    with torch.no_grad(), computing_in(job.run.eval.precision, job.accelerator.device):
        inputs = torch.from_numpy(real).to(job.accelerator.device).float() / 127.5 - 1
        rebuilt = (
            torch.cat(
                [
                    quantise(method.decode(method.encode(part)), job.run.eval.uint8)
                    for part in inputs.split(job.run.eval.batch)
                ]
            )
            .cpu()
            .numpy()
        )
    columns = job.run.eval.grid_columns
    rows = [images[start : start + columns] for start in range(0, len(real), columns) for images in (real, rebuilt)]
    return np.concatenate(rows), ["real", "rebuilt"] * (len(rows) // 2)


def find_neighbours(job: Job, grid: NDArray[np.uint8]) -> FoundNeighbours:
    """The samples' nearest training images, and the distances of held-out images as a measure for comparison.

    Each process searches its share of the training images, on its GPU if it has one.
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
