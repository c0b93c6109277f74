"""evaluation/sweep.py: every combination is tried, the best one is evaluated on other seeds,
and the record says how many were tried.
"""

import json

import pytest
from evaluated_run import Projections, image_folder, run_folder

from pixlat.common.config.resolve import settings_tried
from pixlat.common.errors import UserError
from pixlat.evaluation import sweep
from pixlat.evaluation.records.record import read_record
from pixlat.evaluation.records.selection import with_sweep
from pixlat.methods import get_spec


@pytest.fixture(autouse=True)
def _cheap_extractor(monkeypatch):
    monkeypatch.setattr("pixlat.evaluation.judges.panel.EmbeddedExtractor", Projections)


def test_the_best_setting_is_recorded_with_the_number_of_tries(tmp_path):
    run_folder(tmp_path / "run", image_folder(tmp_path / "data"))
    shown = sweep.work(
        [
            f"run={tmp_path}/run",
            "sample.guidance=1,2,4",
            "ema=raw,0.9",
            "sample.steps=1",
            "tries=20",
            "num_images=24",
            "device=cpu",
        ]
    )
    (path,) = (tmp_path / "run" / "evaluations").rglob("result.json")
    record, tried = read_record(path), json.loads(path.with_name("sweep.json").read_text())
    assert tried["selection"] == {"n_configs": 6, "n_samples": 20, "swept": ["sample.guidance", "ema"]}
    preset = settings_tried(get_spec("jit"), "demo")  # whose own settings were chosen among others before
    assert record["selection"] == with_sweep(preset, tried["selection"])
    assert record["selection"]["n_configs"] == preset["n_configs"] + 5 > 6
    assert len({json.dumps(entry["setting"]) for entry in tried["tries"]}) == 6
    best = min(tried["tries"], key=lambda entry: entry["score"])["setting"]
    assert record["checkpoint"]["ema_kind"] == best["ema"] and record["sampling"]["steps"] == 1
    assert record["sampling"]["guidance_scale"] == (
        None if best["sample.guidance"] == "1" else float(best["sample.guidance"])
    )
    assert record["metrics"]["fd"]["n"] == 24 and record["seeds"]["sample"] == [0]
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines[:6]] == [
        f"{score:.5g}" for score in sorted(entry["score"] for entry in tried["tries"])
    ]
    assert lines[0].split()[1:] == [f"{key}={value}" for key, value in best.items()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample.guidance=1,2"], "give run="),
        (["run=a", "sample.guidance=2"], "no key has several values"),
        (["run=a", "sample.guidance=1,2", "tries=5"], "at least 20"),
        (["run=a", "sample.guidance=1,2", "try_seed=0"], "among seeds"),
        (["run=a", "sample.guidance=1,2", "protocol=rfid"], "no sampling settings"),
        (["run=a", "sample.guidance=1,2", "triess=5"], "Did you mean 'tries'"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        sweep.work(arguments)
