"""Speed of a method on this machine: `python evaluation/speed.py method=jit preset=imagenet256-b speed.batch=2` prints one JSON object.

Takes the keys of launch/run.py, and speed.batch (images a training step and a sampling batch; default 8), speed.steps (timed steps; default 10)
and speed.sample=false to time training only, as for a stage that does not sample. Weights are random: speed does not depend on them.
Training is timed in train.precision, sampling in eval.precision, as in a run. A preset's train.compile=true holds on GPUs; on a CPU, where compiling takes
minutes, only if the command asks for it. What is being done is told on stderr.

`python evaluation/speed.py memory method=... speed.batch=...` measures what a training step takes, beside what common/memory.py predicts.

`python evaluation/speed.py knobs method=... speed.batch=...` tells what recomputed blocks, compiled blocks, exact attention and kept outputs of frozen
networks do to speed and memory, each beside the plain run.

`python evaluation/speed.py data data=folder data.path=... data.image_size=256` tells how many images a second one core reads, in the order of the
files and at random as training does: divide what your GPUs take by it for the number of loader processes.

`python evaluation/speed.py frechet [dims]` times the Fréchet distance against torch-fidelity's and clean-fid's, in one run on the same statistics.

`python evaluation/speed.py neighbours 256 512` times the search for nearest training images (neighbours.png) of a whole run at these sizes, now and as
it was first, on a GPU where there is one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.command_line import as_command
from common.config import RunConfig, resolve, split_overrides, sweep
from common.errors import UserError
from methods import get_class, get_spec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from methods.base import Method

DEFAULTS = {"speed.batch": "8", "speed.steps": "10", "speed.sample": "true"}
WARMUP = 3
DATA_BATCH = 32
DATA_SECONDS = 3.0


@as_command
def main(arguments: list[str]) -> int:
    """Prints one JSON object for each configuration; the exit code is 2 for a mistake in the command."""
    if not arguments or "--help" in arguments:
        print(__doc__)
        return 0
    try:
        for measured in measurements(arguments):
            print(json.dumps(measured, indent=1))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measurements(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """What the command asks for, one after the other."""
    kind, rest = arguments[0], arguments[1:]
    if kind == "frechet":
        yield measure_frechet(rest)
    elif kind == "neighbours":
        yield from measure_neighbours(rest)
    elif kind == "data":
        yield measure_data(resolve(get_spec(RunConfig.method), next(sweep(split_overrides(rest)))))
    elif kind == "knobs":
        from evaluation.knobs import compare_knobs

        yield from compare_knobs(rest)
    elif kind == "memory":
        from evaluation.knobs import measure_memory, with_exact_allocator

        with_exact_allocator()
        for run, options in configurations(rest):
            yield measure_memory(run, int(options["speed.batch"]))
    else:
        for run, options in configurations(arguments):
            yield measure(run, int(options["speed.batch"]), int(options["speed.steps"]), options["speed.sample"] == "true")


def configurations(arguments: Sequence[str]) -> Iterator[tuple[RunConfig, dict[str, str]]]:
    """Every run of a sweep, and the options `speed.*`."""
    overrides = split_overrides(arguments)
    options = {key: overrides.pop(key, [default])[0] for key, default in DEFAULTS.items()}
    for choice in sweep(overrides):
        run = resolve(get_spec(choice.get("method", RunConfig.method)), choice)
        yield (run if "train.compile" in choice else without_compiling_on_cpu(run)), options


def without_compiling_on_cpu(run: RunConfig) -> RunConfig:
    """The run without a preset's train.compile where there is no GPU: it would compile for minutes, for a rate that no training will have."""
    from accelerate import PartialState

    if not run.train.compile or PartialState().device.type != "cpu":
        return run
    tell("this is a CPU: blocks are not compiled, though the preset asks for it (train.compile=true compiles them here as well)")
    return dataclasses.replace(run, train=dataclasses.replace(run.train, compile=False))


def tell(line: str) -> None:
    """Says on stderr what is being done; stdout has the JSON."""
    print(line, file=sys.stderr, flush=True)


def measure_frechet(arguments: list[str]) -> dict[str, Any]:
    """The comparison of Fréchet distances at the given number of dimensions, 2048 if there is none."""
    from evaluation.frechet_speed import compare

    if arguments and not arguments[0].isdigit():
        raise UserError(f"frechet {arguments[0]}: the number of dimensions is wanted, for example frechet 2048.")
    return compare(int(arguments[0]) if arguments else 2048)


def measure_neighbours(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """The comparison of searches at each of the given sizes."""
    import torch

    from evaluation.neighbour_speed import compare

    if odd := [each for each in arguments if not each.isdigit() or int(each) == 0]:
        raise UserError(f"neighbours {odd[0]}: sizes of images are wanted, for example neighbours 256 512.")
    for size in arguments or ["256"]:
        yield compare(int(size), device="cuda" if torch.cuda.is_available() else "cpu")


def measure_data(run: RunConfig) -> dict[str, Any]:
    """Training images a second that one core reads, decodes and crops."""
    from common.datasets import load_data
    from common.hardware import processor_name
    from common.loader import TrainingPlan

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
    facts = {"data": run.data.name, "image_size": source.info.image_size, "images": count, "seconds_to_open": opened, "processor": processor_name()}
    return facts | rates


def measure(run: RunConfig, batch: int, steps: int, sample: bool) -> dict[str, Any]:
    """images/s, MACs/s and peak memory of training steps (forward, backward, optimizer) and of the sampler."""
    from common.cost import on_meta, sampling_cost, training_cost
    from common.hardware import device_name, peak_bytes, peak_kind, reset_peak
    from common.precision import executed_precision
    from common.trainer import make_accelerator

    accelerator = make_accelerator(run.train)
    device = accelerator.device
    tell(f"{run.method} {run.preset}: building the networks on {device_name(device)}")
    method = build(run, device)
    where = {"device": device_name(device), "precision": executed_precision(run.train.precision, device), "compiled": run.train.compile}
    result: dict[str, Any] = {"method": run.method, "preset": run.preset, **where, "batch": batch}
    tell(f"training steps of {batch} images in {where['precision']}, {WARMUP} untimed and {steps} timed" + (", blocks compiled first" * run.train.compile))
    seconds = repeat(training_step(method, run, batch, accelerator), range(WARMUP), range(steps), device, "training steps")
    macs = training_cost(type(method), run.model, method.data).per_image
    result["train"] = rates(batch, seconds, macs) | {"peak_bytes": peak_bytes(device), "peak_kind": peak_kind(device)}
    if sample and method.task == "generation":
        reset_peak(device)
        cost = sampling_cost(on_meta(type(method), run.model, method.data), run.sample)
        executed = executed_precision(run.eval.precision, device)
        tell(f"samplings of {batch} images by {cost.nfe} evaluations in {executed}, 1 untimed and {steps} timed")
        seconds, drawing = time_sampling(method, run, batch, steps, device)
        without = sorted(whole - drawn for whole, drawn in zip(seconds, drawing, strict=True))[steps // 2]
        facts = {"precision": executed, "images_per_s_without_draws": batch / without, "net_forwards": cost.net_forwards}
        result["sample"] = facts | rates(batch, seconds, cost.macs_per_image) | {"peak_bytes": peak_bytes(device)}
    return result


def build(run: RunConfig, device: torch.device) -> Method:
    """The method on the device with random weights; networks that were trained elsewhere have theirs where the files are."""
    import torch

    from common.datasets import summarise
    from common.encoders.frozen import Frozen
    from methods.base import DataInfo

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
    """Small numbers for the weights of a network that was built without any."""
    import torch

    network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.uniform_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()


def rates(images: int, seconds: list[float], macs_per_image: int) -> dict[str, float]:
    """From the seconds of each repetition: the median rate, and its range."""
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
    """A training step on random images: all phases, forward, backward and optimizer; without averages."""
    import torch

    from common.cost import begin_last_part, empty_batch
    from common.optim import build_optimizers
    from common.trainer import prepare_blocks

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


def time_sampling(method: Method, run: RunConfig, batch: int, steps: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of each of `steps` samplings of a batch in the run's eval.precision, and of their random numbers; one more before is not timed."""
    import torch

    from common.precision import computing_in
    from common.seeds import Noise

    labels = torch.arange(batch, device=device) % method.data.num_classes
    method.eval()
    drawing = []

    def sample() -> None:
        noise = Noise(range(batch), device)
        with torch.no_grad(), computing_in(run.eval.precision, device):
            method.sample(labels, noise, run.sample)
        drawing.append(noise.seconds)

    return repeat(sample, range(1), range(steps), device, "samplings"), drawing[1:]


def repeat(work: Callable[[], None], warmup: Sequence[int], timed: Sequence[int], device: torch.device, title: str) -> list[float]:
    """Seconds of each timed repetition, the device waited for; a bar on stderr shows how far it is."""
    from common.hardware import synchronize
    from common.progress import progress_bar

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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
