"""`dry_run=true`: says what a run would do and cost. It allocates nothing large and writes nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pixlat.common.accounting.macs import (
    TrainingCost,
    activation_bytes,
    on_meta,
    parameter_counts,
    sampling_cost,
    training_cost,
)
from pixlat.common.config.identity import chosen_settings, run_folder
from pixlat.common.config.resolve import ema_names, published_score
from pixlat.common.config.schema import RunConfig
from pixlat.common.datasets.load import ON_DISK, summarise
from pixlat.common.datasets.notes import data_notes, epochs_text
from pixlat.common.training.steps import split_batch, total_steps
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo

if TYPE_CHECKING:
    from pixlat.methods.base import Method

GIGA = 1e9
LARGE_GPU_BYTES = 80e9  # an H100's


def describe_run(run: RunConfig) -> str:
    """The settings that differ from defaults, then folder, data, steps, parameters, MACs, memory, published score."""
    info, method_class, spec = DataInfo.of(summarise(run.data)), get_class(run.method), get_spec(run.method)
    method = on_meta(method_class, run.model, info)
    method.check_micro_batch(split_batch(run.train, _processes(run))[0])
    counts, sampling = parameter_counts(method), sampling_cost(method, run.sample)
    training = training_cost(method_class, run.model, info)
    forwards = ", ".join(
        f"{calls:g} x {name} of {sampling.macs_per_forward[name] / GIGA:.4g} GMACs"
        for name, calls in sampling.net_forwards.items()
    )  # fmt: skip
    lines = [
        "settings that are not defaults",
        *(f"  {key}={json.dumps(value)}" for key, value in chosen_settings(run, spec).items() if key != "dry_run"),
        "",
        f"folder       {run_folder(run)}",
        f"data         {data_line(run, info)}",
        f"steps        {steps_line(run, info)}",
        f"parameters   {counts.gen_trainable:,} trainable in the generator, {counts.gen_total:,} in all, "
        f"{counts.decoder:,} decoder, {counts.aux_train_only:,} in training only",
        f"training     {training_line(training, run, info)}",
        (
            f"sampling     {sampling.macs_per_image / GIGA:.4g} GMACs an image (papers: Gflops): "
            f"{forwards}; {sampling.nfe} evaluations"
        ),
        f"memory       {memory_line(run, method, method_class, info)}",
        f"expected     {published_score(spec, run.preset) or 'nothing published'}",
        *(
            f"note         {note}"
            for note in data_notes(info, run.train.images, run.data.path, run.data.name in ON_DISK)
        ),
        "dry run: nothing was written",
    ]
    return "\n".join(lines)


def data_line(run: RunConfig, info: DataInfo) -> str:
    """The training data: name, images, classes and size."""
    elsewhere = (
        f" (data.path={run.data.path} is not on this computer)"
        if run.data.path is not None and not info.num_train
        else ""
    )
    images = f"{info.num_train:,}" if info.num_train else f"unknown number of{elsewhere}"
    return f"{info.name}: {images} training images, {info.num_classes} classes, {info.image_size} px"


def steps_line(run: RunConfig, info: DataInfo) -> str:
    """The optimizer steps, and how many epochs they are."""
    processes = _processes(run)
    shared = "one process" if processes == 1 else f"each of {processes} processes"
    micro_batch, accumulation = split_batch(run.train, processes)
    epochs = epochs_text(run.train.images, info.num_train)
    steps = f"{total_steps(run.train)} of {run.train.batch} images ({accumulation} x {micro_batch} on {shared})"
    return f"{steps}, {epochs}" if epochs else steps


def memory_line(run: RunConfig, method: Method, method_class: type[Method], info: DataInfo) -> str:
    """The memory of a process; advice how to need less if a large GPU does not have so much."""
    micro_batch, _ = split_batch(run.train, _processes(run))
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    stored = sum(p.numel() for p in (*method.parameters(), *method.buffers()))
    weights = 4 * (stored + 3 * trained + len(ema_names(run.train)) * trained)
    activations = activation_bytes(method_class, run.model, info, micro_batch, bf16=run.train.precision == "bf16")
    advice = (
        f". That is more than a GPU of {LARGE_GPU_BYTES / GIGA:.0f} GB holds: "
        "use more processes, a smaller train.micro_batch or train.recompute_blocks=true; "
        "`pixlat plan` with the same keys finds the largest micro-batch"
        if weights + activations > LARGE_GPU_BYTES
        else ""
    )
    return (
        f"{(weights + activations) / GIGA:.3g} GB a process: {weights / GIGA:.3g} weights, gradients, "
        f"optimizer and averages (fp32), {activations / GIGA:.3g} activations of {micro_batch} images; "
        f"buffers of kernels not counted{advice}"
    )


def _processes(run: RunConfig) -> int:
    return run.cluster.processes() if run.cluster.name != "here" else 1


def training_line(cost: TrainingCost, run: RunConfig, info: DataInfo) -> str:
    """MACs of an image in each part of the training, and of the complete training."""
    first, *later = [
        f"{macs / GIGA:.4g} GMACs an image" + (f" from image {start:,} on" if start else "")
        for start, macs in cost.parts
    ]
    remembered = [f"{cost.encoding / GIGA:.4g} once for each image whose features are cached"] if cost.encoding else []
    encoded = min(run.train.images, info.num_train * (2 if run.data.flip else 1))
    return ", ".join(
        [first, *later, *remembered, f"{cost.total(run.train.images, encoded, run.train.batch):.3g} MACs in all"]
    )
