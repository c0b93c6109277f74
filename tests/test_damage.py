"""Damaged, altered and hostile files: each is passed over by name or refused in a sentence; none crashes, hangs or is used silently."""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from damage import flips
from evaluated_run import image_folder, run_folder
from PIL import Image
from records import record
from safetensors.torch import save_file

from common import checkpoint
from common.checkpoint import Checkpoint
from common.config import flatten, inert, resolve, to_dict
from common.errors import UserError
from common.external import read_tensors, run_weights
from common.meters import read_rows, truncate_rows
from common.saved_config import check_config, read_config
from common.trainer import own_state
from evaluation import columns, feature_sets, leaderboard, reference, run
from evaluation.arrays import NpzImages, read_floats
from evaluation.attachments import grid_of, losses_of
from evaluation.curve import curve_lines, read_curve
from evaluation.feature_sets import FeatureSet
from evaluation.models import imported_facts, load_run, saved_run
from evaluation.moments import Moments
from evaluation.protocol import protocol_hash
from evaluation.record import SCHEMA_FILE, row_id
from evaluation.reference_files import Reference, read_built, write_built
from evaluation.samples import FolderSamples
from launch import prepare, stages
from launch.export import export_run
from launch.folder import check_same
from launch.released import import_released, write_folder
from methods import get_spec

CPU = torch.device("cpu")

# -- checkpoints -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    """Two checkpoints of one small tensor and an optimizer with two parts each, whose files' names differ in one bit."""
    weights = {"w": torch.arange(2.0)}
    tensors = {"model": weights, "optimizer-a-0": weights, "optimizer-a-1": weights}
    for step in (1, 2):
        checkpoint.save(tmp_path / "checkpoints", step, Checkpoint(tensors, {"step": step}), keep=2)
    return tmp_path / "checkpoints"


def test_every_flipped_bit_of_a_manifest_is_found(saved):
    """No flip crashes, and none leaves the checkpoint whole unless the manifest still says the same."""
    newest, older = saved / "step-00000002", saved / "step-00000001"
    manifest = newest / "manifest.json"
    said, count = json.loads(manifest.read_text()), 0
    for where in flips(manifest):
        count += 1
        if checkpoint.find_damage(newest) is None:
            assert json.loads(manifest.read_bytes()) == said, where
    assert count == 8 * manifest.stat().st_size > 3000
    manifest.write_text(manifest.read_text().replace("bytes", "bytez", 1))
    assert checkpoint.latest(saved) == older


MANIFESTS = ["", "[]", "null", "5", '"x"', "{}", '{"f":{}}', '{"f":"x"}', "[" * 10**5, '{"model.safetensors":' * 10**4, "NaN", "\x00", "{" + "1" * 5000 + "}"]


@pytest.mark.parametrize("content", MANIFESTS, ids=lambda text: text[:24])
def test_a_manifest_of_another_shape_falls_back_to_the_checkpoint_before(saved, caplog, content):
    (saved / "step-00000002" / "manifest.json").write_text(content)
    assert checkpoint.latest(saved) == saved / "step-00000001"
    assert "ignoring the damaged checkpoint" in caplog.text and "manifest.json" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("model.safetensors"),
        lambda manifest: manifest.pop("trainer.json"),
        lambda manifest: manifest.pop("optimizer-a-1.safetensors"),
        lambda manifest: manifest.update({"../outside": manifest["trainer.json"]}),
        lambda manifest: manifest["trainer.json"].update(bytes=True),
        lambda manifest: manifest["trainer.json"].update(bytes=10**400),
        lambda manifest: manifest["trainer.json"].update(sha256=None),
        lambda manifest: manifest["trainer.json"].update(more=1),
    ],
)
def test_a_manifest_must_name_the_files_that_are_read(saved, change):
    path = saved / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert checkpoint.latest(saved) == saved / "step-00000001"


def test_a_pipe_in_a_checkpoint_does_not_hang(saved):
    for name in ("manifest.json", "trainer.json"):
        (saved / "step-00000002" / name).unlink()
        os.mkfifo(saved / "step-00000002" / name)
        assert checkpoint.latest(saved) == saved / "step-00000001"


def test_files_of_the_file_system_do_not_damage_a_checkpoint(saved):
    for name in (".nfs0001", "._model.safetensors", ".DS_Store"):
        (saved / "step-00000002" / name).write_bytes(b"?")
    assert checkpoint.latest(saved) == saved / "step-00000002"
    assert set(checkpoint.load(saved / "step-00000002").tensors) == {"model", "optimizer-a-0", "optimizer-a-1"}


def test_only_the_weights_that_are_asked_for_are_opened_and_verified(tmp_path, monkeypatch):
    """Optimizer state and the other averages are most of a large checkpoint."""
    run = run_folder(tmp_path / "run", image_folder(tmp_path / "data"))
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    model = checkpoint.load(folder).tensors["model"]
    others = {f"optimizer-loss-{number}": model for number in range(2)} | {"ema-0.99": model}
    facts = checkpoint.load_facts(folder)
    checkpoint.save(tmp_path / "run" / "checkpoints", 8, Checkpoint(checkpoint.load(folder).tensors | others, facts), keep=1)
    opened: list[str] = []
    for name in ("load_file", "safe_open", "sha256_of"):
        whole = getattr(checkpoint, name)
        monkeypatch.setattr(checkpoint, name, lambda path, *a, whole=whole, **k: (opened.append(Path(path).name), whole(path, *a, **k))[1])
    assert run.eval.ema is None and torch.equal(run_weights(tmp_path / "run").state["network.final.linear.bias"], 0.5 * model["network.final.linear.bias"])
    assert set(opened) == {"manifest.json", "trainer.json", "model.safetensors", "ema-0.9.safetensors"}
    opened.clear()
    run_weights(tmp_path / "run", "raw")
    assert set(opened) == {"manifest.json", "trainer.json", "model.safetensors"}
    largest = tmp_path / "run" / "checkpoints" / "step-00000008" / "optimizer-loss-0.safetensors"
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(UserError, match="no whole checkpoint"):  # what is not read must still be there in full
        run_weights(tmp_path / "run")


# -- run folders -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run folder with its record."""
    place = tmp_path_factory.mktemp("finished")
    run_folder(place / "mine", image_folder(place / "data"))
    return place / "mine"


@pytest.mark.parametrize(
    ("old", "new"), [("width: 16", "width: 32"), ("guidance: 1.5", "guidance: 2.0"), ("seed: 0", "seed: 1"), ("prediction: x", "prediction: v")]
)
def test_an_altered_configuration_is_not_used(finished, old, new):
    file = finished / "config.yaml"
    text = file.read_text()
    assert text.count(old) >= 1
    file.write_text(text.replace(old, new, 1))
    try:
        for use in (lambda: load_run(finished, {}, None, CPU), lambda: run_weights(finished), lambda: saved_run(finished, {})):
            with pytest.raises(UserError, match=r"config.yaml is not the configuration of .*step-00000007.*Restore the file.*give them on the command line"):
                use()
    finally:
        file.write_text(text)


def test_what_was_changed_is_named(finished, tmp_path):
    """By the command that starts.jsonl keeps, or by the preset where one key differs from it."""
    run = saved_run(finished, {})
    shutil.copytree(finished, tmp_path / "mine")
    file = tmp_path / "mine" / "config.yaml"
    file.write_text(file.read_text().replace("weight_decay: 0.0", "weight_decay: 0.5"))
    with pytest.raises(UserError, match=r"Changed since: train.weight_decay: 0.0 -> 0.5\."):
        saved_run(tmp_path / "mine", {})
    file.write_text(file.read_text().replace("guidance: 1.5", "guidance: 2.0"))
    with pytest.raises(UserError, match=r"Which setting was changed cannot be told\."):
        saved_run(tmp_path / "mine", {})
    settings = [f"{key}={value if key in ('method', 'preset') else json.dumps(value)}" for key, value in flatten(to_dict(run)) if "cluster" not in key]
    damaged = '{"command": 5}\n{"command": "x \\\\"}\n[]\n{"command": "x y"}\n'
    (tmp_path / "mine" / "starts.jsonl").write_text(damaged + json.dumps({"command": shlex.join(["launch/run.py", *settings])}) + "\n")
    with pytest.raises(UserError, match=r"Changed since: train.weight_decay: 0.0 -> 0.5; sample.guidance: 1.5 -> 2.0\."):
        saved_run(tmp_path / "mine", {})


def test_settings_on_the_command_line_and_keys_that_change_nothing_are_no_alteration(finished):
    assert load_run(finished, {"sample.guidance": "2", "data.workers": "1"}, None, CPU).run.sample.guidance == 2
    file = finished / "config.yaml"
    text = file.read_text()
    older = text.replace("  modes: convert\n", "").replace("  seeds: []\n", "")  # keys that came later
    assert len(older) < len(text)
    file.write_text(older.replace("workers: 0", "workers: 3").replace("name: null", "name: other", 1))
    try:
        assert load_run(finished, {}, None, CPU).run.data.workers == 3
    finally:
        file.write_text(text)


CONFIGS = [
    "",
    "[]",
    "null",
    "5",
    "a",
    "a: [",
    "train: 5",
    "method: jit",
    "a: &x [1]\nb: *x",
    "? [a]\n: b",
    "\x00",
    "a: !!python/object:os.system x",
    "[" * 2000,
]


@pytest.mark.parametrize("content", CONFIGS, ids=lambda text: text[:12])
def test_a_malformed_configuration_is_refused_in_a_sentence(finished, content):
    file, run = finished / "config.yaml", saved_run(finished, {})
    text = file.read_text()
    file.write_text(content)
    try:
        for use in (lambda: load_run(finished, {}, None, CPU), lambda: run_weights(finished), lambda: check_same(finished, run)):
            with pytest.raises(UserError, match=r"config.yaml is damaged: .*Restore the file"):
                use()
    finally:
        file.write_text(text)


def test_flipped_bits_of_a_configuration_are_found_or_change_nothing(finished):
    """What a flip leaves readable and of the same identity has the same settings, but for those that change neither a weight nor a score."""
    saved = finished / "checkpoints" / "step-00000007"
    facts, found = checkpoint.load_facts(saved), 0

    def settings():
        return {key: value for key, value in flatten(read_config(finished)) if not inert(key)}

    before = settings()
    for where in flips(finished / "config.yaml", sample=300):
        try:
            check_config(finished, read_config(finished), saved, facts)
        except UserError:
            found += 1
            continue
        assert settings() == before, where
    assert 150 < found < 300


def test_a_finished_run_without_checkpoints_is_not_told_to_finish(finished, tmp_path):
    for name, advice in (("mine", "restore them from a copy, or remove the folder and run it again"), ("cut", "Finish that run")):
        folder = tmp_path / name
        run = run_folder(folder, finished.parent / "data", record=name == "mine")
        weights = folder / "checkpoints" / "step-00000007" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        with pytest.raises(UserError, match=advice):
            load_run(folder, {}, None, CPU)
        assert run.method == "jit"


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.ema_decay", "["), ("train.lr", "${nope}"), ("name", "a: b: c"), ("name", "\x00"), ("name", "${"), ("train.lr", "!!python/name:os.x x")],
)
def test_values_that_are_no_yaml_are_named(key, value):
    with pytest.raises(UserError, match=rf"{key}.*(cannot be read|does not fit)"):
        resolve(get_spec("jit"), {"preset": "demo", "seed": "1", key: value})


@pytest.mark.parametrize("content", ["", "[]", "5", "null", "{", "[" * 10**5])
def test_damaged_digests_of_earlier_stages_are_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "stages.json").write_text(content)
    with pytest.raises(UserError, match=r"stages.json is damaged"):
        stages.hold_to_stages(tmp_path, [{"key": "codec", "checkpoint_sha256": "ab"}])


# -- imported and exported weights -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(finished) -> Path:
    """A run folder as `prepare.py import` makes it."""
    model = load_run(finished, {}, None, CPU)
    facts = {"file": "/x/w.pth", "sha256": "ab" * 32, "ema_decay": 0.9999, "weights": "ema", "licence": "MIT", "tensors": 3}
    run = dataclasses.replace(model.run, train=dataclasses.replace(model.run.train, ema_decay=[]))
    write_folder(finished.parent / "imported", run, own_state(model.method), facts)
    return finished.parent / "imported"


def test_every_change_of_an_import_is_found(imported):
    model = load_run(imported, {}, None, CPU)
    assert model.checkpoint == {"sha256": "ab" * 32, "step": None, "ema_decay": 0.9999, "ema_kind": "ema"}
    facts, before = run_weights(imported).facts, json.loads((imported / "imported.json").read_text())
    assert imported_facts(imported, facts) == before
    for where in flips(imported / "imported.json"):
        with pytest.raises(UserError, match=r"imported.json.*(changed after the import|damaged)"):
            imported_facts(imported, facts)
        assert where
    for content in ("", "[]", "null", "5", "{}", '{"file": 1}', "[" * 10**5):
        (imported / "imported.json").write_text(content)
        for checkpoint_facts in (facts, {"identity": "imported"}):  # of an early import, which keeps no digest
            with pytest.raises(UserError, match=r"imported.json.*(changed after|is damaged).*import"):
                imported_facts(imported, checkpoint_facts)
    (imported / "imported.json").unlink()
    with pytest.raises(UserError, match=r"imported.json cannot be read"):
        load_run(imported, {}, None, CPU)
    (imported / "imported.json").write_text(json.dumps(before, indent=1) + "\n")
    config = (imported / "config.yaml").read_text()
    (imported / "config.yaml").write_text(config.replace("guidance: 1.5", "guidance: 2.0"))
    with pytest.raises(UserError, match=r"config.yaml is not the configuration of"):
        load_run(imported, {}, None, CPU)
    (imported / "config.yaml").write_text(config)


def test_an_early_import_still_loads(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "early")
    folder = tmp_path / "early" / "checkpoints"
    weights = checkpoint.load(folder / "step-00000000")
    shutil.rmtree(folder)
    checkpoint.save(folder, 0, Checkpoint(weights.tensors, {"identity": "imported", "step": 0, "images_seen": 0}), keep=1)
    assert load_run(tmp_path / "early", {}, None, CPU).checkpoint["sha256"] == "ab" * 32


def test_an_imported_json_in_a_run_of_ours_is_refused(finished, imported, tmp_path):
    shutil.copytree(finished, tmp_path / "mine")
    shutil.copy(imported / "imported.json", tmp_path / "mine")
    with pytest.raises(UserError, match=r"imported.json does not belong to"):
        load_run(tmp_path / "mine", {}, None, CPU)


def import_of(folder: Path, to: Path) -> None:
    import_released(folder, to, "jit", None, None, None, {})


def test_a_damaged_export_is_refused_in_a_sentence(finished, tmp_path):
    export_run(finished, tmp_path / "out", None, "MIT")
    import_of(tmp_path / "out", tmp_path / "back")
    file, config = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "config.yaml"
    content, text = file.read_bytes(), config.read_text()
    for damaged in (b"", b"junk", content[:-4], content[:200], b"\xff" * 100, content.replace(b"ema_decay", b"ema_delay"), content.replace(b'"0.9"', b'"x.9"')):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model.safetensors"):
            import_of(tmp_path / "out", tmp_path / "never")
    save_file({"w": torch.ones(2)}, file, {"ema": "raw", "ema_decay": "", "licence": ""})
    with pytest.raises(UserError, match=r"does not fit the config.yaml beside it, \d+ keys differ"):
        import_of(tmp_path / "out", tmp_path / "never")
    file.write_bytes(content)
    config.write_text(text.replace("guidance: 1.5", "guidance: 2.0"))
    with pytest.raises(UserError, match=r"config.yaml is not the configuration of"):
        import_of(tmp_path / "out", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_card_says_where_a_run_was_cut(finished, tmp_path):
    run = run_folder(tmp_path / "cut", finished.parent / "data", record=False)
    export_run(tmp_path / "cut", tmp_path / "out", None, "MIT")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"**This run is not finished**: these weights are of step 7, after {7 * run.train.batch:,} of {run.train.images:,} training images." in card
        and "Not evaluated." in card
    )
    export_run(finished, tmp_path / "whole", None, "MIT")
    assert "not finished" not in (tmp_path / "whole" / "README.md").read_text()


# -- logs ------------------------------------------------------------------------------------------------------------------------


def metrics(path: Path) -> Path:
    rows = [{"step": s, "images": 64 * s, "loss": 0.5 / s, "lr": 1e-3, "images_per_s": 10.25, "seconds": float(s)} for s in range(1, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_damaged_log_loses_its_damaged_lines_and_no_more(tmp_path, caplog):
    from common.pictures import training_curves

    file = metrics(tmp_path / "metrics.jsonl")
    whole, last = read_rows(file), file.stat().st_size - 1
    for number, where in enumerate(flips(file, sample=200)):
        caplog.clear()
        truncate_rows(file, 10**15)
        rows = read_rows(file)
        assert sum(row in whole for row in rows) >= 2, where  # a lost line end costs two lines
        named = "damaged lines are left out" in caplog.text
        assert named or len(rows) == 4 or where.endswith(f"byte {last}"), where  # without its line end the last line counts as cut by a kill
        if number % 40 == 0:
            training_curves(rows, tmp_path / "training.png")
    for content in ("[]\n", "null\n", "5\n", '{"step": 1}\n', '{"step": "1", "images": 2}\n', "[" * 10**5 + "\n", '{"step": 1, "images": 1e999}\n'):
        file.write_text(content)
        truncate_rows(file, 9)
        assert read_rows(file) == []


def test_a_damaged_line_is_named_where_it_cannot_be_left_out(tmp_path):
    file = metrics(tmp_path / "metrics.jsonl")
    file.write_text(file.read_text().replace('"step": 2', '"step: 2', 1))
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged"):
        read_rows(file)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"not an ordinary file"):
        read_rows(tmp_path / "pipe.jsonl")


def test_stages_say_what_to_do_about_a_finished_run_without_checkpoints(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "codec")
    shutil.rmtree(tmp_path / "codec" / "checkpoints" / "step-00000007")
    monkeypatch.setattr(stages, "get_spec", lambda method: SimpleNamespace(stages=[SimpleNamespace(key="codec", method="jit")]))
    with pytest.raises(UserError, match=r"model.codec=.*The run is finished.*restore them from a copy"):
        stages.earlier_runs(SimpleNamespace(method="toy"), SimpleNamespace(codec=str(tmp_path / "codec")))


# -- records ---------------------------------------------------------------------------------------------------------------------


def rows_in(folder: Path, *rows: dict) -> Path:
    """Records in run folders of their own, without the check that every writer makes."""
    for number, row in enumerate(rows):
        row["protocol_hash"] = protocol_hash(row["protocol"])
        row["row_id"] = row_id(row)
        (folder / f"{number}-{row['name']}").mkdir(parents=True)
        (folder / f"{number}-{row['name']}" / "result.json").write_text(json.dumps(row))
    return folder


def numbers_of(value, path=()):
    """The paths of all numbers in a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, int | float) and not isinstance(item, bool):
            yield (*path, key)
        yield from numbers_of(item, (*path, key))


def changed(value, path, new):
    """A copy with one leaf replaced."""
    result = json.loads(json.dumps(value))
    target = result
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = new
    return result


def unbounded(schema, path=()):
    """The places in a JSON schema that allow numbers of any size."""
    items = schema.items() if isinstance(schema, dict) else enumerate(schema) if isinstance(schema, list) else ()
    kinds = schema.get("type", ()) if isinstance(schema, dict) else ()
    numeric = {"integer", "number"} & {*([kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else ())}
    if numeric and not ({"minimum", "exclusiveMinimum"} & set(schema) and "maximum" in schema):
        yield path
    for key, item in items:
        yield from unbounded(item, (*path, key))


def test_every_number_in_a_record_is_bounded():
    """One without bounds could be 10**400, which no table can print."""
    assert list(unbounded(json.loads(SCHEMA_FILE.read_text()))) == []


@pytest.mark.parametrize("number", [10**310, 10**400, -(10**400), 10**31, 1e308, -1e308, 5e-324, 2**63, 0, -1], ids=lambda number: str(number)[:6])
def test_no_number_in_a_record_hides_the_others(tmp_path, capsys, number):
    good = record(name="sound")
    paths = list(numbers_of(good))
    assert len(paths) > 70
    rows_in(tmp_path, good, *(changed(good, path, number) | {"name": f"odd{i}"} for i, path in enumerate(paths)))
    assert leaderboard.main(["--runs", str(tmp_path)]) == 0
    assert "sound" in (tmp_path / "leaderboard.md").read_text() and "sound" in (tmp_path / "leaderboard.html").read_text()
    told = capsys.readouterr().err
    assert "Traceback" not in told
    if abs(number) > 1e30:
        assert told.count("left out: ") == len(paths) and told.count("result.json") >= len(paths)
    assert leaderboard.main(["--runs", str(tmp_path), "--matched", "train_macs"]) == 0
    assert "sound" in leaderboard.summary(leaderboard.read_records(tmp_path), good["protocol_hash"])


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "5", "{}", "NaN", "[" * 10**5, '{"a":' * 10**5, '"\\ud800"', '{"name": "\\ud800"}', "\x00", "1" * 5000, '{"schema": "result.v1"}'],
    ids=lambda text: text[:20],
)
def test_what_is_no_record_is_left_out_by_name(tmp_path, capsys, content):
    rows_in(tmp_path, record(name="sound"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text(content)
    assert leaderboard.main(["--runs", str(tmp_path)]) == 0
    assert "left out: " in (told := capsys.readouterr().err) and str(tmp_path / "other" / "result.json") in told
    assert "sound" in (tmp_path / "leaderboard.md").read_text()


def test_surrogates_in_a_record_are_left_out_by_name(tmp_path, capsys):
    rows_in(tmp_path, record(name="sound"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text(json.dumps(record()).replace('"notes": ""', '"notes": "\\ud800"'))
    assert leaderboard.main(["--runs", str(tmp_path)]) == 0
    assert str(tmp_path / "other") in capsys.readouterr().err


def test_pipes_and_huge_files_are_left_out_at_once(tmp_path, capsys):
    """A pipe would hang; the sparse files have 3 GB and would be read into memory."""
    rows_in(tmp_path, record(name="sound"), record(name="pipe"), record(name="huge", notes="x"))
    os.mkfifo(tmp_path / "1-pipe" / "curve.jsonl")
    for name in ("2-huge/curve.jsonl", "other/result.json", "claim/claim.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(3 * 2**30)
    for name in ("second/result.json", "third/claim.json"):
        (tmp_path / name).parent.mkdir()
        os.mkfifo(tmp_path / name)
    assert leaderboard.main(["--runs", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    for name in ("1-pipe/curve.jsonl", "2-huge/curve.jsonl", "other/result.json", "second/result.json", "claim/claim.json", "third/claim.json"):
        assert str(tmp_path / name) in told
    assert all(name in (tmp_path / "leaderboard.md").read_text() for name in ("sound", "pipe", "huge"))


def test_a_record_that_cannot_be_shown_is_named(tmp_path, capsys, monkeypatch):
    """Whatever a table raises at one row."""
    rows_in(tmp_path, record(name="sound"), record(name="odd"))
    read = columns.IDENTITY[0].read
    fragile = dataclasses.replace(columns.IDENTITY[0], read=lambda row: 1 // (row["name"] != "odd") and read(row))
    monkeypatch.setattr(columns, "IDENTITY", [fragile, *columns.IDENTITY[1:]])
    assert leaderboard.main(["--runs", str(tmp_path)]) == 0
    assert "sound" in leaderboard.summary(leaderboard.read_records(tmp_path), record()["protocol_hash"])
    assert f"{tmp_path}/1-odd: its record cannot be shown: ZeroDivisionError" in capsys.readouterr().err
    assert "sound" in (tmp_path / "leaderboard.md").read_text()


def test_damaged_pictures_and_logs_cost_no_record(tmp_path):
    """Whatever lies beside a record: its row stays, what cannot be read is named."""
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(tmp_path / "samples.png")
    row = {"artifacts": {"grid_png": "samples.png", "log": "metrics.jsonl"}}
    for where in flips(tmp_path / "samples.png", sample=300):
        with contextlib.suppress(UserError):
            assert grid_of(row, tmp_path)[0].startswith("data:image/webp"), where
    Image.new("1", (1, 30_000)).save(tmp_path / "samples.png")  # higher than WebP allows
    with pytest.raises(UserError, match=r"samples.png: cannot be read as a PNG"):
        grid_of(row, tmp_path)
    for line in ('{"images": 1, "loss": 1%s}' % ("0" * 400), '{"images": 1, "loss": 1e308}\n{"images": 2, "loss": 1e308}' * 300, '{"images": [], "loss": 1}'):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with contextlib.suppress(UserError):
            losses_of(row, tmp_path)


# -- curves ----------------------------------------------------------------------------------------------------------------------


def points(count: int = 2) -> list[dict]:
    metrics = {"fd_embedded": {"value": 812.25, "se": 10.5, "n": 1000, "unit": "feature^2"}}
    return [{"images": 640 * n, "macs_train": 10**12 * n, "protocol_hash": "7d8e681bae88", "metrics": metrics} for n in range(1, count + 1)]


def test_every_flipped_bit_of_a_curve_is_found(tmp_path):
    file = tmp_path / "curve.jsonl"
    file.write_text(curve_lines(points(1)))
    assert read_curve(file) == points(1)
    for where in flips(file):
        try:
            assert read_curve(file) == points(1), where
        except UserError as error:
            assert str(file) in str(error)


def test_curves_without_digests_are_still_read(tmp_path):
    file = tmp_path / "curve.jsonl"
    file.write_text("".join(json.dumps(point) + "\n" for point in points(3)))
    assert read_curve(file) == points(3)
    for number in (10**31, 10**310, -1, 1.5, True):
        file.write_text(json.dumps(points(1)[0] | {"macs_train": number}) + "\n")
        with pytest.raises(UserError, match="line 1: is not a point"):
            read_curve(file)
    file.write_text(curve_lines(points(2)).rstrip("\n"))
    with pytest.raises(UserError, match="does not end with a whole line"):
        read_curve(file)


# -- arrays and images of other people -------------------------------------------------------------------------------------------

PIXELS = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (4, 2, 2, 3)).astype(np.uint8)


def npz(path: Path, compressed: bool = False, **arrays) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def npy(shape: str, dtype: str = "|u1", version: bytes = b"\x01\x00", length: int | None = None, data: bytes = b"") -> bytes:
    """A NumPy array as a file, with any header."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    width = 2 if version[0] == 1 else 4
    return b"\x93NUMPY" + version + (len(header) if length is None else length).to_bytes(width, "little") + header + data


def archived(path: Path, name: str, content: bytes, **how) -> Path:
    with zipfile.ZipFile(path, "w", **how) as archive:
        archive.writestr(name, content)
    return path


def patched(path: Path, offset: int, value: bytes) -> Path:
    """A field of the first local header and of its copy in the central directory, which lies 2 bytes further."""
    content = bytearray(npz(path, arr_0=PIXELS).read_bytes())
    central = content.index(b"PK\x01\x02")
    content[offset : offset + len(value)] = value
    content[central + offset + 2 : central + offset + 2 + len(value)] = value
    path.write_bytes(content)
    return path


HOSTILE = {
    "encrypted": (lambda path: patched(path, 6, b"\x01\x00"), "encrypted"),
    "method 99": (lambda path: patched(path, 8, b"\x63\x00"), "compression method"),
    "negative shape": (lambda path: archived(path, "arr_0.npy", npy("(-4, 2, 2, 3)", data=bytes(48))), "which no array has"),
    "boolean shape": (lambda path: archived(path, "arr_0.npy", npy("(True, 2, 2, 3)", data=bytes(12))), "which no array has|cannot be read"),
    "broken header": (lambda path: archived(path, "arr_0.npy", npy("(4, 2, 2")), "cannot be read as .npz"),
    "nested header": (lambda path: archived(path, "arr_0.npy", npy("(" * 3000)), "cannot be read as .npz"),
    "header of 4 GB": (lambda path: archived(path, "arr_0.npy", npy("(1,)", version=b"\x02\x00", length=2**32 - 1)), "not a NumPy array"),
    "no array": (lambda path: archived(path, "arr_0.npy", b"text"), "not a NumPy array"),
    "no type": (lambda path: archived(path, "arr_0.npy", npy("(4, 2, 2, 3)", dtype="zz")), "cannot be read as .npz"),
    "huge": (lambda path: archived(path, "arr_0.npy", npy("(1000000000, 256, 256, 3)", data=bytes(1000))), "ends early: 196,607,999,999,000 bytes are missing"),
    "wide": (lambda path: archived(path, "arr_0.npy", npy("(1, 10000, 10000, 3)", data=bytes(3 * 10**8)), compression=8), "at most .* 8,192 px"),
    "too short a shape": (lambda path: archived(path, "arr_0.npy", npy("(3, 2, 2, 3)", data=bytes(48))), "12 bytes more than its shape"),
    "outside": (lambda path: archived(path, "../arr_0.npy", npy("(4, 2, 2, 3)", data=bytes(48))), "no array 'arr_0'"),
    "not zip": (lambda path: path.write_bytes(b"PK\x03\x04 cut short") and path, "cannot be read as .npz"),
    "pipe": (lambda path: os.mkfifo(path) or path, "not an ordinary file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_in_a_sentence(tmp_path, name):
    make, message = HOSTILE[name]
    with pytest.raises(UserError, match=rf"(?s)samples.npz.*({message})"):
        NpzImages(make(tmp_path / "samples.npz"))


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ("pipe", "wide")])
def test_show_says_what_is_wrong_with_any_archive(tmp_path, name):
    path = HOSTILE[name][0](tmp_path / "samples.npz")
    try:
        told = reference.show(path)
    except UserError as error:
        told = str(error)
    assert str(path) in told


def test_show_names_members_that_are_no_arrays(tmp_path):
    path = npz(tmp_path / "a.npz", arr_0=PIXELS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../evil", b"x")
        archive.writestr("../\x1b[2Jevil.npy", npy("(1,)", data=b"x"))
    told = reference.show(path)
    assert "../evil: not an array" in told and r"../\x1b[2Jevil" in told and "\x1b" not in told and "looks like samples" in told


@pytest.mark.parametrize("compressed", [False, True])
def test_flipped_bits_of_samples_are_found_or_change_nothing(tmp_path, compressed):
    file, found = npz(tmp_path / "samples.npz", compressed, arr_0=PIXELS), 0
    for where in flips(file, sample=400):
        try:
            images = torch.cat([images for images, _ in NpzImages(file).batches(3)])
        except UserError as error:
            assert str(file) in str(error)
            found += 1
            continue
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), PIXELS), where
    assert found > 150


@pytest.mark.parametrize("compressed", [False, True])
def test_flipped_bits_of_statistics_are_found_or_change_nothing(tmp_path, compressed):
    mean = np.arange(3.0)
    file = npz(tmp_path / "stats.npz", compressed, mu=mean)
    for where in flips(file, sample=400):
        with contextlib.suppress(UserError):
            assert np.array_equal(read_floats(file, "mu", (3,)), mean), where


def test_a_damaged_archive_costs_no_features(tmp_path, monkeypatch):
    """The size of an .npz is checked before anything is extracted from the data that it is compared with."""
    monkeypatch.setattr(feature_sets, "collect", lambda *a, **k: pytest.fail("features were extracted"))
    path = HOSTILE["huge"][0](tmp_path / "samples.npz")
    with pytest.raises(UserError, match="ends early"):
        run.work([f"npz={path}", f"out={tmp_path}", "device=cpu"])


def test_samples_open_only_ordinary_files_of_known_formats(tmp_path, monkeypatch):
    """An EPS file would start Ghostscript, a pipe would hang, /dev/zero would fill the memory."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    makers = {
        "eps": lambda file: file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "pipe": os.mkfifo,
        "zero": lambda file: file.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
        "wide": lambda file: Image.new("1", (20_000, 20_000)).save(file),
    }
    for name, make in makers.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / "0.png")
        with pytest.raises(UserError, match=r"0\.png"):
            FolderSamples(tmp_path / name)
    assert not (tmp_path / "started").exists()


# -- references and caches -------------------------------------------------------------------------------------------------------


def features(n: int = 4) -> FeatureSet:
    moments = Moments.zeros(2, 2)
    moments.add(torch.arange(2.0 * n).view(n, 2).cos(), torch.arange(n))
    return FeatureSet(moments, torch.arange(2.0 * n).view(n, 2).cos(), torch.arange(n) % 2)


def test_flipped_bits_of_the_feature_cache_are_found_or_change_nothing(tmp_path):
    """Among them renamed, reshaped and retyped tensors, whose bytes are all right."""
    file, good = tmp_path / "cache.safetensors", features()
    feature_sets._write(good, file)
    assert feature_sets._read(file, 4) is not None and feature_sets._read(file, 5) is None
    found = 0
    for where in flips(file):
        read = feature_sets._read(file, 4)
        if read is None:
            found += 1
            continue
        assert all(torch.equal(value, good.tensors()[name]) for name, value in read.tensors().items()), where
    assert found > 6 * file.stat().st_size


def test_flipped_bits_of_a_built_reference_are_found_or_change_nothing(tmp_path):
    file, extractor = tmp_path / "own.safetensors", SimpleNamespace(id="x", sha256="0" * 64, layer="p", resize="n", scaling="s", dims=2)
    pooled = features().moments.total()
    entry = {"id": "own", "digest": "d", "split": "train", "crop": "c", "n_images": 4, "pillow": "12"}
    write_built(Reference(pooled, None, features().features, entry), file, extractor, 8)
    for where in flips(file):
        with contextlib.suppress(UserError):
            read = read_built(file, extractor, 8)
            assert read.entry == entry and torch.equal(read.pooled.cov, pooled.cov) and torch.equal(read.features, features().features), where
            assert read.pooled.n == 4 and read.spatial is None, where


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_flipped_bits_of_released_weights_never_crash(tmp_path, name):
    """Formats without digests cannot tell every flip; each is read as tensors or refused in a sentence."""
    file, weights = tmp_path / name, {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    (save_file if name.endswith("safetensors") else torch.save)(weights, file)
    for where in flips(file, sample=400):
        with contextlib.suppress(UserError):
            assert all(isinstance(value, torch.Tensor) for value in read_tensors(file).values()), where


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 64, b"\x08" + bytes(7) + b"[1, 2]  ", b"\x02" + bytes(7) + b"{}"])
@pytest.mark.parametrize("method", ["jit", "pmf", "rae", "sit", "dit"])
def test_import_refuses_a_bad_file_in_a_sentence(tmp_path, capsys, method, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    assert prepare.main(["import", f"method={method}", f"file={tmp_path}/w.safetensors", f"out={tmp_path}/runs"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "w.safetensors" in told and not (tmp_path / "runs").exists()


# -- who may read what is written ------------------------------------------------------------------------------------------------

WRITER = """
import os, sys
from pathlib import Path
os.umask(int(sys.argv[1], 8))
import numpy as np, torch
from PIL import Image
from evaluated_run import image_folder, run_folder
from test_damage import SimpleNamespace, Reference, features, feature_sets, write_built
from common.files import append_row, hold_to, write_whole
from common.pictures import save_png
from launch.export import export_run
place = Path(sys.argv[2])
run_folder(place / "mine", image_folder(place / "data"))
export_run(place / "mine", place / "given" / "away", None, "MIT")
feature_sets._write(features(), place / "cache" / "x.safetensors")
extractor = SimpleNamespace(id="x", sha256="0" * 64, layer="p", resize="n", scaling="s", dims=2)
write_built(Reference(features().moments.total(), None, features().features, {"n_images": 4}), place / "own.safetensors", extractor, 8)
hold_to(place / "held" / "facts.json", {"a": 1}, "something")
write_whole(place / "text.md", "text")
append_row(place / "rows.jsonl", {"a": 1})
save_png(Image.new("RGB", (8, 8)), place / "picture.png")
"""


def test_modes_follow_the_umask(tmp_path):
    """safetensors alone would write files that no colleague can read."""
    place = tmp_path / "place"
    place.mkdir(mode=0o700)
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here.parent, here)))}
    subprocess.run([sys.executable, "-c", WRITER, "027", str(place)], check=True, env=environment, cwd=tmp_path)
    written = [path for path in place.rglob("*") if "data" not in path.relative_to(place).parts]
    modes = {str(path.relative_to(place)): (path.stat().st_mode & 0o777, 0o750 if path.is_dir() else 0o640) for path in written}
    assert {name: oct(found) for name, (found, wanted) in modes.items() if found != wanted} == {}
    assert sum(path.suffix == ".safetensors" for path in written) == 5
