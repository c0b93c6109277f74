"""Samples the batches that a folder lacks, by all processes together, and finishes its files."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray

from pixlat.common.config.resolve import MIN_EVAL_IMAGES, settings_tried
from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of, write_whole
from pixlat.common.hardware import device_name
from pixlat.common.origin import code_state
from pixlat.common.progress import progress_bar
from pixlat.common.seeds import image_seeds
from pixlat.evaluation.records.selection import selection_of_preset
from pixlat.evaluation.score.generate import generate_batches
from pixlat.evaluation.score.models import Model
from pixlat.evaluation.score.origin import origin_of
from pixlat.evaluation.score.sample_facts import SAMPLES
from pixlat.launch.job.failures import DISK, is_memory_fault
from pixlat.launch.job.folder import locked
from pixlat.launch.job.provenance import record_start
from pixlat.launch.sampling.classes import SCORED_LAWS, class_name, described
from pixlat.launch.sampling.files import EMPTY, grid_places, row_names, write_grid, write_npz
from pixlat.launch.sampling.folder import GRID, GRID_PNG, IMAGES, NPZ, PNG, SAMPLES_NPZ, SampleFolder, to_text
from pixlat.launch.sampling.request import Order, all_facts
from pixlat.launch.sampling.source import Source, load
from pixlat.methods import get_class, get_spec

FORMAT = "pixlat-samples-1"
PATIENCE_S = 120.0  # until a network disk shows this machine the files that another machine wrote


@dataclass(frozen=True)
class Task:
    """One request with everything that it takes."""

    order: Order
    source: Source
    model: Model
    folder: SampleFolder
    labels: NDArray[np.int64]  # (n,) the class of each image
    device: torch.device

    @property
    def seeds(self) -> NDArray[np.int64]:
        """(n,) the seed of each image's random numbers."""
        return np.array(image_seeds(self.order.seed, range(self.order.n)), dtype=np.int64)


def make_samples(order: Order, source: Source, folder: SampleFolder, state: PartialState, command: str) -> str:
    """Loads the model, samples what is missing and finishes the files.

    Returns what to print: a summary in the first process, nothing in the others. The first process decides which
    batches are missing, because on a network disk each machine may see other files.
    """
    task = prepare(order, source, folder, state.device)
    first = state.is_main_process
    if first:
        folder.path.mkdir(parents=True, exist_ok=True)
    with locked(folder.path, enabled=first, choice="another to="):
        missing = broadcast_object_list([begin(task) if first else None])[0]
        if missing is None:
            told = f"{folder.path} has these {order.n:,} samples already. Change a setting and to= for others."
            return told if first else ""
        with failures_explained(folder):
            start = time.perf_counter()
            sample(task, missing, state)
            state.wait_for_everyone()
            seconds = time.perf_counter() - start
            return finish(task, command, count_images(folder, missing), seconds) if first else ""


def prepare(order: Order, source: Source, folder: SampleFolder, device: torch.device) -> Task:
    """The model on its device, and the label of each image. A method that makes no images is a UserError."""
    method = source.run.method
    if get_class(method).task != "generation":
        raise UserError(
            f"{source.name} is a run of method={method}, which rebuilds images and makes none of its own. "
            "Give the run of a generator."
        )
    model = load(source, order.average, device)
    found, expected = (model.info.num_classes, model.info.image_size), (source.num_classes, source.image_size)
    if found != expected:
        raise UserError(
            f"{source.name} has {found[0]} classes and {found[1]} px, but its data.json says {expected[0]} and "
            f"{expected[1]} px. Restore data.json, or remove it."
        )
    return Task(order, source, model, folder, order.labels(model.info.num_classes), device)


def begin(task: Task) -> list[int] | None:
    """Prepares the folder and returns the numbers of the missing batches; None if all files are finished."""
    facts = all_facts(task.order, task.source, task.model, task.labels)
    task.folder.check(facts)
    if task.folder.is_finished():
        task.folder.close()
        return None
    task.folder.open(facts)
    record_start(task.folder.path, device=device_name(task.device))
    return task.folder.missing()


def sample(task: Task, missing: Sequence[int], state: PartialState) -> None:
    """Samples this process's share of the missing batches and writes each as soon as it is made."""
    order, folder, run = task.order, task.folder, task.model.run
    numbers = missing[state.process_index :: state.num_processes]
    batches = [torch.arange(images.start, images.stop) for images in map(folder.positions, numbers)]
    settings = (task.device, run.eval.precision, run.eval.uint8)
    made = generate_batches(task.model.method, run.sample, task.labels, order.seed, batches, *settings)
    done = order.n - count_images(folder, missing)
    folder.make_places()
    with progress_bar("sampling", order.n, initial=done, enabled=state.is_main_process) as bar:
        for number, (images, indices) in zip(numbers, made, strict=True):
            folder.write(number, images.permute(0, 2, 3, 1).cpu().numpy())
            bar.update(min(len(indices) * state.num_processes, order.n - bar.n))


def count_images(folder: SampleFolder, batches: Sequence[int]) -> int:
    """The number of images in some batches."""
    return sum(len(folder.positions(number)) for number in batches)


@contextmanager
def failures_explained(folder: SampleFolder) -> Iterator[None]:
    """Turns a full disk and too little memory into UserErrors that say what is kept and what to do."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if is_memory_fault(error):
            raise UserError(
                f"there is not enough memory for {folder.batch} images at once. Give a smaller batch=, and "
                "another to= if images are finished already, because the batch is part of their request."
            ) from error
        if isinstance(error, OSError) and error.errno in DISK:
            raise UserError(
                f"{folder.path}: {DISK[error.errno]} ({error.strerror}). Finished batches are kept. Make room or "
                "mend the permissions there, and run the same command again; it goes on."
            ) from error
        raise


# -- the end -----------------------------------------------------------------------------------------------------------


def finish(task: Task, command: str, made: int, seconds: float) -> str:
    """Writes the .npz, the grid and samples.json from the finished batches. Returns the summary."""
    folder = task.folder
    wait_for_batches(folder)
    if NPZ in folder.formats:
        shape = (folder.n, folder.image_size, folder.image_size, 3)
        write_npz(folder.path / SAMPLES_NPZ, shape, folder.arrays(), {"labels": task.labels, "seeds": task.seeds})
    if GRID in folder.formats:
        places, columns, rows = grid_places(task.labels)
        images = folder.read([place for place in places.tolist() if place != EMPTY])
        names = row_names(rows, partial(class_name, names=task.source.class_names))
        write_grid(folder.path / GRID_PNG, images, places, columns, names)
    write_whole(folder.path / SAMPLES, to_text(provenance(task, command)))
    folder.close()
    return summary(task, made, seconds)


def wait_for_batches(folder: SampleFolder) -> None:
    """Waits until this machine sees the batches that other machines wrote; a UserError if they never appear."""
    deadline = time.monotonic() + PATIENCE_S
    while missing := folder.missing():
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder.path}: {len(missing)} finished batches of other processes do not appear. "
                "Give a to= that all machines share."
            )
        time.sleep(0.5)


def provenance(task: Task, command: str) -> dict[str, Any]:
    """Where the images come from.

    Nothing in it depends on when the images were made or how often the command was interrupted: starts.jsonl says that.
    """
    order, source, model = task.order, task.source, task.model
    files = [task.folder.path / name for name in (SAMPLES_NPZ, GRID_PNG)]
    return {
        "format": FORMAT,
        "command": command,
        "source": source_facts(source, model),
        "images": image_facts(task),
        "sample": dataclasses.asdict(model.run.sample),
        "data": dataclasses.asdict(model.run.data),
        "request": all_facts(order, source, model, task.labels),
        "code": code_state(),
        "files": {file.name: sha256_of(file) for file in files if file.exists()},
        "labels": task.labels.tolist(),
        "seeds": task.seeds.tolist(),
    }


def source_facts(source: Source, model: Model) -> dict[str, Any]:
    """The model: where it lies, what it is, the digest of its weights, and what it was made with."""
    origin = origin_of(model)
    components, parents = origin.met
    return {
        "name": source.name,
        "kind": source.kind,
        "path": str(source.path.absolute()),
        "hub": source.hub and source.hub.pinned,
        "method": source.run.method,
        "preset": source.run.preset,
        "space": model.method.space,
        "configuration": source.config_identity,
        "train_seed": source.run.seed,
        "checkpoint": model.checkpoint,
        # an evaluation of these images needs them to say which judges the model has met
        "pretrained_components": components,
        "parents": parents,
        "config": origin.config,
        "selection": selection_of_preset(settings_tried(get_spec(source.run.method), source.run.preset)),
    }


def image_facts(task: Task) -> dict[str, Any]:
    """The images: how many, of which classes, and how they were computed."""
    names = task.source.class_names
    return {
        "n": task.order.n,
        "image_size": task.source.image_size,
        "seed": task.order.seed,
        "batch": task.order.batch,
        "precision": task.model.dtype,
        "uint8": task.model.run.eval.uint8,
        "label_law": task.order.classes.law,
        "classes": {str(number): class_name(number, names) for number in np.unique(task.labels).tolist()},
    }


def summary(task: Task, made: int, seconds: float) -> str:
    """What was made, where it is, and what can be done with it."""
    folder, order, source = task.folder, task.order, task.source
    classes = described(order.classes, source.class_names, source.num_classes)
    rate = f"; {made:,} of them now, {made / seconds:.3g} images/s" if made else ""
    names = {PNG: f"{IMAGES}/", NPZ: SAMPLES_NPZ, GRID: GRID_PNG}
    lines = [
        f"{folder.path}: {order.n:,} samples of {source.name} ({classes}, seed {order.seed}){rate}",
        f"  {', '.join([*(names[kind] for kind in folder.formats), SAMPLES])}",
    ]
    if NPZ in folder.formats and order.n >= MIN_EVAL_IMAGES and order.classes.law in SCORED_LAWS:
        lines.append(f"Score them with: pixlat evaluate npz={folder.path / SAMPLES_NPZ}")
    return "\n".join([*lines, *([order.remark] if order.remark else [])])
