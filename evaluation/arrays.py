"""NumPy archives made by somebody else: read without unpickling, a large array streamed and never held whole."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import UserError
from evaluation.collect import ImageBatch
from evaluation.ranks import rank_and_size

IMAGES = "arr_0"  # where np.savez puts an array without a name
KINDS = {
    "ADM's reference (protocols adm256, adm512)": {"mu", "sigma", "mu_s", "sigma_s", IMAGES},
    "JiT's or MAR's statistics (protocols jit256, jit512)": {"mu", "sigma"},
    "pMF's statistics (protocols pmf256, pmf512)": {"ref_mu", "ref_sigma"},
    "samples (npz= of evaluation/run.py)": {IMAGES},
}


class NpzImages:
    """The images of an ADM-style .npz: `arr_0`, uint8 (N, H, W, 3), compressed or not. Anything else is a UserError at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _member(path, IMAGES) as stream:
            shape, dtype = _header(path, IMAGES, stream)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or not shape[0]:
            raise UserError(f"{path}: {IMAGES} is {dtype} {shape}; uint8 (number, height, width, 3) with square images in [0, 255] is wanted.")
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def resolution(self) -> int:
        """Pixels."""
        return self.shape[1]

    def batches(self, size: int = 128, positions: NDArray[np.int64] | None = None) -> Iterator[ImageBatch]:
        """This process's share of the images, or of those at ascending positions with their places among these; `size` are read at a time."""
        rank, ranks = rank_and_size()
        chosen = np.arange(len(self)) if positions is None else positions
        place = np.full(len(self), -1)
        place[chosen] = np.arange(len(chosen))
        image_bytes = int(np.prod(self.shape[1:]))
        with _member(self.path, IMAGES) as stream:
            _header(self.path, IMAGES, stream)
            for chunk, start in enumerate(range(0, int(chosen[-1]) + 1, size)):
                count = min(size, len(self) - start)
                data = _read(self.path, stream, count * image_bytes)
                kept = place[start : start + count] >= 0
                if chunk % ranks == rank and kept.any():
                    images = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, *self.shape[1:])[torch.from_numpy(kept)]
                    yield images.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(place[start : start + count][kept])


def read_floats(path: Path, key: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """A finite floating-point array of this shape from an .npz, as float64."""
    with _member(path, key) as stream:
        found, dtype = _header(path, key, stream)
        if found != shape or dtype.kind != "f":
            raise UserError(f"{path}: {key} is {dtype} {found}, but floating point {shape} is wanted. These are not statistics of this extractor.")
        data = _read(path, stream, int(np.prod(shape)) * dtype.itemsize)
    array = np.frombuffer(data, dtype=dtype).reshape(shape).astype(np.float64)
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {key} holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite.")
    return array


def keys_of(path: Path) -> list[str]:
    """The names of the arrays in an .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as .npz: {error}.") from error


def describe_arrays(path: Path) -> list[str]:
    """A line for each array: name, type, shape; and what file this looks like."""
    keys = keys_of(path)
    lines = []
    for key in keys:
        with _member(path, key) as stream:
            shape, dtype = _header(path, key, stream)
        lines.append(f"{key}: {dtype} {shape}")
    for kind, wanted in KINDS.items():
        if wanted <= set(keys):
            return [*lines, f"looks like {kind}"]
    return [*lines, "not a file of statistics or samples that is known here"]


class _member:
    """One array's bytes in the archive, as a context manager; damage that shows on opening is a UserError."""

    def __init__(self, path: Path, key: str) -> None:
        if key not in (names := keys_of(path)):
            raise UserError(f"{path} has no array {key!r}. It holds: {', '.join(names[:8]) or 'nothing'}.")
        self.archive = zipfile.ZipFile(path)
        self.stream = self.archive.open(f"{key}.npy")

    def __enter__(self) -> IO[bytes]:
        return self.stream

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.archive.close()


def _header(path: Path, key: str, stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """(shape, dtype) of the array that follows, in C order. An object array has no other form than a pickle and is refused."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: {key} is not a NumPy array: {error}.") from error
    if dtype.hasobject:
        raise UserError(f"{path}: {key} holds Python objects, which would have to be unpickled; a plain array is wanted.")
    if fortran and len(shape) > 1:
        raise UserError(f"{path}: {key} is stored column by column. Save it again with np.ascontiguousarray.")
    return shape, dtype


def _read(path: Path, stream: IO[bytes], count: int) -> bytes:
    try:
        data = stream.read(count)
    except (OSError, zipfile.BadZipFile, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}.") from error
    if len(data) != count:
        raise UserError(f"{path} ends early: {count - len(data):,} bytes are missing. Copy the file again.")
    return data
