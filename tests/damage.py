"""Damage for tests: every way to flip one bit of a file, or a sample of them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np


def flips(path: Path, sample: int | None = None, seed: int = 0) -> Iterator[str]:
    """Writes the file with one bit flipped, for every bit or a seeded sample, and yields where;
    the file is as it was afterwards.
    """
    content = path.read_bytes()
    bits = np.arange(8 * len(content))
    if sample is not None and sample < len(bits):
        bits = np.sort(np.random.Generator(np.random.PCG64(seed)).choice(bits, sample, replace=False))
    try:
        for bit in bits.tolist():
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            yield f"bit {bit % 8} of byte {bit // 8}"
    finally:
        path.write_bytes(content)
