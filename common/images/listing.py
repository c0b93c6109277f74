"""Lists the images of a folder: names, sizes and classes in arrays. Imports no torch.

To list 1.28 million files, pixlat must ask the file system for the size of each. On a network file system that takes
minutes, and every process of every start would do it. So the listing of a large folder is kept in the user's cache
folder, with the time of change of every folder below it. Adding, removing or renaming a file changes the time of its
folder; then pixlat lists all files again. Overwriting a file in place does not change that time. `FolderImages` notices
it when it reads the file, because it compares the file's size with the listed size.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixlat.common.cache import KEEP_FROM, SETTLED_NS, cache_file, keep_arrays, kept_arrays, one_at_a_time
from pixlat.common.errors import UserError
from pixlat.common.images.archive import IMAGE_SUFFIXES
from pixlat.common.images.names import Names

FORMAT = 1  # version of the cache files


@dataclass(frozen=True)
class Listing:
    """Image files under one folder of classes."""

    root: Path
    class_names: tuple[str, ...]
    files: Names  # relative to root, with "/"
    sizes: NDArray[np.int64]  # bytes
    labels: NDArray[np.int64]

    def part(self, mask: NDArray[np.bool_]) -> Listing:
        """The files where the mask (N,) is true."""
        chosen = np.flatnonzero(mask)
        return replace(self, files=self.files.chosen(chosen), sizes=self.sizes[chosen], labels=self.labels[chosen])

    def digest(self) -> str:
        """SHA-256 over names and sizes. It does not read the contents: for 1.28 million files that would take hours."""
        hasher = hashlib.sha256()
        for index, size in enumerate(self.sizes.tolist()):
            hasher.update(b"%b\0%d\n" % (self.files.raw(index), size))
        return hasher.hexdigest()


@dataclass(frozen=True)
class Tree:
    """The folders that were listed, and the time of the last change of each."""

    folders: tuple[str, ...]  # relative to the root; "" is the root
    changed_ns: tuple[int, ...]

    def unchanged(self, root: Path) -> bool:
        """Whether every folder still exists and has not changed since."""
        with contextlib.suppress(OSError):
            return all(
                (root / folder).stat().st_mtime_ns == then
                for folder, then in zip(self.folders, self.changed_ns, strict=True)
            )
        return False


def list_folder(root: Path) -> Listing:
    """All images below the sub-folders of `root`, with the classes in sorted order.

    Skips hidden folders and files that are not images. If several processes of a machine call this at once,
    one lists a large folder and the others read its cache file.
    """
    kept = cache_file("listing", root).with_suffix(".npz")
    with one_at_a_time(kept):
        if (known := _read_kept(kept, root)) is not None:
            return known
        start = time.time_ns()
        listing, tree = _walk(root)
        if len(listing.files) >= KEEP_FROM and max(tree.changed_ns) < start - SETTLED_NS:
            _keep(kept, listing, tree)
    return listing


def _walk(root: Path) -> tuple[Listing, Tree]:
    folders = {"": _changed_ns(root)}  # read before the listing, so that a change during the listing is noticed
    class_names = sub_folders(root)
    if not class_names:
        raise UserError(
            f"{root} has no sub-folders. data=folder takes the classes from sub-folders: "
            f"move the images to {root}/CLASS/."
        )
    names, sizes, counts = [], [], []
    for name in class_names:
        images = sorted(_images_below(root / name, f"{name}/", folders))
        if not images:
            raise UserError(
                f"class folder {root / name} holds no image ({', '.join(IMAGE_SUFFIXES)}). "
                "Add images or remove the folder."
            )
        names.append(Names.of(file for file, _ in images))
        sizes.append(np.array([size for _, size in images], dtype=np.int64))
        counts.append(len(images))
    labels = np.repeat(np.arange(len(class_names)), counts)
    return Listing(root, tuple(class_names), Names.joined(names), np.concatenate(sizes), labels), Tree(
        tuple(folders), tuple(folders.values())
    )


def sub_folders(root: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"data.path={str(root)!r} cannot be listed: {error.strerror}. "
            "Give a folder that exists and that you may read."
        ) from error


def _changed_ns(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError as error:
        raise UserError(
            f"data.path={str(folder)!r} cannot be listed: {error.strerror}. "
            "Give a folder that exists and that you may read."
        ) from error


def _images_below(folder: Path, prefix: str, folders: dict[str, int]) -> list[tuple[str, int]]:
    """(relative name, size in bytes) of every image file, at any depth.

    Adds each folder that it lists to `folders`, with its time of change.
    """
    images = []
    try:
        folders[prefix.removesuffix("/")] = folder.stat().st_mtime_ns
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    images += _images_below(Path(entry.path), f"{prefix}{entry.name}/", folders)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    images.append((prefix + entry.name, entry.stat().st_size))
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be read: {error.strerror}. "
            "Check that the file exists and that you may read it."
        ) from error
    return images


def _keep(kept: Path, listing: Listing, tree: Tree) -> None:
    texts = {"class_names": Names.of(listing.class_names), "files": listing.files, "folders": Names.of(tree.folders)}
    arrays: dict[str, Any] = {key: array for name, text in texts.items() for key, array in text.arrays(name).items()}
    arrays |= {
        "format": np.array(FORMAT),
        "sizes": listing.sizes,
        "labels": listing.labels,
        "changed_ns": np.array(tree.changed_ns, dtype=np.int64),
    }
    keep_arrays(kept, arrays)


def _read_kept(kept: Path, root: Path) -> Listing | None:
    """The cached listing, if no folder has changed since."""
    arrays = kept_arrays(kept, FORMAT)
    if arrays is None:
        return None
    try:
        if not (tree := _tree_of(arrays)).unchanged(root):
            return None
        files, sizes, labels = Names.from_arrays(arrays, "files"), arrays["sizes"], arrays["labels"]
        class_names = tuple(Names.from_arrays(arrays, "class_names"))
    except (ValueError, KeyError):  # the cache file is damaged; `list_folder` makes it again
        return None
    consistent = (
        len(files) == len(sizes) == len(labels)
        and sizes.dtype == labels.dtype == np.int64
        and tree.folders[:1] == ("",)
    )
    return Listing(root, class_names, files, sizes, labels) if consistent else None


def _tree_of(arrays: Mapping[str, Any]) -> Tree:
    return Tree(tuple(Names.from_arrays(arrays, "folders")), tuple(arrays["changed_ns"].tolist()))
