"""Damaged and altered checkpoints, run folders, logs and imports: each is passed over by name or refused in a sentence,
and none is used silently.
"""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from damage import flips
from evaluated_run import image_folder, run_folder
from safetensors.torch import save_file

from pixlat.common.config.identity import inert
from pixlat.common.config.resolve import resolve
from pixlat.common.config.saved import check_config, read_config
from pixlat.common.config.schema import flatten, to_dict
from pixlat.common.errors import UserError
from pixlat.common.training.meters import read_rows, truncate_rows
from pixlat.common.training.state import state_without_external
from pixlat.common.weights import checkpoint
from pixlat.common.weights.checkpoint import Checkpoint
from pixlat.common.weights.runs import run_weights
from pixlat.evaluation.records import parents
from pixlat.evaluation.records.imported import imported_facts
from pixlat.evaluation.score.models import load_run, saved_run
from pixlat.launch.export import export_run
from pixlat.launch.job import stages
from pixlat.launch.job.folder import check_same
from pixlat.launch.released import import_released, write_folder
from pixlat.methods import get_spec

CPU = torch.device("cpu")

# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    """Two checkpoints of one small tensor and an optimizer with two parts each,
    whose files' names differ in one bit.
    """
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


MANIFESTS = [
    "",
    "[]",
    "null",
    "5",
    '"x"',
    "{}",
    '{"f":{}}',
    '{"f":"x"}',
    "[" * 10**5,
    '{"model.safetensors":' * 10**4,
    "NaN",
    "\x00",
    "{" + "1" * 5000 + "}",
]


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
    checkpoint.save(
        tmp_path / "run" / "checkpoints", 8, Checkpoint(checkpoint.load(folder).tensors | others, facts), keep=1
    )
    opened: list[str] = []
    for name in ("load_file", "safe_open", "sha256_of"):
        whole = getattr(checkpoint, name)
        monkeypatch.setattr(
            checkpoint,
            name,
            lambda path, *a, whole=whole, **k: (opened.append(Path(path).name), whole(path, *a, **k))[1],
        )
    assert run.eval.ema is None and torch.equal(
        run_weights(tmp_path / "run").state["network.final.linear.bias"], 0.5 * model["network.final.linear.bias"]
    )
    assert set(opened) == {"manifest.json", "trainer.json", "model.safetensors", "ema-0.9.safetensors"}
    opened.clear()
    run_weights(tmp_path / "run", "raw")
    assert set(opened) == {"manifest.json", "trainer.json", "model.safetensors"}
    largest = tmp_path / "run" / "checkpoints" / "step-00000008" / "optimizer-loss-0.safetensors"
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(UserError, match="no intact checkpoint"):  # what is not read must still be there in full
        run_weights(tmp_path / "run")


# -- run folders -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run folder with its record."""
    place = tmp_path_factory.mktemp("finished")
    run_folder(place / "mine", image_folder(place / "data"))
    return place / "mine"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("width: 16", "width: 32"),
        ("guidance: 1.5", "guidance: 2.0"),
        ("seed: 0", "seed: 1"),
        ("prediction: x", "prediction: v"),
    ],
)
def test_an_altered_configuration_is_not_used(finished, old, new):
    file = finished / "config.yaml"
    text = file.read_text()
    assert text.count(old) >= 1
    file.write_text(text.replace(old, new, 1))
    try:
        for use in (
            lambda: load_run(finished, {}, None, CPU),
            lambda: run_weights(finished),
            lambda: saved_run(finished, {}),
        ):
            with pytest.raises(
                UserError,
                match=(
                    r"config.yaml is not the configuration of .*step-00000007.*Restore the file.*give "
                    r"them on the command line"
                ),
            ):
                use()
    finally:
        file.write_text(text)


@pytest.mark.parametrize(
    "program",
    [["launch/run.py"], ["/usr/bin/pixlat", "train"], ["/usr/bin/pixlat"]],
    ids=["script", "command", "old command"],
)
def test_what_was_changed_is_named(finished, tmp_path, program):
    """By the command that starts.jsonl keeps, or by the preset where one key differs from it."""
    run = saved_run(finished, {})
    shutil.copytree(finished, tmp_path / "mine")
    file = tmp_path / "mine" / "config.yaml"
    file.write_text(file.read_text().replace("weight_decay: 0.0", "weight_decay: 0.5"))
    with pytest.raises(UserError, match=r"Changed since: train.weight_decay: 0.0 -> 0.5\."):
        saved_run(tmp_path / "mine", {})
    file.write_text(file.read_text().replace("guidance: 1.5", "guidance: 2.0"))
    with pytest.raises(UserError, match=r"The changed setting could not be found\."):
        saved_run(tmp_path / "mine", {})
    settings = [
        f"{key}={value if key in ('method', 'preset') else json.dumps(value)}"
        for key, value in flatten(to_dict(run))
        if "cluster" not in key
    ]
    damaged = '{"command": 5}\n{"command": "x \\\\"}\n[]\n{"command": "x y"}\n'
    (tmp_path / "mine" / "starts.jsonl").write_text(
        damaged + json.dumps({"command": shlex.join([*program, *settings])}) + "\n"
    )
    with pytest.raises(
        UserError, match=r"Changed since: train.weight_decay: 0.0 -> 0.5; sample.guidance: 1.5 -> 2.0\."
    ):
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
        for use in (
            lambda: load_run(finished, {}, None, CPU),
            lambda: run_weights(finished),
            lambda: check_same(finished, run),
        ):
            with pytest.raises(UserError, match=r"config.yaml is damaged: .*Restore the file"):
                use()
    finally:
        file.write_text(text)


def test_flipped_bits_of_a_configuration_are_found_or_change_nothing(finished):
    """What a flip leaves readable and of the same identity has the same settings,
    but for those that change neither a weight nor a score.
    """
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
    for name, advice in (
        ("mine", "restore them from a copy, or remove the folder and run it again"),
        ("cut", "Finish that run"),
    ):
        folder = tmp_path / name
        run = run_folder(folder, finished.parent / "data", record=name == "mine")
        weights = folder / "checkpoints" / "step-00000007" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        with pytest.raises(UserError, match=advice):
            load_run(folder, {}, None, CPU)
        assert run.method == "jit"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.ema_decay", "["),
        ("train.lr", "${nope}"),
        ("name", "a: b: c"),
        ("name", "\x00"),
        ("name", "${"),
        ("train.lr", "!!python/name:os.x x"),
    ],
)
def test_values_that_are_no_yaml_are_named(key, value):
    with pytest.raises(UserError, match=rf"{key}.*(cannot be read|does not fit)"):
        resolve(get_spec("jit"), {"preset": "demo", "seed": "1", key: value})


@pytest.mark.parametrize("content", ["", "[]", "5", "null", "{", "[" * 10**5])
def test_damaged_digests_of_earlier_stages_are_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "stages.json").write_text(content)
    with pytest.raises(UserError, match=r"stages.json is damaged"):
        stages.record_or_check_stages(tmp_path, [{"key": "codec", "checkpoint_sha256": "ab"}])


# -- imported and exported weights -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(finished) -> Path:
    """A run folder as `pixlat import` makes it."""
    model = load_run(finished, {}, None, CPU)
    facts = {
        "file": "/x/w.pth",
        "sha256": "ab" * 32,
        "ema_decay": 0.9999,
        "weights": "ema",
        "licence": "MIT",
        "tensors": 3,
    }
    run = dataclasses.replace(model.run, train=dataclasses.replace(model.run.train, ema_decay=[]))
    write_folder(finished.parent / "imported", run, state_without_external(model.method), facts)
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
    checkpoint.save(
        folder, 0, Checkpoint(weights.tensors, {"identity": "imported", "step": 0, "images_seen": 0}), keep=1
    )
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
    for damaged in (
        b"",
        b"junk",
        content[:-4],
        content[:200],
        b"\xff" * 100,
        content.replace(b"ema_decay", b"ema_delay"),
        content.replace(b'"0.9"', b'"x.9"'),
    ):
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
        f"**This run is not finished**: these weights are of step 7, after {7 * run.train.batch:,} "
        f"of {run.train.images:,} training images."
    ) in card and "Not evaluated." in card
    export_run(finished, tmp_path / "whole", None, "MIT")
    assert "not finished" not in (tmp_path / "whole" / "README.md").read_text()


# -- logs --------------------------------------------------------------------------------------------------------------


def metrics(path: Path) -> Path:
    rows = [
        {"step": s, "images": 64 * s, "loss": 0.5 / s, "lr": 1e-3, "images_per_s": 10.25, "seconds": float(s)}
        for s in range(1, 5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_damaged_log_loses_its_damaged_lines_and_no_more(tmp_path, caplog):
    from pixlat.common.pictures.curves import training_curves

    file = metrics(tmp_path / "metrics.jsonl")
    whole, last = read_rows(file), file.stat().st_size - 1
    for number, where in enumerate(flips(file, sample=200)):
        caplog.clear()
        truncate_rows(file, 10**15)
        rows = read_rows(file)
        assert sum(row in whole for row in rows) >= 2, where  # a lost line end costs two lines
        named = "damaged lines are left out" in caplog.text
        # without its line end the last line counts as cut by a kill
        assert named or len(rows) == 4 or where.endswith(f"byte {last}"), where
        if number % 40 == 0:
            training_curves(rows, tmp_path / "training.png")
    for content in (
        "[]\n",
        "null\n",
        "5\n",
        '{"step": 1}\n',
        '{"step": "1", "images": 2}\n',
        "[" * 10**5 + "\n",
        '{"step": 1, "images": 1e999}\n',
    ):
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
    monkeypatch.setattr(
        parents,
        "get_spec",
        lambda method: SimpleNamespace(stages=[SimpleNamespace(key="codec", method="jit", shipped={})]),
    )
    with pytest.raises(UserError, match=r"model.codec=.*The run is finished.*restore them from a copy"):
        parents.earlier_runs(SimpleNamespace(method="toy"), SimpleNamespace(codec=str(tmp_path / "codec")))


# -- who may read what is written --------------------------------------------------------------------------------------

WRITER = """
import os, sys
from pathlib import Path
os.umask(int(sys.argv[1], 8))
import numpy as np, torch
from PIL import Image
from evaluated_run import image_folder, run_folder
from test_damaged_files import SimpleNamespace, Reference, features, feature_sets, write_built
from pixlat.common.files import append_row, write_or_compare, write_whole
from pixlat.common.pictures.grids import save_png
from pixlat.launch.export import export_run
place = Path(sys.argv[2])
run_folder(place / "mine", image_folder(place / "data"))
export_run(place / "mine", place / "given" / "away", None, "MIT")
feature_sets._write(features(), place / "cache" / "x.safetensors")
extractor = SimpleNamespace(id="x", sha256="0" * 64, layer="p", resize="n", scaling="s", dims=2)
reference = Reference(features().moments.total(), None, features().features, {"n_images": 4})
write_built(reference, place / "own.safetensors", extractor, 8)
write_or_compare(place / "held" / "facts.json", {"a": 1}, "something")
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
    modes = {
        str(path.relative_to(place)): (path.stat().st_mode & 0o777, 0o750 if path.is_dir() else 0o640)
        for path in written
    }
    assert {name: oct(found) for name, (found, wanted) in modes.items() if found != wanted} == {}
    assert sum(path.suffix == ".safetensors" for path in written) == 5
