"""`evaluation/speed.py` prints what it promises, and its MACs are the counted ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pixlat.common.config.resolve import resolve
from pixlat.evaluation.bench import options, steps
from pixlat.methods import get_spec
from pixlat.methods.base import DataInfo, Method

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "data=synthetic",
    "data.image_size=16",
    "model.depth=2",
    "model.width=16",
    "model.heads=2",
    "model.patch=4",
    "model.context_start=1",
    "sample.steps=2",
)


def speed(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "evaluation/speed.py", "method=jit", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
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
    assert measured["precision"] == measured["sample"]["precision"] == "float32" and not measured["compiled"]
    assert measured["sample"]["images_per_s_without_draws"] > measured["sample"]["images_per_s_worst"]
    # as many repetitions as of training
    assert measured["sample"]["images_per_s_worst"] < measured["sample"]["images_per_s_best"]
    for told in (
        "building the networks",
        "training steps of 3 images in float32, 3 untimed and 2 timed",
        "samplings of 3 images by 3 evaluations in float32",
    ):
        assert told in result.stderr


class Seen(Method):
    """Keeps what a product within the sampler is computed in, and how often it is asked."""

    def __init__(self):
        super().__init__(None, DataInfo("toy", 3, 8, 30))
        self.dtypes = []

    def sample(self, labels, noise, config):
        noise.normal(3, 8, 8)
        self.dtypes.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_sampling_is_timed_in_the_precision_of_evaluations_and_as_often_as_training(precision, dtype):
    run = resolve(get_spec("jit"), {"train.precision": "bf16", "eval.precision": precision})
    method = Seen()
    with torch.autocast("cpu", torch.bfloat16):
        seconds, drawing = steps.time_sampling(method, run, 4, 5, torch.device("cpu"))
    assert method.dtypes == [dtype] * 6 and len(seconds) == len(drawing) == 5
    assert all(0 < drawn < whole for drawn, whole in zip(drawing, seconds, strict=True))


def test_a_preset_is_not_compiled_on_a_cpu_unless_the_command_asks(capsys):
    arguments = ["method=jit", "preset=imagenet256-b", "speed.batch=2"]
    (((preset, _),), ((asked, _),)) = (
        list(options.configurations([*arguments, *more])) for more in ([], ["train.compile=true"])
    )
    assert (preset.train.compile, asked.train.compile) == (False, True)
    assert "this is a CPU: blocks are not compiled" in capsys.readouterr().err


def test_a_mistake_is_one_line():
    result = speed("model.dept=2")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "model.depth" in result.stderr


def test_data_are_timed_in_both_orders(monkeypatch, capsys):
    from pixlat.evaluation import speed

    monkeypatch.setattr("pixlat.evaluation.bench.data.DATA_SECONDS", 0.05)
    assert speed.main(["data", "data=synthetic", "data.image_size=16"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["images"] == 4600 and min(measured["images_per_s_in_order"], measured["images_per_s_random"]) > 10


def test_the_search_for_neighbours_is_timed_against_its_first_version():
    from pixlat.evaluation.bench.neighbours import compare

    measured = compare(16, searched=200)
    assert (
        measured["queries"] == 520
        and measured["training_images"] == measured["first_version"]["measured_images"] == 200
    )
    assert measured["first_version"]["wall_s"] > 0 and measured["now"]["wall_s"] > 0


def test_neighbours_need_sizes(capsys):
    from pixlat.evaluation import speed

    assert speed.main(["neighbours", "large"]) == 2 and "neighbours 256 512" in capsys.readouterr().err
