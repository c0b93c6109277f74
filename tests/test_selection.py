"""How many settings a record says were tried: by the preset's authors, by a sweep, and by repeated evaluations."""

import json
from pathlib import Path

import pytest
from evaluated_run import Projections, image_folder, run_folder
from records import fields, protocol

from pixlat.common.config.resolve import load_presets, settings_tried
from pixlat.evaluation import run, sweep
from pixlat.evaluation.protocols.identity import protocol_hash
from pixlat.evaluation.records.record import build_record, read_record
from pixlat.evaluation.records.selection import recorded, selection_of_preset, with_evaluations, with_sweep
from pixlat.methods import get_spec, registered

UNTUNED = {"n_configs": 1, "n_samples": 0}
TUNED = {"n_configs": 10, "n_samples": 300, "about": "ten, by hand"}
ONE = {"n_configs": 1, "n_samples": 0, "swept": []}


def config(digest):
    return {"digest": digest * 12, "settings": {}, "preset": "demo"}


def kept(digest="a", **changes):
    """A record of an evaluation, with these settings."""
    return build_record({**fields(), "config": config(digest), **changes})


def now(digest="a", num_images=1000):
    measured = protocol(num_images)
    row = {**fields(), "protocol": measured, "protocol_hash": protocol_hash(measured), "config": config(digest)}
    return {key: row[key] for key in ("checkpoint", "sampling", "config", "protocol", "protocol_hash")}


def test_the_presets_tries_are_the_records():
    assert selection_of_preset(UNTUNED) == ONE
    assert selection_of_preset(TUNED) == {**TUNED, "swept": []}
    build_record(fields(selection=selection_of_preset(TUNED)))


def test_evaluations_with_other_settings_are_tries():
    assert with_evaluations(UNTUNED, now(), []) == ONE
    assert with_evaluations(UNTUNED, now("a"), [kept("a")]) == ONE  # the same settings again, perhaps with other seeds
    tried = with_evaluations(UNTUNED, now("a"), [kept("a"), kept("b"), kept("c"), kept("c", notes="other seeds")])
    assert tried == {"n_configs": 3, "n_samples": 1000, "swept": []}
    assert with_evaluations(TUNED, now("a"), [kept("a")]) == {**TUNED, "swept": []}
    assert with_evaluations(TUNED, now("b"), [kept("a")])["n_configs"] == 11
    build_record(fields(selection=with_evaluations(TUNED, now("b"), [kept("a")])))


def test_other_checkpoints_and_other_protocols_are_no_tries():
    checkpoint = {**fields()["checkpoint"], "sha256": "ef" * 32}
    others = [kept("b", checkpoint=checkpoint), kept("c", protocol=protocol(50)), kept("d", protocol=None, metrics={})]
    assert with_evaluations(UNTUNED, now("a"), others) == ONE


def test_early_records_are_told_apart_by_their_sampler():
    early = build_record(fields())
    assert with_evaluations(UNTUNED, now("a"), [early]) == ONE
    other = build_record(fields(sampling={**fields()["sampling"], "guidance_scale": 1.5}))
    raw = build_record(fields(checkpoint={**fields()["checkpoint"], "ema_kind": "raw"}))
    assert with_evaluations(UNTUNED, now("a"), [early, other, raw])["n_configs"] == 3


def test_a_sweep_counts_all_its_settings_and_the_presets():
    swept = {"n_configs": 6, "n_samples": 1000, "swept": ["sample.guidance"]}
    assert with_sweep(UNTUNED, swept) == swept
    assert with_sweep(TUNED, swept) == {**TUNED, **swept, "n_configs": 15}
    for tried, total in ((UNTUNED, 7), (TUNED, 16)):
        chosen = kept("e", selection=with_sweep(tried, swept))
        assert with_evaluations(tried, now("b"), [chosen])["n_configs"] == total  # the sweep's, and this one
        assert with_evaluations(tried, now("e"), [chosen])["n_configs"] == total - 1  # the sweep's best once more


@pytest.mark.parametrize("method", sorted(registered()))
def test_every_demo_says_how_often_it_was_tried_and_published_settings_say_nothing(method):
    spec = get_spec(method)
    for preset in load_presets(spec.presets):
        tried = settings_tried(spec, preset)
        build_record(fields(selection=selection_of_preset(tried)))
        assert (tried["n_configs"] > 1) == (preset == "demo"), preset


def test_the_commands_count(tmp_path, monkeypatch):
    monkeypatch.setattr("pixlat.evaluation.judges.panel.EmbeddedExtractor", Projections)
    place = tmp_path / "run"
    run_folder(place, image_folder(tmp_path / "data"))
    demo = settings_tried(get_spec("jit"), "demo")

    def evaluated(*settings):
        shown = run.work([f"run={place}", "device=cpu", "sample.steps=1", *settings])
        return read_record(Path(shown.splitlines()[-1]))["selection"]

    assert evaluated() == {**demo, "swept": []}
    assert evaluated("seeds=[7]")["n_configs"] == demo["n_configs"]
    assert [evaluated(f"sample.guidance={scale}")["n_configs"] - demo["n_configs"] for scale in (1, 2, 2)] == [1, 2, 2]
    assert evaluated("sample.guidance=1", "ema=raw")["n_configs"] == demo["n_configs"] + 3
    assert evaluated("num_images=30")["n_configs"] == demo["n_configs"]  # another protocol
    sweep.work([f"run={place}", "device=cpu", "sample.guidance=1,2", "sample.steps=1", "tries=20", "num_images=40"])
    (swept,) = [record for record in recorded(place) if record["selection"]["swept"]]
    assert swept["selection"] == {**demo, "swept": ["sample.guidance"], "n_configs": demo["n_configs"] + 1}
    (place / "evaluations" / "damaged").mkdir()
    (place / "evaluations" / "damaged" / "result.json").write_text(json.dumps({}))
    assert len(recorded(place)) == 8  # the training's, six evaluations and the sweep's, but not the damaged one
