"""What a run will need, in training and in sampling: memory of each GPU, micro-batch, images/s, days, GPU-hours.

  pixlat plan method=jit preset=imagenet256-h hardware=h100 nodes=4 gpus=8
  pixlat plan method=jit preset=imagenet256-h hardware=a100 sharding=fsdp2 \\
              train.recompute_blocks=true efficiency=0.4

The command takes the keys of `pixlat train` and those below. It counts multiply-accumulates and
memory, and needs neither data nor GPU for that. How much of its peak rate a GPU reaches is an
assumption: measure yours with `pixlat bench` and give the share as efficiency=.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from tabulate import tabulate

from pixlat.common.command_line import as_command
from pixlat.common.config.resolve import one_of, published_score, require, resolve
from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.evaluation.board.notes import network_name
from pixlat.evaluation.command import Syntax, help_text, parse, run_command
from pixlat.launch.hardware import (
    ASSUMED,
    ASSUMED_SCALING,
    CACHED_PER_CORE,
    DECODED_PER_CORE,
    DRAWING_THREADS,
    HARDWARE,
    NETWORK_GBPS,
    NUMBERS_PER_CORE,
    TOKENIZER_SHARE,
    USABLE,
    clock,
    cores,
    limit_lines,
    planned_precision,
    share,
)
from pixlat.methods import get_class, get_spec

if TYPE_CHECKING:
    from pixlat.common.accounting.memory import StepMemory
    from pixlat.methods.base import DataInfo, Method

GROUPS = dict.fromkeys(("method", "preset", "model", "data", "train", "sample"), "as for `pixlat train`")
GIGA, PETA = 1e9, 1e15
SAMPLES = 50_000


@dataclass
class Keys:
    """The command's keys."""

    hardware: str = "h100"  # h100, h200, b200, a100, a100-40, l40s or rtx4090
    nodes: int = 1  # machines
    gpus: int = 8  # GPUs of each machine
    sharding: str = "ddp"  # ddp or fsdp2
    #: share of the peak rate that training reaches; none: assume 0.35 for bf16, 0.4 for tf32, 0.6 for fp32
    efficiency: float | None = None
    sampling_efficiency: float | None = None  # share of the peak rate that sampling reaches; none: as in training
    scaling: float | None = None  # share of its speed that a node keeps beside other nodes; none: assume 0.95


SYNTAX = Syntax(Keys, GROUPS)


def work(arguments: Sequence[str]) -> str:
    """The plan of one configuration."""
    keys, rest = parse(Keys, arguments, tuple(GROUPS))
    one_of("hardware", keys.hardware, tuple(HARDWARE))
    one_of("sharding", keys.sharding, ("ddp", "fsdp2"))
    for key in ("nodes", "gpus"):
        require(getattr(keys, key) >= 1, key, getattr(keys, key), "must be at least 1")
    for key in ("efficiency", "sampling_efficiency", "scaling"):
        require(
            getattr(keys, key) is None or 0 < getattr(keys, key) <= 1,
            key,
            getattr(keys, key),
            "is a share, above 0 and at most 1",
        )
    run = resolve(get_spec(rest.get("method", RunConfig.method)), rest)
    tell(
        f"{run.method} {run.preset} on {keys.nodes} x {keys.gpus} {keys.hardware}, "
        "a count of half a minute for a large network; loading PyTorch"
    )
    return Plan(keys, run).text()


def tell(line: str) -> None:
    """Says on stderr what the command counts now; the plan itself goes to stdout."""
    print(f"planning: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Variant:
    """One way to place the training on the GPUs, with the largest micro-batch that fits."""

    sharding: str
    recompute: bool
    micro_batch: int  # 0: not even one image fits, and `bytes` is what one image needs
    bytes: int  # a GPU
    macs: int  # an image
    rate: float  # images/s of all GPUs together


class Plan:
    """One configuration on one cluster."""

    def __init__(self, keys: Keys, run: RunConfig) -> None:
        from pixlat.common.accounting.macs import on_meta
        from pixlat.common.datasets.load import summarise
        from pixlat.methods.base import DataInfo

        self.keys, self.run, self.hardware = keys, run, HARDWARE[keys.hardware]
        self.world = keys.nodes * keys.gpus
        self.precision = planned_precision(run.train.precision)
        self.tflops = self.hardware.tflops(self.precision)
        self.method_class, self.info = get_class(run.method), DataInfo.of(summarise(run.data))
        self.shapes = on_meta(self.method_class, run.model, self.info)
        require(
            run.train.batch % self.world == 0,
            "train.batch",
            run.train.batch,
            f"must be a multiple of the {self.world} GPUs",
        )
        self.share = run.train.batch // self.world  # images of a GPU in one optimizer step
        self.step = cache(self._step)

    def _step(self, micro_batch: int, recompute: bool) -> StepMemory:
        """The memory of one optimizer step, in which a GPU divides its share of the batch into micro-batches."""
        from pixlat.common.accounting.memory import step_memory

        train = replace(self.run.train, recompute_blocks=recompute, precision=self.precision)
        tell(f"memory of a step of {micro_batch} images, blocks {'recomputed' if recompute else 'kept'}")
        return step_memory(
            self.method_class, self.run.model, train, self.info, micro_batch, accumulated=micro_batch < self.share
        )

    def bytes_a_gpu(self, step: StepMemory, sharding: str, micro_batch: int) -> int:
        """The bytes of one process.

        DDP holds each gradient twice: in the parameter and in its bucket. FSDP2 holds this process's shard of all that
        is trained, two gathered blocks and what lies in no block. While it accumulates micro-batches, it does not
        shard the gradients.
        """
        if self.world == 1:
            return step.peak
        if sharding == "ddp":
            return step.peak + step.trained
        gathered = 2 * step.largest_block + step.outside_blocks
        spread = step.trained + step.optimizer + step.averages
        with_gradients = step.peak if micro_batch < self.share else step.peak_of_others + step.trained // self.world
        return with_gradients - spread + spread // self.world + gathered

    def is_possible(self, micro_batch: int) -> bool:
        """Whether the method can compute its loss from so many images. UserError if it cannot from a GPU's share."""
        try:
            self.shapes.check_micro_batch(micro_batch)
        except UserError:
            if micro_batch == self.share:
                raise
            return False
        return True

    def largest_micro_batch(self, sharding: str, recompute: bool) -> tuple[int, int]:
        """(the largest divisor of a GPU's share that fits, its bytes a GPU); (0, bytes of one image) if none fits."""
        sizes = [size for size in range(1, self.share + 1) if self.share % size == 0 and self.is_possible(size)]
        low, high = -1, len(sizes) - 1
        held: dict[int, int] = {}
        while low < high:
            middle = (low + high + 1) // 2 if held else high  # first the full share, because it fits most often
            held[middle] = self.bytes_a_gpu(self.step(sizes[middle], recompute), sharding, sizes[middle])
            low, high = (middle, high) if held[middle] <= USABLE * self.hardware.gigabytes * GIGA else (low, middle - 1)
        return (sizes[low], held[low]) if low >= 0 else (0, held[0])

    def rate(self, macs_per_image: float, efficiency: float) -> float:
        """Images a second of all GPUs together."""
        scaling = 1.0 if self.keys.nodes == 1 else self.keys.scaling or ASSUMED_SCALING
        return self.world * scaling * efficiency * self.tflops * 1e12 / (2 * macs_per_image)

    @property
    def efficiency(self) -> float:
        """Share of the peak rate that training reaches, given or assumed."""
        return self.keys.efficiency or ASSUMED[self.precision]

    def variants(self) -> Iterator[Variant]:
        """Each sharding with kept and with recomputed blocks; the sharding that the user chose comes first."""
        tell("multiply-accumulates of a training step, blocks kept and recomputed")
        macs = {
            recompute: training_macs(self.method_class, self.run, self.info, recompute) for recompute in (False, True)
        }
        for sharding in dict.fromkeys((self.keys.sharding, "ddp", "fsdp2")) if self.world > 1 else ("none",):
            for recompute in (False, True):
                yield Variant(
                    sharding,
                    recompute,
                    *self.largest_micro_batch(sharding, recompute),
                    macs[recompute],
                    self.rate(macs[recompute], self.efficiency),
                )

    def text(self) -> str:
        """The plan as the command prints it."""
        keys, run = self.keys, self.run
        variants = list(self.variants())
        wanted = [
            variant
            for variant in variants
            if variant.sharding == variants[0].sharding and (variant.recompute or not run.train.recompute_blocks)
        ]
        chosen = next((variant for variant in wanted if variant.micro_batch), None)
        fit = f"fits into {USABLE:.0%} of it" + ("" if chosen else ", or of one image")
        lines = [
            f"{run.method} {run.preset}: {run.train.images:,} images in steps of {run.train.batch}, "
            f"{self.precision}, on {keys.nodes} x {keys.gpus} {keys.hardware} ({self.hardware.gigabytes:g} GB, "
            f"{self.tflops:g} TFLOP/s each)",
            "",
            f"Memory of a GPU in GB at the largest micro-batch that {fit}; > is the plan",
            "",
            tabulate(
                [self.row(variant, variant is chosen) for variant in variants],
                HEADERS,
                tablefmt="github",
                floatfmt=".2f",
                disable_numparse=[2, 9, 10],
                colalign=ALIGNED,
            ),
            "",
            (
                "[counted] tensor by tensor without train.compile, which keeps fewer tensors. The peak is below the "
                "sum, because the backward pass frees activations while it makes gradients."
            ),
            (
                f"[assumed] {1 - USABLE:.0%} for workspaces and gaps; DDP's second copy of the gradients; "
                "the two blocks and the rest that FSDP2 gathers."
            ),
        ]
        if chosen is None:
            advice = "Use sharding=fsdp2, GPUs with more memory, or more GPUs."
            raise UserError(
                "\n".join(
                    [
                        *lines,
                        "",
                        f"Not even one image fits into a {keys.hardware} with sharding={keys.sharding}. {advice}",
                    ]
                )
            )
        published = published_score(get_spec(run.method), run.preset) or "nothing published"
        return "\n".join(
            [
                *lines,
                "",
                *self.training(chosen),
                *self.limits(chosen),
                *self.stages(),
                *self.sampling(),
                f"expected   {published}",
            ]
        )

    def row(self, variant: Variant, chosen: bool) -> list[object]:
        """A line of the table. Of tensors that FSDP2 shards it shows the shard of one GPU."""
        size = variant.micro_batch or 1
        step, part = self.step(size, variant.recompute), self.world if variant.sharding == "fsdp2" else 1
        full_gradients = part == 1 or size < self.share
        gradients = step.trained * (2 if variant.sharding == "ddp" else 1) // (1 if full_gradients else part)
        parts = (
            step.weights - step.trained + step.trained // part,
            gradients,
            step.optimizer // part,
            step.averages // part,
            step.activations,
            variant.bytes,
        )
        name = f"{'> ' if chosen else ''}{variant.sharding}"
        fits = f"{size} x {self.share // size}" if variant.micro_batch else "none"
        days = self.run.train.images / variant.rate / 86_400
        speed = [f"{variant.rate:,.0f}", f"{days:.3g}"] if variant.micro_batch else ["", ""]
        return [name, "recomputed" if variant.recompute else "kept", fits, *(value / GIGA for value in parts), *speed]

    def training(self, chosen: Variant) -> list[str]:
        """Work, speed and duration of the training, and how many cores it needs to read its images."""
        keys, run = self.keys, self.run
        seconds, a_node = run.train.images / chosen.rate, chosen.rate / keys.nodes
        size, decoded = self.info.image_size, self.decoded_per_core()
        return [
            (
                f"training   {chosen.macs / GIGA:.4g} GMACs an image [counted], "
                f"{share(self.efficiency, keys.efficiency)} of the peak rate"
            )
            + (
                "" if keys.nodes == 1 else f", {share(keys.scaling or ASSUMED_SCALING, keys.scaling)} kept across nodes"
            ),
            f"           {chosen.rate:,.0f} images/s, {clock(seconds)}, {self.world * seconds / 3600:,.0f} GPU-hours",
            (
                f"data       a node reads {a_node:,.0f} images/s: {cores(a_node / decoded)} that decode a folder "
                f"or tars ({decoded} images/s each [measured]),"
            ),
            (
                f"           or {cores(a_node / CACHED_PER_CORE)} and {a_node * 3 * size**2 / GIGA:.2g} GB/s of shards "
                f"({CACHED_PER_CORE:,} each [measured])"
            ),
        ]

    def limits(self, chosen: Variant) -> list[str]:
        """How many images/s each resource allows in training, for all GPUs together, and which resource limits."""
        from pixlat.common.accounting.macs import on_meta, tokenizer_macs
        from pixlat.common.datasets.load import ON_DISK

        tell("multiply-accumulates of frozen autoencoders")
        encoding = tokenizer_macs(self.method_class, self.run.model, self.info)
        alone, encoded = self.rate(chosen.macs - encoding, self.efficiency), math.inf
        if encoding:
            encoded = self.rate(encoding, TOKENIZER_SHARE * self.hardware.tf32_tflops / self.tflops)
        rates = {"compute": 1 / (1 / alone + 1 / encoded)}
        remarks = {
            "compute": (
                f"{(chosen.macs - encoding) / GIGA:.4g} GMACs at {share(self.efficiency, self.keys.efficiency)} "
                "of the peak rate"
            )
        }
        if encoding:
            part = rates["compute"] / encoded
            remarks["compute"] += (
                f", and {encoding / GIGA:.4g} of the VAE at {TOKENIZER_SHARE:.0%} of TF32's [assumed], "
                f"which takes {part:.0%} of the time"
            )
        if self.run.data.name in ON_DISK and on_meta(self.method_class, self.run.model, self.info).needs_images(
            self.info
        ):
            readers = self.world * max(1, self.run.data.workers)
            per_core = CACHED_PER_CORE if self.run.data.name == "shards" else self.decoded_per_core()
            rates["decoding"] = float(readers * per_core)
            remarks["decoding"] = (
                f"{readers} loader processes (data.workers), {per_core:,} each [measured], if there are as many cores"
            )
        if self.keys.nodes > 1:
            # in bits: in a ring each GPU sends every gradient and receives it once
            moved = 8 * 2 * self.step(chosen.micro_batch, chosen.recompute).trained
            rates["network"] = self.run.train.batch / (moved / (NETWORK_GBPS * 1e9))
            remarks["network"] = f"gradients over {NETWORK_GBPS} Gbit/s of each GPU [assumed], beside the backward pass"
        return limit_lines(rates, remarks)

    def decoded_per_core(self) -> int:
        """Images a second that one core decodes."""
        return DECODED_PER_CORE[min(DECODED_PER_CORE, key=lambda known: abs(known - self.info.image_size))]

    def stages(self) -> list[str]:
        """The cost of the training with the earlier runs that it uses; the networks whose training is not counted."""
        from pixlat.common.accounting.macs import on_meta
        from pixlat.launch.job.budget import macs_of, stage_macs

        earlier = {
            stage.key: macs for stage in get_spec(self.run.method).stages if (macs := stage_macs(self.run, stage))
        }
        pretrained = on_meta(self.method_class, self.run.model, self.info).describe(self.run.sample).pretrained
        others = [
            f"{network_name(part.name, part.role)} ({part.role})"
            for part in pretrained
            if not {part.name, part.role} & earlier.keys()
        ]
        lines = []
        if earlier:
            own = macs_of(self.run)(self.run.train.images)
            parts = ", ".join(f"{key} {macs / PETA:.4g}" for key, macs in earlier.items())
            lines.append(
                f"{(own + sum(earlier.values())) / PETA:.4g} PMACs in all [counted]: "
                f"this run {own / PETA:.4g}, earlier ones: {parts}"
            )
        if others:
            lines.append(f"not counted, because others trained them: {', '.join(others)}")
        return [f"{'cost' if line is lines[0] else '':<11}{line}" for line in lines]

    def sampling(self) -> list[str]:
        """Work and duration of 50,000 samples."""
        from pixlat.common.accounting.macs import on_meta, sampling_cost

        method = on_meta(self.method_class, self.run.model, self.info)
        if method.task != "generation":
            return []
        tell("multiply-accumulates of a sample")
        cost = sampling_cost(method, self.run.sample)
        given = self.keys.sampling_efficiency or self.keys.efficiency
        rate = self.rate(cost.macs_per_image, given or self.efficiency)
        threads = DRAWING_THREADS if cost.draws <= 1 else 1  # other threads prepare only the first draw of a batch
        rates = {"compute": rate, "noise": self.world * threads * NUMBERS_PER_CORE / max(1, cost.numbers)}
        drawn = (
            f"{cost.numbers:,} random numbers an image, {NUMBERS_PER_CORE / 1e6:.0f} million/s a core [measured], "
            f"{cores(threads)} a GPU [assumed]"
        )
        return [
            f"sampling   {SAMPLES:,} images of {cost.nfe} evaluations, {cost.macs_per_image / GIGA:,.4g} GMACs "
            f"each [counted], {share(given or self.efficiency, given)} of the peak rate",
            (
                f"           {rate:,.3g} images/s, {clock(SAMPLES / rate)}, "
                f"{self.world * SAMPLES / rate / 3600:,.3g} GPU-hours"
            ),
            *limit_lines(rates, {"compute": "as above", "noise": drawn}),
        ]


ALIGNED = ("left", "left", "left", *["right"] * 8)
HEADERS = (
    "sharding",
    "blocks",
    "micro-batch",
    "parameters",
    "gradients",
    "optimizer",
    "EMAs",
    "activations",
    "peak",
    "images/s",
    "days",
)


def training_macs(method_class: type[Method], run: RunConfig, info: DataInfo, recompute: bool) -> int:
    """MACs of a training image with all terms of the loss; the forward pass of recomputed blocks counts twice."""
    from pixlat.common.accounting.macs import training_cost
    from pixlat.common.training.recompute import recompute_blocks

    def recomputing(config: object, data: DataInfo) -> Method:
        method = method_class(config, data)
        recompute_blocks(method)
        return method

    # training_cost calls the function as it would call the class
    return training_cost(recomputing if recompute else method_class, run.model, info).per_image  # type: ignore[arg-type]


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(
        sys.argv[1:] if arguments is None else arguments, lambda: help_text(str(__doc__), Keys, GROUPS), work
    )


if __name__ == "__main__":
    sys.exit(main())
