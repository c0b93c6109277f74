"""A folder of samples: which batches are finished, how an interrupted command goes on, and what it refuses.

images/000000.png ...   one file an image (as=png)
samples.npz             arr_0 uint8 (N, H, W, 3), labels, seeds (as=npz)
grid.png                some images of each class (as=grid)
samples.json            where the images come from; written last, so that it is there only if everything else is
starts.jsonl            one line a start: command, packages, machine, git state; code.diff: uncommitted changes
.unfinished/            until the end: the request, and each finished batch as 00000012.npy

A batch is finished once its last file is in its place, and every file gets there by renaming. So there is no note of
progress that could be wrong, and processes on several machines may write into one folder. Imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixlat.common.errors import UserError
from pixlat.common.files import read_json, write_atomically, write_whole
from pixlat.evaluation.score.sample_facts import SAMPLES
from pixlat.launch.sampling.files import read_png, write_png
from pixlat.launch.sampling.request import changes

PNG, NPZ, GRID = FORMATS = ("png", "npz", "grid")
SAMPLES_NPZ, GRID_PNG, IMAGES, UNFINISHED, REQUEST = (
    "samples.npz",
    "grid.png",
    "images",
    ".unfinished",
    "request.json",
)
NAME_DIGITS = 6
BLOCK_BYTES = 4096  # that a small file takes on most disks
HEADER_BYTES = 300  # of a PNG file, generously
MAX_SHOWN = 5  # differences that a message lists


@dataclass(frozen=True)
class SampleFolder:
    """The files of one request. Batch b holds the images from b * batch on, `batch` of them or what remains."""

    path: Path
    n: int
    batch: int
    image_size: int  # pixels
    formats: tuple[str, ...]

    @property
    def unfinished(self) -> Path:
        """What is removed at the end."""
        return self.path / UNFINISHED

    @property
    def keeps_arrays(self) -> bool:
        """Whether batches are kept as arrays until the end: for the .npz, or for a grid without PNG files to read."""
        return NPZ in self.formats or PNG not in self.formats

    @property
    def num_batches(self) -> int:
        """Of all images."""
        return -(-self.n // self.batch)

    def positions(self, number: int) -> range:
        """The images of a batch."""
        return range(number * self.batch, min(self.n, (number + 1) * self.batch))

    def image(self, position: int) -> Path:
        """The PNG file of an image."""
        digits = max(NAME_DIGITS, len(str(self.n - 1)))
        return self.path / IMAGES / f"{position:0{digits}d}.png"

    def array(self, number: int) -> Path:
        """The array of a batch."""
        return self.unfinished / f"{number:08d}.npy"

    # -- before anything is made ---------------------------------------------------------------------------------------

    def check(self, request: Mapping[str, Any]) -> None:
        """Raises UserError if the folder is a file, holds other things, or holds samples of another request.

        request: all of it or a part. While no image is finished, another request may take the folder: a batch that was
        too large for the memory can be made smaller.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"to={self.path} is a file. Give a folder, which need not exist.")
        known = self.known()
        if known is None:
            self._refuse_other_things()
        elif changed := changes(known, request):
            more = f"; and {len(changed) - MAX_SHOWN} more" if len(changed) > MAX_SHOWN else ""
            raise UserError(
                f"to={self.path} holds samples of another request ({'; '.join(changed[:MAX_SHOWN])}{more}). "
                "Choose another to=, or remove the folder."
            )

    def known(self) -> dict[str, Any] | None:
        """The request that the folder's images belong to; None if there are no images yet."""
        if (self.path / SAMPLES).exists():
            return _request_in(self.path / SAMPLES)
        if (self.unfinished / REQUEST).exists() and self._has_images():
            return _request_in(self.unfinished / REQUEST)
        return None

    def _has_images(self) -> bool:
        return any(self.unfinished.glob("*.npy")) or any((self.path / IMAGES).glob("*.png"))

    def _refuse_other_things(self) -> None:
        if not self.path.exists() or (self.unfinished / REQUEST).exists():
            return
        if others := sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")):
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise UserError(
                f"to={self.path} holds other things ({', '.join(others[:3])}{more}). Choose a new or an empty folder."
            )

    def bytes_needed(self) -> int:
        """Disk space, at most, for everything that is not there yet. Noise does not compress; most images halve."""
        image = 3 * self.image_size**2
        png = -(-(image + image // 1000 + HEADER_BYTES) // BLOCK_BYTES) * BLOCK_BYTES
        arrays = self.keeps_arrays + (NPZ in self.formats)
        places = [place for place in (self.unfinished, self.path / IMAGES) if place.is_dir()]
        found = sum(file.stat().st_size for place in places for file in place.iterdir())
        return max(0, self.n * (arrays * image + (PNG in self.formats) * png) - found)

    def check_disk(self) -> None:
        """Raises UserError if the disk has not enough room for what is missing, or if the folder cannot be written."""
        if self.is_finished():
            return
        existing = next(place for place in (self.path, *self.path.absolute().parents) if place.is_dir())
        needed, free = self.bytes_needed(), shutil.disk_usage(existing).free
        if needed > free:
            what = f"{self.n:,} images of {self.image_size} px as {', '.join(self.formats)}"
            raise UserError(
                f"to={self.path}: {what} take up to {in_words(needed)} while they are made, and the disk has "
                f"{in_words(free)} free. Make room, choose another to=, or fewer of as={','.join(FORMATS)}."
            )
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"to={self.path} cannot be written: {existing} allows no new files. Choose another to=.")

    # -- batches -------------------------------------------------------------------------------------------------------

    def open(self, request: Mapping[str, Any]) -> None:
        """Makes the folder for a request that passed `check`, and removes what a killed process was writing."""
        for leftover in (*self.path.glob(".*.tmp"), *(self.path / IMAGES).glob(".*.tmp")):
            leftover.unlink(missing_ok=True)
        self.make_places()
        write_whole(self.unfinished / REQUEST, to_text({"request": request}))

    def make_places(self) -> None:
        """Makes the folders for batches. On a network disk, a machine may not see yet that another one made them."""
        for place in (self.unfinished, *([self.path / IMAGES] if PNG in self.formats else [])):
            place.mkdir(parents=True, exist_ok=True)

    def is_finished(self) -> bool:
        """Whether every file is there, samples.json included."""
        names = {
            SAMPLES,
            *([SAMPLES_NPZ] if NPZ in self.formats else []),
            *([GRID_PNG] if GRID in self.formats else []),
        }
        return names <= _files_in(self.path) and not (PNG in self.formats and self._without_png())

    def missing(self) -> list[int]:
        """The numbers of the batches that are not finished."""
        lacking = self._without_png() if PNG in self.formats else set()
        if self.keeps_arrays:
            there = _files_in(self.unfinished)
            lacking |= {number for number in range(self.num_batches) if self.array(number).name not in there}
        return sorted(lacking)

    def _without_png(self) -> set[int]:
        """The batches that lack a PNG file."""
        there = _files_in(self.path / IMAGES)
        return {position // self.batch for position in range(self.n) if self.image(position).name not in there}

    def write(self, number: int, images: NDArray[np.uint8]) -> None:
        """Writes the images (B, H, W, 3) of a batch. Its array, if one is kept, comes last."""
        if PNG in self.formats:
            for position, image in zip(self.positions(number), images, strict=True):
                write_png(self.image(position), image)
        if self.keeps_arrays:
            write_atomically(self.array(number), lambda place: _save(place, images), sync=True)

    def arrays(self) -> Iterator[NDArray[np.uint8]]:
        """The kept batches in order, one in memory at a time."""
        return (np.load(self.array(number), allow_pickle=False) for number in range(self.num_batches))

    def read(self, positions: Sequence[int]) -> NDArray[np.uint8]:
        """Some images, (B, H, W, 3)."""
        if not self.keeps_arrays:
            return np.stack([read_png(self.image(position)) for position in positions])
        arrays = (np.load(self.array(p // self.batch), mmap_mode="r", allow_pickle=False) for p in positions)
        return np.stack([array[p % self.batch] for p, array in zip(positions, arrays, strict=True)])

    def close(self) -> None:
        """Removes what only an unfinished folder needs."""
        shutil.rmtree(self.unfinished, ignore_errors=True)


def _files_in(folder: Path) -> set[str]:
    """The names of a folder's files that are not empty: a loss of power may leave an empty file under a name."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file() and entry.stat().st_size}


def _save(place: Path, images: NDArray[np.uint8]) -> None:
    with place.open("wb") as file:
        np.save(file, images, allow_pickle=False)


def _request_in(file: Path) -> dict[str, Any]:
    content = read_json(file)
    request = content.get("request") if isinstance(content, dict) else None
    if not isinstance(request, dict):
        raise UserError(
            f"{file} is damaged: it does not say which request the images belong to. "
            "Choose another to=, or remove the folder."
        )
    return request


def to_text(facts: Mapping[str, Any]) -> str:
    """JSON with one line for each fact, so that a list of thousands of labels is a single line."""
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def in_words(num_bytes: int) -> str:
    """ "19.7 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1000:.3g} kB"
