"""The user's cache folder holds the features of real images for all folders of runs."""

import shutil

import pytest
from evaluated_run import Projections, image_folder, run_folder

from pixlat.common import cache
from pixlat.common.cache import cache_folder, features_folder, folder_bytes
from pixlat.evaluation import run
from pixlat.evaluation.features import feature_sets
from pixlat.launch.checkup import machine


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXLAT_CACHE_DIR", str(tmp_path / "cache"))
    cache._say_once.cache_clear()


def test_the_folder_is_the_users(tmp_path, monkeypatch):
    assert features_folder(tmp_path / "runs") == tmp_path / "cache" / "features"
    assert not (tmp_path / "runs").exists()
    monkeypatch.delenv("PIXLAT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert features_folder(tmp_path) == tmp_path / "xdg" / "pixlat" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert features_folder(tmp_path) == tmp_path / "home" / ".cache" / "pixlat" / "features"


def test_where_it_cannot_be_written_the_folder_of_runs_has_its_own_and_says_so_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIXLAT_CACHE_DIR", str(tmp_path / "file"))
    for _ in range(2):
        assert features_folder(tmp_path / "runs") == tmp_path / "runs" / ".references"
    told = capsys.readouterr().err
    assert told.count("note: ") == 1 and str(tmp_path / "runs" / ".references") in told and "PIXLAT_CACHE_DIR" in told
    monkeypatch.setenv("RANK", "1")
    cache._say_once.cache_clear()
    features_folder(tmp_path / "runs")
    assert capsys.readouterr().err == ""


def test_an_evaluation_in_another_folder_of_runs_reads_the_same_features(tmp_path, monkeypatch):
    monkeypatch.setattr("pixlat.evaluation.judges.panel.EmbeddedExtractor", Projections)
    run_folder(tmp_path / "one" / "run", image_folder(tmp_path / "data"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    run.work([f"run={tmp_path}/one/run", "device=cpu"])
    kept = sorted((tmp_path / "cache" / "features").iterdir())
    assert len(kept) == 2 and not list(tmp_path.rglob(".references"))  # of training and of held-out images
    monkeypatch.setattr(feature_sets, "collect", lambda *_: pytest.fail("extracted again"))
    run.work([f"run={tmp_path}/two/run", "device=cpu"])
    assert sorted((tmp_path / "cache" / "features").iterdir()) == kept


def test_the_doctor_says_where_it_is_and_how_large(tmp_path):
    assert folder_bytes(cache_folder()) == 0
    features_folder(tmp_path)
    (cache_folder() / "features" / "x.safetensors").write_bytes(bytes(3_000_000))
    found = machine.cache_size(cache_folder())
    assert str(tmp_path / "cache") in found.text and "0.00 GB" in found.text
    assert found.facts["cache_gb"] == pytest.approx(0.003, rel=0.1)
