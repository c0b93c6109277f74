"""Protocol identity, the row schema, and the tables rendered from rows."""

import copy
import csv
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation import leaderboard
from evaluation.leaderboard import Records, escape, protocol_section, read_records, render
from evaluation.protocol import canonical_json, embedded_protocol, protocol_hash, protocol_name
from evaluation.record import RecordError, build_record, from_csv, read_record, row_id, to_csv, validate, write_record

ROOT = Path(__file__).resolve().parent.parent
EXTRACTOR = SimpleNamespace(id="embedded-v1", sha256="ab" * 32, layer="pooled", resize="128", scaling="(x-127)/128", dims=320)


def protocol(num_images=1000):
    return embedded_protocol(EXTRACTOR, "toy", "train-digest", "heldout-digest", 4599, 32, num_images)


def metric(value, **more):
    return {"value": value, "value_bc": None, "se": None, "n": 1000, "unit": "1", **more}


def fields(name="run", fd=100.0, guidance="none", num_images=1000, **changes):
    """All that a run hands over for its record."""
    return {
        "name": name,
        "created_utc": "2026-11-22T00:00:00+00:00",
        "system": {"method": "jit", "variant": None, "size": "demo", "space": "pixel", "prediction": "x", "loss_space": "v", "sampler": "heun"},
        "data": {"name": "toy", "revision": "d", "resolution": 32, "num_classes": 10, "train_images": 4599},
        "checkpoint": {"sha256": "cd" * 32, "step": 1000, "ema_decay": 0.999, "ema_kind": "0.999"},
        "code": {"git_sha": "1234567", "dirty": True, "package_versions": {"torch": "2.14.1", "ruamel.yaml": "0.18"}},
        "seeds": {"train": 3, "sample": [0]},
        "train": {
            "epochs": 1.5, "images_seen": 6900, "batch": 64, "precision": "float32", "optimizer": "AdamW", "macs_total": 2 * 10**18,
            "device_seconds": 12.25, "device": "cpu", "images_per_s": 563.2,
        },
        "pretrained_components": [{"name": "teacher", "role": "loss", "params": 5, "sha256": None, "used_at": "train"}],
        "sampling": {"steps": 50, "nfe_evals": 99, "net_forwards": 187, "guidance": guidance, "guidance_scale": 2.9, "interval": [0.1, 1.0], "dtype": "f32"},
        "params": {"gen_trainable": 1_900_000, "gen_total": 1_950_000, "decoder": 0, "aux_train_only": 0},
        "compute": {"macs_per_forward": 10**9, "macs_decoder": 0, "macs_per_image": 187 * 10**9, "attention_counted": True, "counter": "meta"},
        "speed": {"images_per_s": 20.5, "latency_s_b1": None, "batch": 50, "dtype": "float32", "device": "cpu", "compiled": False},
        "memory": {"peak_bytes_sample": 1, "peak_bytes_train": 2, "kind": "ru_maxrss"},
        "protocol": protocol(num_images),
        "selection": {"n_configs": 1, "n_samples": 0, "swept": []},
        "metrics": {
            "fd_embedded": metric(fd, value_bc=fd - 40, se=2.5, regularised=False),
            "fd_floor": metric(200.0, value_bc=100.0, se=5.0, n=500, regularised=False),
            "kid": metric(0.012), "is": metric(14.25), "precision": metric(0.5), "recall": metric(0.25), "density": metric(0.75),
            "coverage": metric(0.125), "class_accuracy": metric(0.625), "class_accuracy_real": metric(0.738),
        },
        "artifacts": {"grid_png": "samples.png", "log": None},
        "notes": "",
        **changes,
    }  # fmt: skip


def record(*args, **kwargs):
    return build_record(fields(*args, **kwargs))


def leaves(value, path=()):
    """(path, value) of every leaf."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def changed(value, path, new):
    """A deep copy with one leaf replaced."""
    result = copy.deepcopy(value)
    target = result
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = new
    return result


# -- protocol -------------------------------------------------------------------------------------------------------------------


def test_protocol_hash_is_golden():
    """If this moves, so does the hash of every row: raise EVALUATOR_VERSION with it."""
    assert protocol_hash(protocol()) == "0b7659ef853b"
    assert protocol_name(protocol()) == "embedded-v1/toy-train/n=1000/balanced#0b7659ef853b"


def test_any_changed_field_changes_the_hash():
    hashes = {protocol_hash(protocol())}
    paths = list(leaves(protocol()))
    for path, value in paths:
        new = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else f"{value}x"
        hashes.add(protocol_hash(changed(protocol(), path, new)))
    assert len(paths) > 30
    assert len(hashes) == len(paths) + 1


def test_key_order_and_number_format_do_not_change_the_hash():
    backwards = json.loads(json.dumps(protocol()), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert list(backwards) != list(protocol())
    assert protocol_hash(backwards) == protocol_hash(protocol())
    assert protocol_hash(changed(protocol(), ("resolution",), 32.0)) == protocol_hash(protocol())
    assert canonical_json({"b": [1.0, 0.5, True, None], "a": "é"}) == '{"a":"é","b":[1,0.5,true,null]}'


def test_large_sets_say_how_kid_subsets_are_drawn():
    assert protocol(1000)["estimator"]["kid"]["estimator"] == "complete"
    assert protocol(50_000)["estimator"]["kid"]["subsets"] == 100
    assert protocol(50_000)["estimator"]["prdc"]["n_gen"] == 10_000


# -- record ---------------------------------------------------------------------------------------------------------------------


def test_record_round_trip(tmp_path):
    row = record()
    assert row["schema"] == "result.v1" and row["kind"] == "measured"
    assert row["protocol_hash"] == protocol_hash(row["protocol"])
    path = tmp_path / "result.json"
    write_record(row, path)
    assert read_record(path) == row
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
    assert row_id(row) == row["row_id"]
    assert row_id(dict(reversed(row.items()))) == row["row_id"]


def test_a_run_without_evaluation_has_a_record():
    row = record(protocol=None, metrics={})
    assert row["protocol_hash"] is None


def test_unknown_fields_are_refused_everywhere():
    """Wherever there is an object, one more field is one too many; only package_versions names things freely."""
    row = record()
    objects = {path[:depth] for path, _ in leaves(row) for depth in range(len(path))} - {("code", "package_versions")}
    assert len(objects) > 25
    for path in objects:
        with pytest.raises(RecordError, match="surprise"):
            validate(changed(row, (*path, "surprise"), 1))
    with pytest.raises(RecordError, match="surprise"):
        record(pretrained_components=[{**fields()["pretrained_components"][0], "surprise": 1}])


def test_wrong_types_and_missing_fields_are_refused():
    row = record()
    for path, value in leaves(row):
        with pytest.raises(RecordError):
            validate(changed(row, path, {"wrong": "type"}))
        if isinstance(value, str) and path[-1] not in ("notes",):
            with pytest.raises(RecordError):
                validate(changed(row, path, 5))
    for section in ("train", "sampling", "metrics", "protocol", "system"):
        with pytest.raises(RecordError, match=section):
            validate({key: value for key, value in row.items() if key != section})


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_json_has_not_are_refused(tmp_path, number):
    with pytest.raises(RecordError, match="NaN and infinity"):
        record(fd=number)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(record()).replace("100.0", str(number).replace("inf", "1e999").replace("nan", "NaN"), 1))
    with pytest.raises(RecordError, match=re.escape(str(path))):
        read_record(path)


def test_altered_records_are_refused():
    row = record()
    with pytest.raises(RecordError, match="row_id: does not fit"):
        validate(changed(row, ("metrics", "fd_embedded", "value"), 1.0))
    with pytest.raises(RecordError, match=r"protocol_hash: .* is not the hash"):
        validate(changed(row, ("protocol", "samples", "n"), 50_000))


def test_published_rows_need_a_source_and_a_hash_of_their_own():
    paper = {"kind": "published", "protocol": None, "protocol_hash": "published:jit", "notes": "", "name": "JiT-B/16", "metrics": {"fid": metric(3.66)}}
    common = {key: fields()[key] for key in ("system", "data")}
    source = {"title": "JiT", "url": None, "table": "6", "status": "read", "unverified_fields": []}
    build_record({**paper, **common, "source": source})
    with pytest.raises(RecordError, match="source"):
        build_record({**paper, **common})
    with pytest.raises(RecordError, match="protocol_hash"):
        build_record({**paper, **common, "source": source, "protocol_hash": "abc"})
    with pytest.raises(RecordError):
        record(source=source)


def test_csv_round_trip():
    awkward = ["", " ", "null", "123", "1e5", "NaN", "true", '"quoted"', "a,b", "two\nlines", "tab\t", "\r", "ä 漢 🎈", "=1+1", "@x", "-", "[1]"]
    awkward += ["a.b\\c", "\u2028"]
    rows = [record(name=text, notes=text) for text in awkward] + [record(protocol=None, metrics={}, artifacts={})]
    assert from_csv(to_csv(rows)) == rows
    assert [type(value) for _, value in leaves(from_csv(to_csv(rows)))] == [type(value) for _, value in leaves(rows)]
    header = next(csv.reader(io.StringIO(to_csv(rows))))
    assert {"system.method", "metrics.fd_embedded.value", "protocol.samples.n", "code.package_versions.ruamel\\.yaml"} <= set(header)


def test_csv_holds_no_spreadsheet_formula():
    text = to_csv([record(name='=HYPERLINK("http://x")', notes="+1", code={"git_sha": "@sum", "dirty": False, "package_versions": {"=a": "-b"}})])
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@") or cell.startswith("-b")]


# -- leaderboard ----------------------------------------------------------------------------------------------------------------


def table_rows(markdown):
    """Cells of the Markdown tables' bodies."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if not line.startswith(("| rank", "|:"))]


def test_rows_are_ranked_and_formatted():
    pages = render(Records([record("worse", 150.0), record("better", 50.0), record("unscored", metrics={})], []))
    rows = table_rows(pages["md"])
    assert [row[:2] for row in rows] == [["1", "better"], ["2", "worse"], ["-", "unscored"]]
    assert rows[0] == [
        "1", "better", "jit demo", "1.95", "99", "187", "2000", "20.5", "50.00 ± 2.50", "10.00", "0.012", "14.2", "0.500 / 0.250", "0.750 / 0.125",
        "0.625", "3", "2026-11-22",
    ]  # fmt: skip
    assert [row["name"] for row in json.loads(pages["json"])] == ["worse", "better", "unscored"]
    assert from_csv(pages["csv"]) == json.loads(pages["json"])


def test_the_floor_is_carried_to_the_number_of_images():
    page = render(Records([record()], []))["md"]
    assert "500 held-out real images in the place of generated ones reach 200.00 (bias-corrected 100.00 ± 5.00), which makes 150.00 for 1000 images" in page
    assert "Class accuracy of held-out real images: 0.738" in page
    assert leaderboard.EMBEDDED_NOTE in page
    bare = record(metrics={"fd_embedded": metric(1.0), "fd_floor": metric(2.0, value_bc=1.0)})
    assert "reach 2.00." in render(Records([bare], []))["md"]


def test_each_protocol_has_its_own_table():
    rows = [record("a", 50.0), record("b", 40.0, num_images=2000), record("c", 60.0)]
    page = render(Records(rows, []))["md"]
    assert page.count("\n## ") == 2
    assert sorted(tuple(row[:2]) for row in table_rows(page)) == [("1", "a"), ("1", "b"), ("2", "c")]
    with pytest.raises(ValueError, match="one table, one protocol"):
        protocol_section(rows)


def test_guided_rows_stand_apart():
    page = render(Records([record("plain"), record("guided", guidance="cfg")], []))["md"]
    unguided, guided = page.split("### Guided")
    assert [row[:2] for row in table_rows(unguided)] == [["1", "plain"]]
    assert [row[:2] for row in table_rows(guided)] == [["1", "guided"]]


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)</script>", "a|b", "![x](http://y)", "**bold**", "`code`", "a\nb\n# heading", "\\", "_em_", "&lt;", "$x$", "~~s~~"],
)
def test_strings_are_shown_and_never_interpreted(name):
    page = render(Records([record(name)], []))["md"]
    (row,) = table_rows(page)
    assert len(row) == 17
    assert row[1] == escape(name)
    assert "<" not in page
    shown = re.sub(r"\\(.)", r"\1", row[1]).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert shown == name.replace("\n", " ")
    unescaped = re.sub(r"\\.", "", row[1])
    assert not re.search(r"[`*\[\]|~$<>\\]", unescaped)


def test_names_stay_readable():
    assert escape("jit_rae-demo.v1 (x) #1") == "jit_rae-demo.v1 (x) #1"


def test_broken_records_are_named_and_the_rest_renders(tmp_path, capsys):
    good = record("good")
    broken = {
        "empty": "", "cut": json.dumps(good)[:100], "unknown": json.dumps({**good, "extra": 1}), "type": json.dumps({**good, "name": 5}),
        "altered": json.dumps({**good, "name": "other"}), "deep": "[" * 100_000, "list": "[]", "nan": '{"a": NaN}', "huge": '{"a": ' + "9" * 5000 + "}",
    }  # fmt: skip
    for name, text in {**broken, "good": json.dumps(good), "copy": json.dumps(good), ".hidden": "x"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "result.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder" / "result.json").mkdir(parents=True)
    records = read_records(tmp_path)
    assert [row["name"] for row in records.rows] == ["good"]
    assert leaderboard.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    page, said = (tmp_path / "out" / "leaderboard.md").read_text(), capsys.readouterr()
    for name in (*broken, "binary", "folder"):
        assert sum(str(tmp_path / name / "result.json") in reason for reason in records.left_out) == 1, name
        assert str(tmp_path / name / "result.json") in said.err
        assert escape(str(tmp_path / name)) in page
    assert len(records.left_out) == len(broken) + 2
    assert said.out.split() == [str(tmp_path / "out" / f"leaderboard.{suffix}") for suffix in ("md", "csv", "json")]


def test_the_script_runs_alone_and_imports_no_torch(tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    write_record(record("one"), tmp_path / "runs" / "one" / "result.json")
    command = [sys.executable, "-X", "importtime", str(ROOT / "evaluation" / "leaderboard.py"), "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "| one" in (tmp_path / "runs" / "leaderboard.md").read_text()
    assert (tmp_path / "runs" / "leaderboard.csv").exists() and (tmp_path / "runs" / "leaderboard.json").exists()
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "evaluation.record" in imported
    assert not imported & {"torch", "numpy", "timm"}


def test_a_missing_folder_is_an_error_without_a_traceback(tmp_path, capsys):
    assert leaderboard.main(["--runs", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_no_module_shadows_a_library():
    """`python evaluation/leaderboard.py` puts evaluation/ first on the path."""
    names = {path.stem for path in (ROOT / "evaluation").glob("*.py")}
    assert not names & set(sys.stdlib_module_names)
    assert not names & {"torch", "numpy", "tabulate", "jsonschema", "common", "methods", "launch", "tqdm", "timm", "safetensors", "PIL", "scipy"}


def test_ten_thousand_records_render_in_time():
    row = record()
    start = time.perf_counter()
    for _ in range(1000):  # a tenth of it here
        validate(row)
    page = render(Records([{**row, "name": f"run {i}"} for i in range(1000)], []))["md"]
    assert len(table_rows(page)) == 1000
    assert time.perf_counter() - start < 20  # about 2 s on an idle machine
