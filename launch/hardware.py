"""The hardware behind a plan: data sheets of GPUs, rates that we measured or assume, and the lines that show limits.

This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """A GPU's data sheet: memory, and peak rates of dense products."""

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
USABLE = 0.92  # share of a GPU's memory for tensors; driver, library workspaces and allocator gaps take the rest
ASSUMED = {"bf16": 0.35, "tf32": 0.4, "fp32": 0.6}  # share of the peak rate
ASSUMED_SCALING = 0.95  # share of its speed that each of several nodes keeps
# `pixlat bench data` measured these images a second of one core of an AMD EPYC (common/README.md).
DECODED_PER_CORE = {256: 250, 512: 150}  # by size in pixels; photographs in folders, tars and tables
CACHED_PER_CORE = 80_000  # from the shards of `pixlat prepare images`
TOKENIZER_SHARE = 0.22  # share of the TF32 peak rate that an autoencoder's convolutions reach; assumed
NETWORK_GBPS = 400  # Gbit/s from each GPU to other machines; assumed
NUMBERS_PER_CORE = 130e6  # normal random numbers a second: 1.5 ms for 3 x 256 x 256
DRAWING_THREADS = 8  # most threads that draw noise for one GPU (common/seeds.py)


def planned_precision(setting: str) -> str:
    """The precision that a setting means here: auto is bf16, since every GPU in the table supports bf16 and TF32."""
    return "bf16" if setting == "auto" else setting


def limit_lines(rates: Mapping[str, float], remarks: Mapping[str, str]) -> list[str]:
    """One line for each resource, with a mark at the one that limits. rates: images/s of all GPUs, by resource."""
    binding = min(rates, key=rates.__getitem__)
    lines = [
        f"{name:<9}{rate:>12,.0f} images/s{' < binds' if name == binding else '':<8}  {remarks[name]}"
        for name, rate in rates.items()
    ]
    return [f"{'limits' if number == 0 else '':<11}{line}" for number, line in enumerate(lines)]


def share(value: float, given: float | None) -> str:
    """ "35% [assumed]"."""
    return f"{value:.0%} [{'given' if given else 'assumed'}]"


def cores(number: float) -> str:
    """ "1 core", "10 cores"."""
    count = math.ceil(number)
    return f"{count} core{'s' if count > 1 else ''}"


def clock(seconds: float) -> str:
    """ "3.2 days", "5.1 hours", "12 minutes"."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} seconds"
