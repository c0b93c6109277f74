"""Damaged and hostile records, curves, arrays, images, references and weights:
each is left out by name or refused in a sentence; none crashes or hangs.
"""

import contextlib
import dataclasses
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from damage import flips
from PIL import Image
from records import record
from safetensors.torch import save_file

from pixlat.common.errors import UserError
from pixlat.common.weights.tensors import read_tensors
from pixlat.evaluation import leaderboard, reference, run
from pixlat.evaluation.board import columns
from pixlat.evaluation.board.attachments import grid_of, losses_of
from pixlat.evaluation.features import feature_sets
from pixlat.evaluation.features.arrays import NpzImages, read_floats
from pixlat.evaluation.features.feature_sets import FeatureSet
from pixlat.evaluation.features.moments import Moments
from pixlat.evaluation.features.reference_files import Reference, read_built, write_built
from pixlat.evaluation.features.samples import FolderSamples
from pixlat.evaluation.protocols.identity import protocol_hash
from pixlat.evaluation.records.curve import curve_lines, read_curve
from pixlat.evaluation.records.record import SCHEMA_FILE, row_id
from pixlat.launch import prepare

# -- records -----------------------------------------------------------------------------------------------------------


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
    numeric = {"integer", "number"} & {
        *([kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else ())
    }
    if numeric and not ({"minimum", "exclusiveMinimum"} & set(schema) and "maximum" in schema):
        yield path
    for key, item in items:
        yield from unbounded(item, (*path, key))


def test_every_number_in_a_record_is_bounded():
    """One without bounds could be 10**400, which no table can print."""
    assert list(unbounded(json.loads(SCHEMA_FILE.read_text()))) == []


@pytest.mark.parametrize(
    "number",
    [10**310, 10**400, -(10**400), 10**31, 1e308, -1e308, 5e-324, 2**63, 0, -1],
    ids=lambda number: str(number)[:6],
)
def test_no_number_in_a_record_hides_the_others(tmp_path, capsys, number):
    good = record(name="sound")
    paths = list(numbers_of(good))
    assert len(paths) > 70
    odd = [changed(good, path, number) | {"name": f"odd{i}"} for i, path in enumerate(paths)]
    for i, row in enumerate(odd):
        row["checkpoint"]["sha256"] = f"{i:064x}"  # evaluations of one checkpoint would be one row
    rows_in(tmp_path, good, *odd)
    assert leaderboard.main(["--runs", str(tmp_path)]) == 0
    assert (
        "sound" in (tmp_path / "leaderboard.md").read_text() and "sound" in (tmp_path / "leaderboard.html").read_text()
    )
    told = capsys.readouterr().err
    assert "Traceback" not in told
    if abs(number) > 1e30:
        assert told.count("left out: ") == len(paths) and told.count("result.json") >= len(paths)
    assert leaderboard.main(["--runs", str(tmp_path), "--matched", "train_macs"]) == 0
    assert "sound" in leaderboard.summary(leaderboard.read_records(tmp_path), good["protocol_hash"])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "5",
        "{}",
        "NaN",
        "[" * 10**5,
        '{"a":' * 10**5,
        '"\\ud800"',
        '{"name": "\\ud800"}',
        "\x00",
        "1" * 5000,
        '{"schema": "result.v1"}',
    ],
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
    for name in (
        "1-pipe/curve.jsonl",
        "2-huge/curve.jsonl",
        "other/result.json",
        "second/result.json",
        "claim/claim.json",
        "third/claim.json",
    ):
        assert str(tmp_path / name) in told
    assert all(name in (tmp_path / "leaderboard.md").read_text() for name in ("sound", "pipe", "huge"))


def test_a_record_that_cannot_be_shown_is_named(tmp_path, capsys, monkeypatch):
    """Whatever a table raises at one row."""
    rows_in(tmp_path, record(name="sound"), record(name="odd"))
    read = columns.IDENTITY[0].read
    fragile = dataclasses.replace(
        columns.IDENTITY[0], read=lambda entry: 1 // (entry.row["name"] != "odd") and read(entry)
    )
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
    for line in (
        '{"images": 1, "loss": 1%s}' % ("0" * 400),
        '{"images": 1, "loss": 1e308}\n{"images": 2, "loss": 1e308}' * 300,
        '{"images": [], "loss": 1}',
    ):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with contextlib.suppress(UserError):
            losses_of(row, tmp_path)


# -- curves ------------------------------------------------------------------------------------------------------------


def points(count: int = 2) -> list[dict]:
    metrics = {"fd_embedded": {"value": 812.25, "se": 10.5, "n": 1000, "unit": "feature^2"}}
    return [
        {"images": 640 * n, "macs_train": 10**12 * n, "protocol_hash": "7d8e681bae88", "metrics": metrics}
        for n in range(1, count + 1)
    ]


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
    with pytest.raises(UserError, match="its last line is incomplete"):
        read_curve(file)


# -- arrays and images of other people ---------------------------------------------------------------------------------

PIXELS = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (4, 2, 2, 3)).astype(np.uint8)


def npz(path: Path, compressed: bool = False, **arrays) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def npy(
    shape: str, dtype: str = "|u1", version: bytes = b"\x01\x00", length: int | None = None, data: bytes = b""
) -> bytes:
    """A NumPy array as a file, with any header."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    width = 2 if version[0] == 1 else 4
    return (
        b"\x93NUMPY" + version + (len(header) if length is None else length).to_bytes(width, "little") + header + data
    )


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
    "negative shape": (
        lambda path: archived(path, "arr_0.npy", npy("(-4, 2, 2, 3)", data=bytes(48))),
        "the impossible shape",
    ),
    "boolean shape": (
        lambda path: archived(path, "arr_0.npy", npy("(True, 2, 2, 3)", data=bytes(12))),
        "the impossible shape|cannot be read",
    ),
    "broken header": (lambda path: archived(path, "arr_0.npy", npy("(4, 2, 2")), "cannot be read as .npz"),
    "nested header": (lambda path: archived(path, "arr_0.npy", npy("(" * 3000)), "cannot be read as .npz"),
    "header of 4 GB": (
        lambda path: archived(path, "arr_0.npy", npy("(1,)", version=b"\x02\x00", length=2**32 - 1)),
        "not a NumPy array",
    ),
    "no array": (lambda path: archived(path, "arr_0.npy", b"text"), "not a NumPy array"),
    "no type": (lambda path: archived(path, "arr_0.npy", npy("(4, 2, 2, 3)", dtype="zz")), "cannot be read as .npz"),
    "huge": (
        lambda path: archived(path, "arr_0.npy", npy("(1000000000, 256, 256, 3)", data=bytes(1000))),
        "ends early: 196,607,999,999,000 bytes are missing",
    ),
    "wide": (
        lambda path: archived(path, "arr_0.npy", npy("(1, 10000, 10000, 3)", data=bytes(3 * 10**8)), compression=8),
        "the limit is .* 8,192 px",
    ),
    "too short a shape": (
        lambda path: archived(path, "arr_0.npy", npy("(3, 2, 2, 3)", data=bytes(48))),
        "12 bytes more than its shape",
    ),
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
    assert (
        "../evil: not an array" in told
        and r"../\x1b[2Jevil" in told
        and "\x1b" not in told
        and "looks like samples" in told
    )


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


# -- references and caches ---------------------------------------------------------------------------------------------


def features(n: int = 4) -> FeatureSet:
    moments = Moments.zeros(2, 2)
    moments.add(torch.arange(2.0 * n).view(n, 2).cos(), torch.arange(n))
    return FeatureSet(moments, torch.arange(2.0 * n).view(n, 2).cos(), torch.arange(n) % 2, torch.zeros(n, 0))


def test_flipped_bits_of_the_feature_cache_are_found_or_change_nothing(tmp_path):
    """Among them renamed, reshaped and retyped tensors, whose bytes are all right."""
    file, good = tmp_path / "cache.safetensors", features()
    feature_sets._write(good, file)
    assert feature_sets._read(file, 4, 4) is not None and feature_sets._read(file, 5, 5) is None
    found = 0
    for where in flips(file):
        read = feature_sets._read(file, 4, 4)
        if read is None:
            found += 1
            continue
        assert all(torch.equal(value, good.tensors()[name]) for name, value in read.tensors().items()), where
    assert found > 6 * file.stat().st_size


def test_flipped_bits_of_a_built_reference_are_found_or_change_nothing(tmp_path):
    file, extractor = (
        tmp_path / "own.safetensors",
        SimpleNamespace(id="x", sha256="0" * 64, layer="p", resize="n", scaling="s", dims=2),
    )
    pooled = features().moments.total()
    entry = {"id": "own", "digest": "d", "split": "train", "crop": "c", "n_images": 4, "pillow": "12"}
    write_built(Reference(pooled, None, features().features, entry), file, extractor, 8)
    for where in flips(file):
        with contextlib.suppress(UserError):
            read = read_built(file, extractor, 8)
            assert (
                read.entry == entry
                and torch.equal(read.pooled.cov, pooled.cov)
                and torch.equal(read.features, features().features)
            ), where
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


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\xff" * 64, b"\x08" + bytes(7) + b"[1, 2]  ", b"\x02" + bytes(7) + b"{}"]
)
@pytest.mark.parametrize("method", ["jit", "pmf", "rae", "sit", "dit"])
def test_import_refuses_a_bad_file_in_a_sentence(tmp_path, capsys, method, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    assert prepare.main(["import", f"method={method}", f"file={tmp_path}/w.safetensors", f"out={tmp_path}/runs"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "w.safetensors" in told and not (tmp_path / "runs").exists()
