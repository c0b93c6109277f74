"""Reads .npz archives of unknown origin: nothing is unpickled, and a large array is streamed in chunks."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from pixlat.common.errors import UserError
from pixlat.common.files import open_regular
from pixlat.evaluation.features.collect import ImageBatch
from pixlat.evaluation.features.ranks import rank_and_size

IMAGES = "arr_0"  # where np.savez puts an array without a name
LABELS = "labels"  # beside them in what `pixlat sample` writes
MAX_IMAGES, MAX_RESOLUTION = 10**8, 8192
MAX_CHUNK_BYTES = 2**28  # largest number of bytes of images to read at once
MAX_HEADER_BYTES = 10_000  # largest header of an array, the same limit as NumPy's
MAX_MEMBERS = 1000  # largest number of arrays in an archive
KINDS = {
    "ADM's reference (protocols adm256, adm512)": {"mu", "sigma", "mu_s", "sigma_s", IMAGES},
    "JiT's or MAR's statistics (protocols jit256, jit512)": {"mu", "sigma"},
    "pMF's statistics (protocols pmf256, pmf512)": {"ref_mu", "ref_sigma"},
    "samples (npz= of `pixlat evaluate`)": {IMAGES},
}


class NpzImages:
    """The images of an ADM-style .npz: `arr_0`, uint8 (N, H, W, 3), compressed or not.

    The constructor raises UserError for anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _member(path, IMAGES) as member:
            shape, dtype = member.shape, member.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or 0 in shape:
            raise UserError(
                f"{path}: {IMAGES} is {dtype} {shape}; uint8 (number, height, width, 3) "
                "with square images in [0, 255] is wanted."
            )
        if shape[0] > MAX_IMAGES or shape[1] > MAX_RESOLUTION:
            raise UserError(
                f"{path}: {IMAGES} is {shape}, but the limit is {MAX_IMAGES:,} images of {MAX_RESOLUTION:,} px."
            )
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def resolution(self) -> int:
        """Pixels."""
        return self.shape[1]

    def labels(self) -> NDArray[np.int64] | None:
        """(N,) the class that each image should show, from the array `labels`; None if the file has no such array."""
        if f"{LABELS}{SUFFIX}" not in _names(self.path):
            return None
        with _member(self.path, LABELS) as member:
            if member.dtype.kind not in "iu" or member.shape != (len(self),):
                raise UserError(
                    f"{self.path}: {LABELS} is {member.dtype} {member.shape}; whole numbers ({len(self)},) are wanted."
                )
            data = member.read(member.num_bytes)
            member.finish()
        return np.frombuffer(data, dtype=member.dtype).astype(np.int64)

    def batches(self, size: int = 128, positions: NDArray[np.int64] | None = None) -> Iterator[ImageBatch]:
        """This process's share of the images in batches of at most `size`, with the index of each image.

        positions: if given, only these images (ascending). Their index is then the place in `positions`.
        """
        rank, ranks = rank_and_size()
        chosen = np.arange(len(self)) if positions is None else positions
        place = np.full(len(self), -1)
        place[chosen] = np.arange(len(chosen))
        image_bytes = math.prod(self.shape[1:])
        size = max(1, min(size, MAX_CHUNK_BYTES // image_bytes))
        with _member(self.path, IMAGES) as member:
            for chunk, start in enumerate(range(0, int(chosen[-1]) + 1, size)):
                count = min(size, len(self) - start)
                data = member.read(count * image_bytes)
                kept = place[start : start + count] >= 0
                if chunk % ranks == rank and kept.any():
                    images = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, *self.shape[1:])[
                        torch.from_numpy(kept)
                    ]
                    yield images.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(place[start : start + count][kept])
            member.finish()


def read_floats(path: Path, key: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """A finite floating-point array of this shape from an .npz, as float64."""
    with _member(path, key) as member:
        if member.shape != shape or member.dtype.kind != "f":
            actual = f"{member.dtype} {member.shape}, but it must be floating point {shape}"
            raise UserError(f"{path}: {key} is {actual}. These are not statistics of this extractor.")
        data, dtype = member.read(member.num_bytes), member.dtype
        member.finish()
    array = np.frombuffer(data, dtype=dtype).reshape(shape).astype(np.float64)
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {key} holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite.")
    return array


def describe_arrays(path: Path) -> list[str]:
    """One line for each member with its name, type and shape, and a last line that guesses the kind of file."""
    names = _names(path)
    keys = {name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)}
    lines = [_describe(path, name) for name in names]
    for kind, wanted in KINDS.items():
        if wanted <= keys:
            return [*lines, f"looks like {kind}"]
    return [*lines, "not a known file of statistics or samples"]


def _describe(path: Path, name: str) -> str:
    shown = name if name.isprintable() else ascii(name)
    if not name.endswith(SUFFIX):
        return f"{shown}: not an array"
    with _member(path, name.removesuffix(SUFFIX)) as member:
        return f"{shown.removesuffix(SUFFIX)}: {member.dtype} {member.shape}"


# -- an archive --------------------------------------------------------------------------------------------------------

SUFFIX = ".npy"


@dataclass(frozen=True)
class _Member:
    """One array of an archive. Its header has been read; `stream` continues with its data in C order."""

    path: Path
    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, count: int) -> bytes:
        """The next `count` bytes. Raises UserError if the file ends earlier."""
        with _sentences(self.path):
            data = self.stream.read(count)
        if len(data) != count:
            raise UserError(f"{self.path} ends early: {count - len(data):,} bytes are missing. Copy the file again.")
        return data

    def finish(self) -> None:
        """Reads to the end, so that zipfile compares the checksum."""
        with _sentences(self.path):
            while self.stream.read(MAX_CHUNK_BYTES):
                pass


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Turns every exception of the block into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # damaged bytes make zipfile, its decompressors and NumPy's header parser raise exceptions of many types
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"{path} cannot be read as .npz: {reason}. Copy the file again, or save its arrays with np.savez."
        ) from error


def _names(path: Path) -> list[str]:
    """The names of the members."""
    with _sentences(path), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if len(names) > MAX_MEMBERS:
        raise UserError(f"{path} holds {len(names):,} files, but the limit is {MAX_MEMBERS:,}.")
    return names


@contextmanager
def _member(path: Path, key: str) -> Iterator[_Member]:
    """Opens one array. Raises UserError for a damaged archive and for data that do not fit the header's shape."""
    names = [name.removesuffix(SUFFIX) for name in _names(path) if name.endswith(SUFFIX)]
    if key not in names:
        held = ", ".join(name if name.isprintable() else ascii(name) for name in names[:8])
        raise UserError(f"{path} has no array {key!r}. It holds: {held or 'nothing'}.")
    with ExitStack() as stack:
        with _sentences(path):
            archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(open_regular(path))))
            info = archive.getinfo(f"{key}{SUFFIX}")
            stream = stack.enter_context(archive.open(info))
            (shape, dtype), header_bytes = _header(path, key, stream)
        member = _Member(path, stream, shape, dtype)
        if (missing := header_bytes + member.num_bytes - info.file_size) > 0:
            raise UserError(f"{path} ends early: {missing:,} bytes are missing. Copy the file again.")
        if missing < 0:
            raise UserError(
                f"{path} is damaged: {key} has {-missing:,} bytes more than its shape {shape} needs. "
                "Copy the file again."
            )
        yield member


def _header(path: Path, key: str, stream: IO[bytes]) -> tuple[tuple[tuple[int, ...], np.dtype[np.generic]], int]:
    """((shape, dtype), bytes of the header) of the array that follows in the stream, which must be in C order.

    Raises UserError for an array of objects, because reading it would need pickle.
    """
    start = stream.read(8)  # magic, and the version of the format
    width, read = (
        (2, np.lib.format.read_array_header_1_0) if start[6:7] == b"\1" else (4, np.lib.format.read_array_header_2_0)
    )
    length = stream.read(width)
    header_bytes = int.from_bytes(length, "little")
    if (
        start[:6] != np.lib.format.MAGIC_PREFIX
        or start[6:7] not in (b"\1", b"\2", b"\3")
        or len(length) != width
        or header_bytes > MAX_HEADER_BYTES
    ):
        raise UserError(f"{path}: {key} is not a NumPy array: it has no valid header. Save it again with np.savez.")
    content = start + length + stream.read(header_bytes)
    shape, fortran, dtype = read(io.BytesIO(content[8:]))
    if dtype.hasobject:
        raise UserError(
            f"{path}: {key} holds Python objects, which pixlat does not unpickle. Save a plain array of numbers."
        )
    if fortran and len(shape) > 1:
        raise UserError(f"{path}: {key} is stored column by column. Save it again with np.ascontiguousarray.")
    if any(type(length) is not int or length < 0 for length in shape):
        raise UserError(f"{path}: {key} has the impossible shape {shape}. Save it again with np.savez.")
    return (shape, dtype), len(content)
