"""The precision of multiplications: `train.precision` in training, `eval.precision` in sampling.

bf16   bfloat16 autocast. Operations that autocast leaves in float32 use torch's defaults, as in JiT's code:
       exact float32 for matrix products, TF32 for cuDNN's convolutions
tf32   float32, but matrix products and convolutions round their inputs to TF32 (10 bits of mantissa);
       the same as fp32 on devices without TF32
fp32   float32 everywhere, also in cuDNN's convolutions
auto   bf16 on a GPU that supports it natively, otherwise fp32

Parameters and optimizer states are float32 in all four.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

EXECUTED = {"bf16": "bfloat16", "tf32": "tf32", "fp32": "float32"}  # the names in records
# whether TF32 is allowed in (matrix products, cuDNN's convolutions)
TF32_FLAGS = {"bf16": (False, True), "tf32": (True, True), "fp32": (False, False)}


def resolve_precision(setting: str, device: torch.device) -> str:
    """Resolves a precision setting for a device to bf16, tf32 or fp32.

    For a CPU the result is the same whether the machine has GPUs or not.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if setting == "auto":
        return "bf16" if native else "fp32"
    if setting == "tf32" and not (device.type == "cuda" and torch.cuda.is_tf32_supported()):
        return "fp32"
    return setting


def executed_precision(setting: str, device: torch.device) -> str:
    """The resolved precision under its name in records and protocols: bfloat16, tf32 or float32."""
    return EXECUTED[resolve_precision(setting, device)]


def set_float32_products(precision: str) -> None:
    """Allows or forbids TF32 in this process, for a resolved precision.

    It sets only the flags of CUDA and cuDNN. `torch.set_float32_matmul_precision` would change CPU results, too.
    The newer `fp32_precision` attributes make the torch code that reads these flags (inductor's convolutions,
    `cudnn.flags`) raise an error about mixed interfaces.
    """
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = TF32_FLAGS[precision]


@contextmanager
def computing_in(setting: str, device: torch.device) -> Iterator[str]:
    """Within the block, torch multiplies in this precision, whatever precision is set outside.

    Yields the name of the resolved precision, as records have it.
    """
    precision = resolve_precision(setting, device)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_float32_products(precision)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield EXECUTED[precision]
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
