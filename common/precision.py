"""What multiplications are computed in: `train.precision` while training, `eval.precision` while sampling.

bf16   bfloat16 under autocast. What autocast leaves in float32 keeps torch's defaults, as JiT's authors had it:
       matrix products exact, cuDNN's convolutions in TF32
tf32   float32 whose matrix products and convolutions round their inputs to TF32 (10 bits of mantissa),
       on GPUs that can; elsewhere it executes as fp32
fp32   float32 throughout: no TF32 in cuDNN's convolutions either
auto   bf16 on a GPU that multiplies it natively, else fp32

Parameters and optimizer states are float32 with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

EXECUTED = {"bf16": "bfloat16", "tf32": "tf32", "fp32": "float32"}  # what records say
# of matrix products, of cuDNN's convolutions
TF32_FLAGS = {"bf16": (False, True), "tf32": (True, True), "fp32": (False, False)}


def resolve_precision(setting: str, device: torch.device) -> str:
    """bf16, tf32 or fp32: what a precision key means on a device.

    The GPUs of the machine do not matter to a run on its CPU.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if setting == "auto":
        return "bf16" if native else "fp32"
    if setting == "tf32" and not (device.type == "cuda" and torch.cuda.is_tf32_supported()):
        return "fp32"
    return setting


def executed_precision(setting: str, device: torch.device) -> str:
    """bfloat16, tf32 or float32: the same in the words of records and protocols."""
    return EXECUTED[resolve_precision(setting, device)]


def set_float32_products(precision: str) -> None:
    """Allows or forbids TF32 in this process for a resolved precision.

    Through the switches of CUDA and cuDNN alone: `torch.set_float32_matmul_precision` would also let CPUs round,
    and the newer `fp32_precision` attributes make torch's own readers of these switches (inductor's convolutions,
    `cudnn.flags`) raise an error about mixed interfaces.
    """
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = TF32_FLAGS[precision]


@contextmanager
def computing_in(setting: str, device: torch.device) -> Iterator[str]:
    """Within the block, products are computed in this precision whatever the code around it chose.

    Yields what is executed, as records say it.
    """
    precision = resolve_precision(setting, device)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_float32_products(precision)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield EXECUTED[precision]
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
