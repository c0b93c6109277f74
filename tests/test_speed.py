"""`evaluation/speed.py` prints what it promises, and its MACs are the counted ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ("data=synthetic", "data.image_size=16", "model.depth=2", "model.width=16", "model.heads=2", "model.patch=4", "model.context_start=1", "sample.steps=2")


def speed(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "evaluation/speed.py", "method=jit", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )


def test_rates_macs_and_memory_as_json():
    result = speed(*TINY, "speed.batch=3", "speed.steps=2", "sample.guidance=1")
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    for part in ("train", "sample"):
        rates = measured[part]
        assert 0 < rates["images_per_s_worst"] <= rates["images_per_s"] <= rates["images_per_s_best"]
        assert rates["macs_per_s"] == pytest.approx(rates["macs_per_image"] * rates["images_per_s"])
        assert rates["peak_bytes"] > 0
    assert measured["sample"]["net_forwards"] == {"network": 3.0}
    assert measured["batch"] == 3 and measured["device"]


def test_a_mistake_is_one_line():
    result = speed("model.dept=2")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "model.depth" in result.stderr


def test_data_are_timed_in_both_orders(monkeypatch, capsys):
    from evaluation import speed

    monkeypatch.setattr(speed, "DATA_SECONDS", 0.05)
    assert speed.main(["data", "data=synthetic", "data.image_size=16"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["images"] == 4600 and min(measured["images_per_s_in_order"], measured["images_per_s_random"]) > 10


def test_the_search_for_neighbours_is_timed_against_its_first_version():
    from evaluation.neighbour_speed import compare

    measured = compare(16, searched=200)
    assert measured["queries"] == 520 and measured["training_images"] == measured["first_version"]["measured_images"] == 200
    assert measured["first_version"]["wall_s"] > 0 and measured["now"]["wall_s"] > 0


def test_neighbours_need_sizes(capsys):
    from evaluation import speed

    assert speed.main(["neighbours", "large"]) == 2 and "neighbours 256 512" in capsys.readouterr().err
