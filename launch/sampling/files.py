"""Images as files: PNG, the .npz that ADM's evaluator and others read, and a grid to look at. Imports no torch."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixlat.common.files import write_atomically
from pixlat.common.pictures.grids import BACKGROUND, image_grid, save_png, spread

EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of every member of an archive, so that the same images give the same bytes
GRID_COLUMNS, GRID_ROWS = 10, 10
EMPTY = -1  # a place of the grid without an image


def write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Writes (H, W, 3) uint8 as an RGB file."""
    write_atomically(path, lambda place: Image.fromarray(image).save(place, format="PNG"))


def read_png(path: Path) -> NDArray[np.uint8]:
    """Reads what `write_png` wrote."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def write_npz(
    path: Path, shape: tuple[int, ...], parts: Iterable[NDArray[np.uint8]], others: Mapping[str, NDArray[np.int64]]
) -> None:
    """Streams uint8 images of the shape (N, H, W, 3) into `arr_0` of an uncompressed .npz, then adds the other arrays.

    parts: the images in order, some at a time. np.savez, whose format this is, needs all of them in memory at once.
    """

    def write(place: Path) -> None:
        with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            _add(archive, "arr_0", np.dtype(np.uint8), shape, parts)
            for name, array in others.items():
                _add(archive, name, array.dtype, array.shape, [array])

    write_atomically(path, write)


def _add(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype[np.generic],
    shape: tuple[int, ...],
    parts: Iterable[NDArray[np.generic]],
) -> None:
    """Writes one array of an archive from its parts; other parts than the shape announces are a ValueError."""
    info = zipfile.ZipInfo(f"{name}.npy", date_time=EPOCH)
    info.external_attr = 0o644 << 16  # the mode of an ordinary file, for those who unpack the archive
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    rows = 0
    with archive.open(info, "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for part in parts:
            if part.dtype != dtype or part.shape[1:] != shape[1:]:
                raise ValueError(f"{name}: a part is {part.dtype} {part.shape}, expected {dtype} (rows, {shape[1:]})")
            stream.write(np.ascontiguousarray(part).data)
            rows += len(part)
    if rows != shape[0]:
        raise ValueError(f"{name}: {rows} rows were written of {shape[0]}")


def grid_places(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], int, list[int]]:
    """(positions of the grid's images row by row, EMPTY where a row is not full; columns; the class of each row).

    The grid shows at most 10 classes, evenly spread over those in `labels`, and the first images of each; of a single
    class it shows up to 100 images.
    """
    present = np.unique(labels)
    shown = present[spread(len(present), GRID_ROWS)]
    rows_each = GRID_ROWS // len(shown)
    most = max(int((labels == number).sum()) for number in shown)
    columns = min(GRID_COLUMNS, most if len(shown) > 1 else int(np.ceil(most**0.5)))
    places: list[NDArray[np.int64]] = []
    rows: list[int] = []
    for number in shown.tolist():
        first = np.flatnonzero(labels == number)[: rows_each * columns]
        count = -(-len(first) // columns)
        places.append(np.pad(first, (0, count * columns - len(first)), constant_values=EMPTY))
        rows += [number] * count
    return np.concatenate(places), columns, rows


def row_names(rows: Sequence[int], name: Callable[[int], str]) -> list[str]:
    """The names beside the rows of the grid: each class once, at its first row."""
    return ["" if place and rows[place - 1] == number else name(number) for place, number in enumerate(rows)]


def write_grid(
    path: Path, images: NDArray[np.uint8], places: NDArray[np.int64], columns: int, names: Sequence[str]
) -> None:
    """Draws the grid. images: (shown, H, W, 3) uint8, those of the places that are not EMPTY; names: of the rows."""
    tiles = np.empty((len(places), *images.shape[1:]), dtype=np.uint8)
    tiles[:] = BACKGROUND
    tiles[places != EMPTY] = images
    save_png(image_grid(tiles.transpose(0, 3, 1, 2), columns, names), path)
