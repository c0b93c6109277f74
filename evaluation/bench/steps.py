"""Measures the speed of training steps and of sampling: the median over repetitions, with random weights."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.methods import get_class

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pixlat.methods.base import Method


WARMUP = 3


def tell(line: str) -> None:
    """Prints a line about the progress on stderr, because stdout has the JSON."""
    print(line, file=sys.stderr, flush=True)


def measure(run: RunConfig, batch: int, steps: int, sample: bool) -> dict[str, Any]:
    """images/s, MACs/s and peak memory of training steps (forward, backward, optimizer) and of the sampler."""
    from pixlat.common.accounting.macs import on_meta, sampling_cost, training_cost
    from pixlat.common.hardware import device_name, peak_bytes, peak_kind, reset_peak
    from pixlat.common.precision import executed_precision
    from pixlat.common.training.setup import make_accelerator

    accelerator = make_accelerator(run.train)
    device = accelerator.device
    tell(f"{run.method} {run.preset}: building the networks on {device_name(device)}")
    method = build(run, device)
    where = {
        "device": device_name(device),
        "precision": executed_precision(run.train.precision, device),
        "compiled": run.train.compile,
    }
    result: dict[str, Any] = {"method": run.method, "preset": run.preset, **where, "batch": batch}
    tell(
        f"training steps of {batch} images in {where['precision']}, {WARMUP} untimed and {steps} timed"
        + (", blocks compiled first" * run.train.compile)
    )
    seconds = repeat(
        training_step(method, run, batch, accelerator), range(WARMUP), range(steps), device, "training steps"
    )
    macs = training_cost(type(method), run.model, method.data).per_image
    result["train"] = rates(batch, seconds, macs) | {"peak_bytes": peak_bytes(device), "peak_kind": peak_kind(device)}
    if sample and method.task == "generation":
        reset_peak(device)
        cost = sampling_cost(on_meta(type(method), run.model, method.data), run.sample)
        executed = executed_precision(run.eval.precision, device)
        tell(f"samplings of {batch} images by {cost.nfe} evaluations in {executed}, 1 untimed and {steps} timed")
        seconds, drawing = time_sampling(method, run, batch, steps, device)
        without = sorted(total - drawn for total, drawn in zip(seconds, drawing, strict=True))[steps // 2]
        facts = {
            "precision": executed,
            "images_per_s_without_draws": batch / without,
            "net_forwards": cost.net_forwards,
        }
        result["sample"] = facts | rates(batch, seconds, cost.macs_per_image) | {"peak_bytes": peak_bytes(device)}
    return result


def build(run: RunConfig, device: torch.device) -> Method:
    """The method on the device with random weights.

    A frozen network gets its trained weights if their file is on this machine.
    """
    import torch

    from pixlat.common.datasets.load import summarise
    from pixlat.common.frozen.base import Frozen
    from pixlat.methods.base import DataInfo

    torch.manual_seed(0)
    method = get_class(run.method)(run.model, DataInfo.of(summarise(run.data)))
    for module in method.modules():
        if isinstance(module, Frozen):
            try:
                module.load()
            except UserError:
                fill_at_random(module)
    return method.to(device)


def fill_at_random(network: nn.Module) -> None:
    """Fills the weights of a network that has no values yet with small random numbers."""
    import torch

    network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.uniform_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()


def rates(images: int, seconds: list[float], macs_per_image: int) -> dict[str, float]:
    """The median, best and worst rate, from the seconds of each repetition."""
    ordered = sorted(seconds)
    middle = ordered[len(ordered) // 2]
    return {
        "images_per_s": images / middle,
        "images_per_s_best": images / ordered[0],
        "images_per_s_worst": images / ordered[-1],
        "macs_per_image": macs_per_image,
        "macs_per_s": macs_per_image * images / middle,
    }


def training_step(method: Method, run: RunConfig, batch: int, accelerator: Any) -> Callable[[], None]:
    """A training step on random images: forward, backward and optimizer of all phases, without averages of weights."""
    import torch

    from pixlat.common.accounting.macs import begin_last_part, empty_batch
    from pixlat.common.training.optim import build_optimizers
    from pixlat.common.training.setup import prepare_blocks

    data = method.data
    images = torch.rand(batch, data.channels, data.image_size, data.image_size, device=accelerator.device) * 2 - 1
    labels = torch.arange(batch, device=accelerator.device) % data.num_classes
    inputs = empty_batch(data, batch, accelerator.device, image=False) | {"label": labels, "index": labels}
    if method.needs_images(data):
        inputs["image"] = images
    bf16 = accelerator.mixed_precision == "bf16"
    optimizers = {phase: build_optimizers(method.parameters_of(phase), run.train, bf16) for phase in method.phases}
    prepare_blocks(method, run.train)
    model = accelerator.prepare_model(method.train())

    def step() -> None:
        begin_last_part(method)
        for phase in method.phases:
            accelerator.backward(model(phase, inputs, 0)["loss"])
            for optimizer in optimizers[phase]:
                optimizer.step()
            method.zero_grad(set_to_none=True)

    return step


def time_sampling(
    method: Method, run: RunConfig, batch: int, steps: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """(seconds of each of `steps` samplings of a batch, seconds that each waited for random numbers).

    Samples in the run's eval.precision, after one more sampling that is not timed.
    """
    import torch

    from pixlat.common.precision import computing_in
    from pixlat.common.seeds import Noise

    labels = torch.arange(batch, device=device) % method.data.num_classes
    method.eval()
    drawing = []

    def sample() -> None:
        noise = Noise(range(batch), device)
        with torch.no_grad(), computing_in(run.eval.precision, device):
            method.sample(labels, noise, run.sample)
        drawing.append(noise.seconds)

    return repeat(sample, range(1), range(steps), device, "samplings"), drawing[1:]


def repeat(
    work: Callable[[], None], warmup: Sequence[int], timed: Sequence[int], device: torch.device, title: str
) -> list[float]:
    """Seconds of each timed repetition, including the device's work. Shows a progress bar on stderr."""
    from pixlat.common.hardware import synchronize
    from pixlat.common.progress import progress_bar

    seconds = []
    with progress_bar(title, len(warmup) + len(timed), unit="") as bar:
        for number in range(len(warmup) + len(timed)):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            if number >= len(warmup):
                seconds.append(time.perf_counter() - start)
            bar.update()
    return seconds
