"""Protocol identity and the row schema."""

import copy
import csv
import io
import json
import math
import re

import pytest
import torch
from records import fields, judged_fields, judges_protocol, metric, parent_stage, protocol, record

from pixlat.common import origin
from pixlat.evaluation.protocols.identity import canonical_json, protocol_hash, protocol_name
from pixlat.evaluation.records.record import (
    RecordError,
    build_record,
    from_csv,
    read_record,
    row_id,
    to_csv,
    validate,
    write_record,
)


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


# -- protocol ----------------------------------------------------------------------------------------------------------


def test_protocol_hash_is_golden():
    """If this moves, so does the hash of every row: raise EVALUATOR_VERSION with it."""
    assert protocol_hash(protocol()) == "0fdb92f63b67"
    assert protocol_name(protocol()) == "embedded-v1/toy-train/n=1000/balanced#0fdb92f63b67"


def test_any_changed_field_changes_the_hash():
    hashes = {protocol_hash(protocol())}
    paths = list(leaves(protocol()))
    for path, value in paths:
        new = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else f"{value}x"
        found = protocol_hash(changed(protocol(), path, new))
        assert (found == protocol_hash(protocol())) == (path == ("reference", "id")), path  # a name moves nothing
        hashes.add(found)
    assert len(paths) > 30
    assert len(hashes) == len(paths)


def test_records_of_the_first_evaluator_keep_their_hashes():
    """Version 1 hashed names, and no sampling precision: its records stay valid, in sections of their own."""
    old = protocol()
    del old["samples"]["precision"]
    old["evaluator_version"] = 1
    assert protocol_hash(old) == "0b7659ef853b"
    assert build_record({**fields(), "protocol": old})["protocol_hash"] == "0b7659ef853b"
    assert protocol_hash(changed(old, ("reference", "id"), "other")) != "0b7659ef853b"


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


# -- record ------------------------------------------------------------------------------------------------------------


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
    paper = {
        "kind": "published",
        "protocol": None,
        "protocol_hash": "published:jit",
        "notes": "",
        "name": "JiT-B/16",
        "metrics": {"fid": metric(3.66)},
    }
    common = {key: fields()[key] for key in ("system", "data")}
    source = {"title": "JiT", "url": None, "table": "6", "status": "read", "unverified_fields": []}
    build_record({**paper, **common, "source": source})
    with pytest.raises(RecordError, match="source"):
        build_record({**paper, **common})
    with pytest.raises(RecordError, match="protocol_hash"):
        build_record({**paper, **common, "source": source, "protocol_hash": "abc"})
    with pytest.raises(RecordError):
        record(source=source)


def test_a_record_of_several_judges():
    row = build_record({**fields(), **judged_fields()})
    validate(json.loads(json.dumps(row)))
    assert from_csv(to_csv([row])) == [row]
    freely_named = {("code", "package_versions"), ("config", "settings")}
    objects = {path[:depth] for path, _ in leaves(row) for depth in range(len(path))} - freely_named
    for path in objects:
        with pytest.raises(RecordError, match="surprise"):
            validate(changed(row, (*path, "surprise"), 1))
    for part in ("contact", "judges"):
        with pytest.raises(RecordError, match="surprise"):
            build_record({**fields(), **judged_fields(**{part: [{**row[part][0], "surprise": 1}]})})


def test_a_protocol_has_one_extractor_or_the_judges_of_evaluator_three():
    several, single = judges_protocol(), protocol()
    assert protocol_hash(several) != protocol_hash(single)
    for wrong in (
        {**several, "extractor": single["extractor"]},
        {key: value for key, value in several.items() if key != "judges"},
        {**several, "judges": []},
        {**several, "evaluator_version": 2},
        {**several, "judges": [{**several["judges"][0], "surprise": 1}]},
        {**several, "judges": [{key: value for key, value in several["judges"][0].items() if key != "ranks"}]},
        {**single, "extractor": several["judges"][0]},
    ):
        with pytest.raises(RecordError, match="protocol"):
            record(protocol=wrong)


def test_a_parent_keeps_its_own_parents():
    def parent(name, *parents):
        entry = {**parent_stage("decoder", name, "rae_decoder"), "macs_total": 7, "config": "0123456789ab"}
        return {**entry, "pretrained_components": [], "parents": list(parents)}

    assert record(parents=[parent("a", parent("b", parent("c")))])
    with pytest.raises(RecordError, match="surprise"):
        record(parents=[parent("a", {**parent("b"), "surprise": 1})])


def test_csv_round_trip():
    awkward = [
        "",
        " ",
        "null",
        "123",
        "1e5",
        "NaN",
        "true",
        '"quoted"',
        "a,b",
        "two\nlines",
        "tab\t",
        "\r",
        "ä 漢 🎈",
        "=1+1",
        "@x",
        "-",
        "[1]",
    ]
    awkward += ["a.b\\c", "\u2028"]
    rows = [record(name=text, notes=text) for text in awkward] + [record(protocol=None, metrics={}, artifacts={})]
    assert from_csv(to_csv(rows)) == rows
    assert [type(value) for _, value in leaves(from_csv(to_csv(rows)))] == [type(value) for _, value in leaves(rows)]
    header = next(csv.reader(io.StringIO(to_csv(rows))))
    assert {
        "system.method",
        "metrics.fd_embedded.value",
        "protocol.samples.n",
        "code.package_versions.ruamel\\.yaml",
    } <= set(header)


def test_csv_holds_no_spreadsheet_formula():
    text = to_csv(
        [
            record(
                name='=HYPERLINK("http://x")',
                notes="+1",
                code={"git_sha": "@sum", "dirty": False, "package_versions": {"=a": "-b"}},
            )
        ]
    )
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@") or cell.startswith("-b")]


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build  (dvs-builder@U16)",
    ],
)
def test_what_a_gpu_computes_with_is_kept_beside_the_packages(monkeypatch, tmp_path, line):
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    monkeypatch.setattr(origin, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90100)
    versions = origin.package_versions()
    assert {"cuda": "12.4", "cudnn": "90100", "nvidia-driver": "550.54.14"}.items() <= versions.items()
    assert versions.keys() >= {
        "python",
        "torch",
        "numpy",
        "scipy",
        "transformers",
        "diffusers",
        "torch-fidelity",
        "clean-fid",
        "pillow",
    }


def test_a_re_evaluation_names_the_code_that_scored_and_old_records_stay_valid():
    code = {"git_sha": "5678", "dirty": False, "package_versions": {"torch": "2"}}
    scored = build_record({**fields(), "scored_by": code})
    assert scored["scored_by"] == code and "scored_by" not in record() and from_csv(to_csv([scored])) == [scored]
    with pytest.raises(RecordError, match="scored_by"):
        build_record({**fields(), "scored_by": {"git_sha": "5678"}})
