"""What a run will take: memory of each GPU, the largest micro-batch, images a second, days and GPU-hours, for training
and for sampling.

  pixlat plan method=jit preset=imagenet256-h hardware=h100 nodes=4 gpus=8
  pixlat plan method=jit preset=imagenet256-h hardware=a100 sharding=fsdp2 \\
              train.recompute_blocks=true efficiency=0.4

Takes the keys of `pixlat train` and those below. Multiply-accumulates and memory are counted
without data or GPU. The share of a GPU's peak that is reached is an assumption until you give the
one that `pixlat bench` measures on yours.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from tabulate import tabulate

from pixlat.common.command_line import as_command
from pixlat.common.config.resolve import one_of, published_score, require, resolve
from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.evaluation.board.groups import network_name
from pixlat.evaluation.command import Syntax, help_text, parse, run_command
from pixlat.methods import get_class, get_spec

if TYPE_CHECKING:
    from pixlat.common.accounting.memory import StepMemory
    from pixlat.methods.base import DataInfo, Method

GROUPS = dict.fromkeys(("method", "preset", "model", "data", "train", "sample"), "as for `pixlat train`")
GIGA, PETA = 1e9, 1e15


@dataclass(frozen=True)
class Hardware:
    """A GPU by its data sheet: dense rates, without sparsity."""

    gigabytes: float
    bf16_tflops: float  # 2 FLOPs a multiply-accumulate
    tf32_tflops: float
    fp32_tflops: float  # with TF32 off

    def tflops(self, precision: str) -> float:
        """The peak rate of a precision: bf16, tf32 or fp32."""
        rate: float = getattr(self, f"{precision}_tflops")
        return rate


HARDWARE = {
    "h100": Hardware(80, 989, 495, 67),
    "h200": Hardware(141, 989, 495, 67),
    "b200": Hardware(180, 2250, 1125, 75),
    "a100": Hardware(80, 312, 156, 19.5),
    "a100-40": Hardware(40, 312, 156, 19.5),
    "l40s": Hardware(48, 362, 183, 91.6),
    "rtx4090": Hardware(24, 165, 82.6, 82.6),
}
USABLE = 0.92  # of a GPU's memory; the rest is the driver's, the libraries' workspaces and gaps of the allocator
ASSUMED = {"bf16": 0.35, "tf32": 0.4, "fp32": 0.6}  # share of the peak rate
ASSUMED_SCALING = 0.95  # share of its speed that each of several nodes keeps
SAMPLES = 50_000
# Measured by `pixlat bench data` (common/README.md): images a second of one core of an AMD EPYC.
DECODED_PER_CORE = {256: 250, 512: 150}  # by size in pixels, from photographs in folders, tars and tables
TOKENIZER_SHARE = 0.22  # of the TF32 rate, which convolutions of an autoencoder reach
NETWORK_GBPS = 400  # of each GPU to other machines
NUMBERS_PER_CORE = 130e6  # normal ones a second: 1.5 ms for 3 x 256 x 256
DRAWING_THREADS = 8  # at most, for each GPU (common/seeds.py)
CACHED_PER_CORE = 80_000  # from the shards of `pixlat prepare images`


@dataclass
class Keys:
    """The command's keys."""

    hardware: str = "h100"  # h100, h200, b200, a100, a100-40, l40s or rtx4090
    nodes: int = 1  # machines
    gpus: int = 8  # of each machine
    sharding: str = "ddp"  # ddp or fsdp2
    #: share of the peak rate reached in training; none: 0.35 for bf16, 0.4 for tf32,
    #: 0.6 for fp32, which are assumptions
    efficiency: float | None = None
    sampling_efficiency: float | None = None  # the same in sampling; none: that of training
    scaling: float | None = None  # share of a node's speed that each of several nodes keeps; none: 0.95, an assumption


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
    """Says on stderr what is being counted; stdout has the plan."""
    print(f"planning: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Variant:
    """One way to hold the training on the GPUs, at its largest micro-batch."""

    sharding: str
    recompute: bool
    micro_batch: int  # 0: not even one image fits, and the bytes are those of one
    bytes: int  # of each GPU
    macs: int  # of an image
    rate: float  # images/s of all GPUs


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
        self.share = run.train.batch // self.world  # of each GPU in a step
        self.step = cache(self._step)

    def _step(self, micro_batch: int, recompute: bool) -> StepMemory:
        """The memory of a step of this GPU's share, cut into micro-batches."""
        from pixlat.common.accounting.memory import step_memory

        train = replace(self.run.train, recompute_blocks=recompute, precision=self.precision)
        tell(f"memory of a step of {micro_batch} images, blocks {'recomputed' if recompute else 'kept'}")
        return step_memory(
            self.method_class, self.run.model, train, self.info, micro_batch, accumulated=micro_batch < self.share
        )

    def bytes_a_gpu(self, step: StepMemory, sharding: str, micro_batch: int) -> int:
        """Of one process: DDP holds gradients twice (its buckets); FSDP2 a part of everything trained,
        two whole blocks and what is in no block.

        FSDP2's gradients stay whole while micro-batches are accumulated.
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
        """Whether the method's loss can be computed of so many images;
        a whole share for which it cannot is a UserError.
        """
        try:
            self.shapes.check_micro_batch(micro_batch)
        except UserError:
            if micro_batch == self.share:
                raise
            return False
        return True

    def largest_micro_batch(self, sharding: str, recompute: bool) -> tuple[int, int]:
        """(the largest divisor of a GPU's share that fits, its bytes a GPU); (0, bytes of one image)
        where not even that fits.
        """
        sizes = [size for size in range(1, self.share + 1) if self.share % size == 0 and self.is_possible(size)]
        low, high = -1, len(sizes) - 1
        held: dict[int, int] = {}
        while low < high:
            middle = (low + high + 1) // 2 if held else high  # most often all of the share fits
            held[middle] = self.bytes_a_gpu(self.step(sizes[middle], recompute), sharding, sizes[middle])
            low, high = (middle, high) if held[middle] <= USABLE * self.hardware.gigabytes * GIGA else (low, middle - 1)
        return (sizes[low], held[low]) if low >= 0 else (0, held[0])

    def rate(self, macs_per_image: float, efficiency: float) -> float:
        """Images a second of all GPUs."""
        scaling = 1.0 if self.keys.nodes == 1 else self.keys.scaling or ASSUMED_SCALING
        return self.world * scaling * efficiency * self.tflops * 1e12 / (2 * macs_per_image)

    @property
    def efficiency(self) -> float:
        """Share of the peak rate in training."""
        return self.keys.efficiency or ASSUMED[self.precision]

    def variants(self) -> Iterator[Variant]:
        """With and without recomputed blocks under each sharding, the wanted sharding first."""
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
        """The whole plan."""
        keys, run = self.keys, self.run
        variants = list(self.variants())
        wanted = [
            each
            for each in variants
            if each.sharding == variants[0].sharding and (each.recompute or not run.train.recompute_blocks)
        ]
        chosen = next((each for each in wanted if each.micro_batch), None)
        fit = f"fits into {USABLE:.0%} of it" + ("" if chosen else ", or of one image")
        lines = [
            f"{run.method} {run.preset}: {run.train.images:,} images in steps of {run.train.batch}, "
            f"{self.precision}, on {keys.nodes} x {keys.gpus} {keys.hardware} ({self.hardware.gigabytes:g} GB, "
            f"{self.tflops:g} TFLOP/s each)",
            "",
            f"Memory of a GPU in GB at the largest micro-batch that {fit}; > is the plan",
            "",
            tabulate(
                [self.row(each, each is chosen) for each in variants],
                HEADERS,
                tablefmt="github",
                floatfmt=".2f",
                disable_numparse=[2, 9, 10],
                colalign=ALIGNED,
            ),
            "",
            (
                "[counted] tensor by tensor, as without train.compile, which keeps less. "
                "Gradients come while activations go: the peak is below the sum."
            ),
            (
                f"[assumed] {1 - USABLE:.0%} for workspaces and gaps; DDP's second copy of the gradients; "
                "the two blocks and the rest that FSDP2 gathers."
            ),
        ]
        if chosen is None:
            advice = "Take sharding=fsdp2, GPUs with more memory, or more of them."
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
        """A line of the table; what is spread over the GPUs is shown as a GPU's part."""
        size = variant.micro_batch or 1
        step, part = self.step(size, variant.recompute), self.world if variant.sharding == "fsdp2" else 1
        whole_gradients = part == 1 or size < self.share
        gradients = step.trained * (2 if variant.sharding == "ddp" else 1) // (1 if whole_gradients else part)
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
        """Work, speed and length of the training, and what reads its images."""
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
        """What each resource allows in training, in images/s of all GPUs, and which of them binds."""
        from pixlat.common.accounting.macs import on_meta, tokenizer_macs
        from pixlat.common.datasets.load import ON_DISK

        tell("multiply-accumulates of frozen autoencoders")
        encoding = tokenizer_macs(self.method_class, self.run.model, self.info)
        alone, encoded = self.rate(chosen.macs - encoding, self.efficiency), math.inf
        if encoding:
            encoded = self.rate(encoding, TOKENIZER_SHARE * self.hardware.tf32_tflops / self.tflops)
        found = {"compute": 1 / (1 / alone + 1 / encoded)}
        told = {
            "compute": (
                f"{(chosen.macs - encoding) / GIGA:.4g} GMACs at {share(self.efficiency, self.keys.efficiency)} "
                "of the peak rate"
            )
        }
        if encoding:
            part = found["compute"] / encoded
            told["compute"] += (
                f", and {encoding / GIGA:.4g} of the VAE at {TOKENIZER_SHARE:.0%} of TF32's [assumed], "
                f"which takes {part:.0%} of the time"
            )
        if self.run.data.name in ON_DISK and on_meta(self.method_class, self.run.model, self.info).needs_images(
            self.info
        ):
            readers = self.world * max(1, self.run.data.workers)
            per_core = CACHED_PER_CORE if self.run.data.name == "shards" else self.decoded_per_core()
            found["decoding"] = float(readers * per_core)
            told["decoding"] = (
                f"{readers} loader processes (data.workers), {per_core:,} each [measured], if there are as many cores"
            )
        if self.keys.nodes > 1:
            # bits: a ring sends and receives every gradient once each
            moved = 8 * 2 * self.step(chosen.micro_batch, chosen.recompute).trained
            found["network"] = self.run.train.batch / (moved / (NETWORK_GBPS * 1e9))
            told["network"] = f"gradients over {NETWORK_GBPS} Gbit/s of each GPU [assumed], beside the backward pass"
        return limit_lines(found, told)

    def decoded_per_core(self) -> int:
        """Images a second that one core decodes."""
        return DECODED_PER_CORE[min(DECODED_PER_CORE, key=lambda known: abs(known - self.info.image_size))]

    def stages(self) -> list[str]:
        """What the whole training costs with the earlier runs that it is built on, and the networks of others,
        whose training is not counted.
        """
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
        """Work and length of 50,000 samples."""
        from pixlat.common.accounting.macs import on_meta, sampling_cost

        method = on_meta(self.method_class, self.run.model, self.info)
        if method.task != "generation":
            return []
        tell("multiply-accumulates of a sample")
        cost = sampling_cost(method, self.run.sample)
        given = self.keys.sampling_efficiency or self.keys.efficiency
        rate = self.rate(cost.macs_per_image, given or self.efficiency)
        threads = DRAWING_THREADS if cost.draws <= 1 else 1  # only a first draw is made ahead
        found = {"compute": rate, "noise": self.world * threads * NUMBERS_PER_CORE / max(1, cost.numbers)}
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
            *limit_lines(found, {"compute": "as above", "noise": drawn}),
        ]


def limit_lines(found: Mapping[str, float], told: Mapping[str, str]) -> list[str]:
    """A line a limit, the one that binds marked; found: images/s of all GPUs."""
    binding = min(found, key=found.__getitem__)
    lines = [
        f"{name:<9}{rate:>12,.0f} images/s{' < binds' if name == binding else '':<8}  {told[name]}"
        for name, rate in found.items()
    ]
    return [f"{'limits' if number == 0 else '':<11}{line}" for number, line in enumerate(lines)]


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
    """MACs of an image in training, with everything on; recomputed blocks count twice in their forward pass."""
    from pixlat.common.accounting.macs import training_cost
    from pixlat.common.training.recompute import recompute_blocks

    def recomputing(config: object, data: DataInfo) -> Method:
        method = method_class(config, data)
        recompute_blocks(method)
        return method

    # both are called alike
    return training_cost(recomputing if recompute else method_class, run.model, info).per_image  # type: ignore[arg-type]


def planned_precision(setting: str) -> str:
    """What a precision key means on the GPUs of a plan, which all multiply bf16 and TF32."""
    return "bf16" if setting == "auto" else setting


def share(value: float, given: float | None) -> str:
    """ "35% [assumed]"."""
    return f"{value:.0%} [{'given' if given else 'assumed'}]"


def cores(number: float) -> str:
    """ "1 core", "10 cores"."""
    whole = math.ceil(number)
    return f"{whole} core{'s' if whole > 1 else ''}"


def clock(seconds: float) -> str:
    """ "3.2 days", "5.1 hours", "12 minutes"."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} seconds"


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(
        sys.argv[1:] if arguments is None else arguments, lambda: help_text(str(__doc__), Keys, GROUPS), work
    )


if __name__ == "__main__":
    sys.exit(main())
