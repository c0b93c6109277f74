"""What several test files need: one thread, and the smallest run of a method."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# For child processes: one thread, as two cores are shared by parallel workers,
# and the package of this checkout, wherever they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_xdist_auto_num_workers() -> int:
    """A worker a core, and not so many that their copies of torch fill the memory of a large machine."""
    return min(8, os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def _single_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """What pixlat can make again is kept in the tests' own folder, and not in the user's."""
    os.environ["PIXLAT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
