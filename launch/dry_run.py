"""`dry_run=true`: what a run would do and what it would cost. Allocates nothing large and writes nothing."""

from __future__ import annotations

from common.config import RunConfig, ema_names, load_presets, run_folder, to_yaml
from common.cost import TrainingCost, activation_bytes, on_meta, parameter_counts, sampling_cost, training_cost
from common.datasets import summarise
from common.trainer import split_batch, total_steps
from methods import get_class, get_spec
from methods.base import DataInfo

GIGA = 1e9


def describe_run(run: RunConfig) -> str:
    """Resolved configuration, parameters, MACs, steps, memory, output folder and the expected score."""
    info, method_class = DataInfo.of(summarise(run.data)), get_class(run.method)
    method = on_meta(method_class, run.model, info)
    counts, sampling = parameter_counts(method), sampling_cost(method, run.sample)
    training = training_cost(method_class, run.model, info)
    processes = run.cluster.processes() if run.cluster.name != "here" else 1
    shared = "one process" if processes == 1 else f"each of {processes} processes"
    micro_batch, accumulation = split_batch(run.train, processes)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    stored = sum(p.numel() for p in (*method.parameters(), *method.buffers()))
    weights = 4 * (stored + 3 * trained + len(ema_names(run.train)) * trained)
    activations = activation_bytes(method_class, run.model, info, micro_batch, bf16=run.train.precision == "bf16")
    forwards = ", ".join(f"{calls:g} x {name} of {sampling.macs_per_forward[name] / GIGA:.4g} GMACs" for name, calls in sampling.net_forwards.items())
    expected = load_presets(get_spec(run.method).presets)[run.preset].get("expected")
    lines = [
        to_yaml(run),
        f"folder       {run_folder(run)}",
        f"data         {info.name}: {info.num_train or 'unknown number of'} training images, {info.num_classes} classes, {info.image_size} px",
        f"steps        {total_steps(run.train)} of {run.train.batch} images ({accumulation} x {micro_batch} on {shared})",
        f"parameters   {counts.gen_trainable:,} trainable in the generator, {counts.gen_total:,} in all, "
        f"{counts.decoder:,} decoder, {counts.aux_train_only:,} in training only",
        f"training     {training_line(training, run, info)}",
        f"sampling     {sampling.macs_per_image / GIGA:.4g} GMACs an image (papers: Gflops): {forwards}; {sampling.nfe} evaluations",
        f"memory       {(weights + activations) / GIGA:.3g} GB a process: {weights / GIGA:.3g} weights, gradients, optimizer and averages (fp32), "
        f"{activations / GIGA:.3g} activations of {micro_batch} images; buffers of kernels not counted",
        f"expected     {expected or 'nothing published'}",
        "dry run: nothing was written",
    ]
    return "\n".join(lines)


def training_line(cost: TrainingCost, run: RunConfig, info: DataInfo) -> str:
    """MACs an image in each part of the training, and in all."""
    first, *later = [f"{macs / GIGA:.4g} GMACs an image" + (f" from image {start:,} on" if start else "") for start, macs in cost.parts]
    remembered = [f"{cost.encoding / GIGA:.4g} once for each image that is remembered"] if cost.encoding else []
    encoded = min(run.train.images, info.num_train * (2 if run.data.flip else 1))
    return ", ".join([first, *later, *remembered, f"{cost.total(run.train.images, encoded, run.train.batch):.3g} MACs in all"])
