"""Photographs that lie beside the checkout, in ../shared/data, and are never part of it."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_file(name: str) -> Path:
    """A file of ../shared/data; the test is skipped where it is absent."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not there: this test reads real photographs that are not part of the project")
    return path


def unpacked(name: str, folder: Path) -> Path:
    """A shared tar, unpacked below `folder`; returns the one folder that it holds."""
    with tarfile.open(shared_file(name)) as tar:
        # Python 3.11.0 to 3.11.3 have none
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / Path(name).stem
