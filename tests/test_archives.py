"""ImageNet's forms: class folders, WebDataset tars, Hugging Face's tables and cropped shards give the same images;
broken ones have a name.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from image_archives import (
    SYNSETS,
    Entry,
    entries,
    photo,
    webdataset,
    write_arrow,
    write_folder,
    write_parquet,
    write_tar,
)
from PIL import Image
from shared_data import shared_file, unpacked

from pixlat.common.config.schema import DataConfig
from pixlat.common.datasets import npy_shards as mapped
from pixlat.common.datasets.batches import TrainingPlan, training_batches
from pixlat.common.datasets.load import DataSource, load_data, summarise
from pixlat.common.errors import UserError
from pixlat.common.images import tar as archives
from pixlat.common.images.decoding import decoding_digest
from pixlat.common.images.open_archive import open_archive
from pixlat.launch import prepare

TRAIN, VAL = entries(), entries(per_class=2, start=50)


def config(name: str, path: Path, **changes: object) -> DataConfig:
    return replace(DataConfig(name=name, path=str(path), image_size=16), **changes)  # type: ignore[arg-type]


def folder(root: Path, train: list[Entry] = TRAIN, val: list[Entry] = VAL) -> DataConfig:
    write_folder(root / "train", train)
    return config("folder", write_folder(root / "val", val).parent)


def wds(root: Path, train: list[Entry] = TRAIN, val: list[Entry] = VAL) -> DataConfig:
    webdataset(root / "imagenet1k-train-0000.tar", train[:5])
    webdataset(root / "imagenet1k-train-0001.tar", train[5:])
    webdataset(root / "imagenet1k-validation-00.tar", val)
    return config("tar", root)


def folder_tar(root: Path, train: list[Entry] = TRAIN, val: list[Entry] = VAL) -> DataConfig:
    parts = (("train", train), ("val", val))
    return config(
        "tar",
        write_tar(
            root / "sample.tar",
            {f"sample/{part}/{s}/{name}": content for part, found in parts for s, name, content in found},
        ),
    )


def synset_tars(root: Path, train: list[Entry] = TRAIN, val: list[Entry] = VAL) -> DataConfig:
    for synset in SYNSETS:
        for part, found in (("train", train), ("val", val)):
            write_tar(root / part / f"{synset}.tar", {name: content for s, name, content in found if s == synset})
    return config("tar", root)


def parquet(root: Path, train: list[Entry] = TRAIN, val: list[Entry] = VAL) -> DataConfig:
    write_parquet(root / "data" / "train-00000-of-00002.parquet", train[:7])
    write_parquet(root / "data" / "train-00001-of-00002.parquet", train[7:])
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", val)
    return config("parquet", root)


def arrow(root: Path, train: list[Entry] = TRAIN, val: list[Entry] = VAL) -> DataConfig:
    write_arrow(root / "train" / "data-00000-of-00002.arrow", train[:7])
    write_arrow(root / "train" / "data-00001-of-00002.arrow", train[7:], stream=False)
    write_arrow(root / "validation" / "data-00000-of-00001.arrow", val)
    return config("arrow", root)


FORMS = [wds, folder_tar, synset_tars, parquet, arrow]
Form = Callable[..., DataConfig]


def everything(source: DataSource) -> list[np.ndarray]:
    return [array for part in (source.train, source.heldout) for array in (part.labels, part.fetch(range(len(part))))]


# -- the same images in every form -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_folders_images_split_and_class_numbers(tmp_path: Path, form: Form) -> None:
    expected, found = load_data(folder(tmp_path / "folder")), load_data(form(tmp_path / "archive"))
    for ours, theirs in zip(everything(found), everything(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (found.info.num_train, found.info.num_heldout, found.info.num_classes) == (12, 6, 3)
    assert found.info.class_names == (("0", "1", "2") if form is wds else SYNSETS)


@pytest.mark.parametrize("form", FORMS)
def test_loader_processes_read_every_form(tmp_path: Path, form: Form) -> None:
    images = load_data(form(tmp_path)).train
    plan = TrainingPlan(images.labels, 6, 0, balanced=False, flip=True)
    alone, spread = (list(islice(training_batches(images, plan, 0, 6, 1, workers=workers), 4)) for workers in (0, 2))
    for (a,), (b,) in zip(alone, spread, strict=True):
        assert (a["image"] == b["image"]).all()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(images)).fetch([3]), images.fetch([3]))


def test_without_names_of_parts_a_hash_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "some.parquet", entries(per_class=20))
    source = load_data(config("parquet", tmp_path, holdout=0.1))
    assert np.bincount(source.heldout.labels).tolist() == [2, 2, 2]
    assert load_data(config("parquet", tmp_path / "some.parquet", holdout=0.1)).info.digest == source.info.digest
    assert load_data(config("parquet", tmp_path, holdout=0.2)).info.digest != source.info.digest


def test_a_test_part_without_labels_is_left_alone(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    settings = parquet(tmp_path)
    found = pa.parquet.read_table(tmp_path / "data" / "validation-00000-of-00001.parquet")
    unlabelled = found.set_column(1, "label", pa.array([-1] * len(found), pa.int64()))
    pa.parquet.write_table(unlabelled, tmp_path / "data" / "test-00000-of-00001.parquet")
    assert load_data(settings).info.num_heldout == 6
    (tmp_path / "data" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"test-00000-of-00001\.parquet, row 0 .* labels from -1 to -1"):
        load_data(settings)


def test_the_photographs_of_imagenet_are_the_same_from_a_tar_and_from_a_folder(tmp_path: Path) -> None:
    packed = load_data(config("tar", shared_file("imagenet-sample.tar"), image_size=64))
    loose = load_data(config("folder", unpacked("imagenet-sample.tar", tmp_path), image_size=64, holdout=0.0))
    assert packed.info.num_classes == loose.info.num_classes == 100
    assert packed.info.class_names == loose.info.class_names == tuple(sorted(loose.info.class_names))
    chosen = np.arange(0, 100, 9)
    np.testing.assert_array_equal(packed.train.fetch(chosen), loose.train.fetch(chosen))


def test_cifars_parts_inside_one_tar_are_told_apart() -> None:
    source = load_data(config("tar", shared_file("cifar10-subset.tar"), image_size=32))
    assert (source.info.num_classes, source.info.num_train + source.info.num_heldout) == (10, 12_000)
    assert source.train.archive.name(int(source.train.positions[0])).split("/")[2] == "train"  # type: ignore[attr-defined]
    assert source.heldout.archive.name(int(source.heldout.positions[0])).split("/")[2] == "test"  # type: ignore[attr-defined]


def test_what_tars_hold_is_kept_while_they_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "KEEP_FROM", 1)
    monkeypatch.setattr(archives, "SETTLED_NS", -(10**12))
    for form in (wds, folder_tar, synset_tars):
        settings = form(tmp_path / form.__name__)
        tars = [path for path in (tmp_path / form.__name__).rglob("*.tar") if not os.utime(path, ns=(10**18, 10**18))]
        first = load_data(settings)
        walk = archives._members
        monkeypatch.setattr(archives, "_members", lambda file, part: pytest.fail(f"{file} was read again"))
        again = load_data(settings)
        assert again.info == first.info and all(
            (a == b).all() for a, b in zip(everything(again), everything(first), strict=True)
        )
        monkeypatch.setattr(archives, "_members", walk)
        os.utime(tars[0], ns=(10**18, 10**18 + 1))
        assert load_data(settings).info == first.info
        if len(tars) > 1:
            tars[0].unlink()
            assert load_data(settings).info.digest != first.info.digest


def test_pipes_are_no_archives(tmp_path: Path) -> None:
    settings = wds(tmp_path)
    os.mkfifo(tmp_path / "train-pipe.tar")
    assert load_data(settings).info.num_train == 12


# -- mistakes ----------------------------------------------------------------------------------------------------------


def compressed(root: Path) -> DataConfig:
    root.mkdir()
    (root / "train.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    return config("tar", root)


def cut(root: Path) -> DataConfig:
    settings = folder_tar(root)
    with tarfile.open(root / "sample.tar") as tar:
        second = tar.getmembers()[1]
    # where a member ends, which tarfile does not mind
    (root / "sample.tar").write_bytes((root / "sample.tar").read_bytes()[: second.offset])
    return settings


def paths_only(root: Path) -> DataConfig:
    return config("parquet", write_parquet(root / "x.parquet", [(SYNSETS[0], "a.jpg", None)] * 3))  # type: ignore[list-item]


def other_columns(root: Path) -> DataConfig:
    import pyarrow as pa
    import pyarrow.parquet

    root.mkdir()
    pa.parquet.write_table(pa.table({"text": ["a"], "label": [0]}), root / "x.parquet")
    return config("parquet", root)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda root: config("tar", root), "holds no .tar file"),
        (compressed, r"train\.tar cannot be read as an uncompressed tar"),
        (cut, r"sample\.tar is cut short"),
        (lambda root: config("tar", write_tar(root / "x.tar", {"a.jpg": photo(0)})), "the class of a is unknown"),
        (
            lambda root: config(
                "tar", write_tar(root / "x.tar", {"k/a.jpg": photo(0), "k/b.jpg": photo(1), "k/b.cls": b"3"})
            ),
            "only a folder",
        ),
        (lambda root: config("tar", write_tar(root / "x.tar", {"k/a.txt": b"words"})), "holds no image"),
        (paths_only, r"x\.parquet, row 0 holds a path instead of an image"),
        (other_columns, "has the columns text, label"),
        (lambda root: replace(parquet(root), path=None), r"data=parquet needs data\.path"),
        (lambda root: replace(parquet(root), image_size=None), r"needs data\.image_size"),
        (lambda root: config("shards", root), r"images\.json cannot be read"),
    ],
)
def test_archive_mistakes_are_explained(tmp_path: Path, build: Callable[[Path], DataConfig], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_data(build(tmp_path / "set")).train.fetch(range(1))


def cls(content: bytes, **more: bytes) -> dict[str, bytes]:
    return {"0.jpg": photo(0), "0.cls": b"0", "1.jpg": photo(1), "1.cls": content, **more}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"999999999999", r"x\.tar, \.cls: class number 999999999999 in a data set of 2 images"),
        (b"9" * 200, r"class number of 200 digits in a data set of 2 images"),
        (b"9" * 5000, r"x\.tar: 1\.cls has 5,000 bytes, but a class number or name has at most 255"),
    ],
)
def test_class_numbers_of_tars_are_bounded_before_classes_are_made(
    tmp_path: Path, content: bytes, message: str
) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match=message):
        load_data(config("tar", write_tar(tmp_path / "x.tar", cls(content))))
    assert time.perf_counter() - start < 5
    # a piece of a larger set
    assert load_data(config("tar", write_tar(tmp_path / "y.tar", cls(b"999")))).info.num_classes == 1000


def test_a_sparse_label_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    """GNU tar's oldest form: the size in the tar is none, the size of the file a terabyte."""
    member = tarfile.TarInfo("0.cls")
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"00000000000\0", b"00000000000\0"
    header[483:495] = (0x80000000 << 64 | 10**12).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    write_tar(tmp_path / "x.tar", {"0.jpg": photo(0)})
    (tmp_path / "x.tar").write_bytes(bytes(header) + (tmp_path / "x.tar").read_bytes())
    with pytest.raises(UserError, match=r"x\.tar: 0\.cls is stored as a sparse file"):
        load_data(config("tar", tmp_path / "x.tar"))


def labelled(file: Path, labels: object, metadata: dict[str, str] | None = None) -> Path:
    """A table of one image a label."""
    import pyarrow as pa
    import pyarrow.parquet

    labels = labels if isinstance(labels, pa.Array) else pa.array(labels)
    images = pa.array(
        [{"bytes": photo(i), "path": "x"} for i in range(len(labels))],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pa.parquet.write_table(pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata), file)
    return file


def names_of(value: object) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": value}}}})}


@pytest.mark.parametrize(
    ("labels", "metadata", "message"),
    [
        ([0, 10**12], None, r"column label: class number 1000000000000 in a data set of 2 images"),
        ([0, 2**62], None, r"column label holds 4611686018427387904"),
        (np.array([2**63 + 5, 1], np.uint64), None, r"holds 9223372036854775813"),
        ([0.5, 1.5], None, r"column label holds 0\.5\. Class numbers are whole numbers"),
        ([0.0, float("nan")], None, r"column label holds nan"),
        ([0, None], None, r"1 rows of the column label are empty"),
        (["cat", "dog"], None, r"column label holds string instead of class numbers"),
        ([[0], [1]], None, r"column label holds list<.*> instead of class numbers"),
        ([date(2026, 1, 1)], None, r"column label holds date32\[day\] instead of class numbers"),
        ([datetime(2026, 1, 1)], None, r"column label holds timestamp"),
        ([0, 1], {"huggingface": "{"}, r"Hugging Face metadata are damaged"),
        ([0, 1], {"huggingface": "[1]"}, r"Hugging Face metadata are damaged"),
        ([0, 1], {"huggingface": '{"info": {"features": 3}}'}, r"Hugging Face metadata are damaged"),
        ([0, 1], names_of([0, 1]), r"metadata name the classes \[0, 1\], which is no list of names"),
        ([0, 1], names_of({"a": 1}), r"which is no list of names"),
    ],
)
def test_labels_of_tables_that_are_no_class_numbers_are_a_sentence(
    tmp_path: Path, labels: object, metadata: dict[str, str] | None, message: str
) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match=message):
        load_data(config("parquet", labelled(tmp_path / "x.parquet", labels, metadata)))
    assert time.perf_counter() - start < 10


def test_whole_numbers_of_another_type_are_labels(tmp_path: Path) -> None:
    for number, labels in enumerate(([1.0, 0.0, 2.0], np.array([1, 0, 2], np.uint8), [True, False, True])):
        found = load_data(config("parquet", labelled(tmp_path / f"{number}.parquet", labels), holdout=0.0)).train
        assert found.labels.tolist() == [int(label) for label in labels]


def test_a_damaged_table_is_a_sentence(tmp_path: Path) -> None:
    """A byte anywhere: pyarrow's complaints come with the name of the file."""
    whole = labelled(tmp_path / "x.parquet", [0, 1, 0, 1]).read_bytes()
    rng, refused = np.random.Generator(np.random.PCG64(0)), 0
    for trial in range(120):
        changed = bytearray(whole)
        changed[int(rng.integers(len(whole) // 2 if trial % 2 else 0, len(whole)))] ^= 1 << int(rng.integers(8))
        file = tmp_path / f"{trial}.parquet"
        file.write_bytes(changed)
        try:
            load_data(config("parquet", file, holdout=0.0)).train.fetch(range(4))
        except UserError as error:
            assert f"{trial}.parquet" in str(error)
            refused += 1
    assert refused > 10


def test_tables_of_different_columns_are_told(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    labelled(tmp_path / "a.parquet", [0, 1])
    table = pa.parquet.read_table(labelled(tmp_path / "b.parquet", [0, 1])).rename_columns(["image", "cls"])
    pa.parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet has its images and labels in the columns"):
        load_data(config("parquet", tmp_path))


def test_a_missing_pyarrow_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'pixlat\[tables\]'"):
        load_data(settings)


# -- broken images -----------------------------------------------------------------------------------------------------


def encoded(mode: str, kind: str) -> bytes:
    grey = Image.fromarray(np.full((20, 20), 128, dtype=np.uint8))
    made = {"I;16": Image.fromarray(np.full((20, 20), 128 * 257, dtype=np.uint16)), "P": grey.quantize(4)}
    image = made.get(mode) or grey.convert("RGB").convert(mode)
    stream = io.BytesIO()
    image.save(stream, format=kind)
    return stream.getvalue()


BROKEN = {"truncated": photo(4)[:400], "zero-byte": b"", "text": b"<html>", "damaged": photo(4)[:300] + bytes(200)}
ODD = {
    "CMYK": encoded("CMYK", "jpeg"),
    "P": encoded("P", "png"),
    "I;16": encoded("I;16", "png"),
    "RGBA": encoded("RGBA", "png"),
}
BAD = 4  # position of the broken image: the first of the second class


def with_bad(content: bytes) -> list[Entry]:
    return [(synset, name, content if number == BAD else good) for number, (synset, name, good) in enumerate(TRAIN)]


@pytest.mark.parametrize("form", [folder, *FORMS])
@pytest.mark.parametrize("fault", ["truncated", "zero-byte", "text"])
def test_a_broken_image_is_named_or_the_next_of_its_class_stands_in(tmp_path: Path, form: Form, fault: str) -> None:
    settings = form(tmp_path, with_bad(BROKEN[fault]))
    name = "row 4" if form in (parquet, arrow) else r"004\.jpg" if form is wds else r"n01530575_0000\.JPEG"
    with pytest.raises(UserError, match=name):
        load_data(settings).train.fetch(range(12))
    images = load_data(replace(settings, broken="skip")).train
    found = images.fetch(range(12))
    np.testing.assert_array_equal(found[BAD], found[BAD + 1])
    np.testing.assert_array_equal(
        np.delete(found, BAD, 0), np.delete(load_data(form(tmp_path / "whole")).train.fetch(range(12)), BAD, 0)
    )
    assert list(images.broken) == [BAD]


@pytest.mark.parametrize("mode", ODD)
def test_odd_modes_are_converted_as_in_adm_or_count_as_broken(tmp_path: Path, mode: str) -> None:
    settings = folder(tmp_path, with_bad(ODD[mode]))
    assert abs(load_data(settings).train.fetch([BAD]).astype(int) - 128).max() <= 2
    with pytest.raises(UserError, match=rf"0000\.JPEG.* has mode {mode}, but data.modes=strict"):
        load_data(replace(settings, modes="strict")).train.fetch([BAD])
    skipping = load_data(replace(settings, modes="strict", broken="skip"))
    np.testing.assert_array_equal(*skipping.train.fetch([BAD, BAD + 1]))
    assert skipping.info.digest != load_data(settings).info.digest


def test_a_damaged_image_is_either_read_or_named(tmp_path: Path) -> None:
    """Decoders fill in what they can; whatever else they meet must not leave without a name."""
    whole = photo(4)
    rng = np.random.Generator(np.random.PCG64(0))
    faults = 0
    for trial in range(60):
        content = bytearray(photo(4, "png") if trial % 2 else whole)
        for place in rng.integers(2, len(content), 8):
            content[place] = rng.integers(256)
        images = load_data(folder(tmp_path / str(trial), with_bad(bytes(content)))).train
        try:
            assert images.fetch([BAD]).shape == (1, 3, 16, 16)
        except UserError as error:
            assert "n01530575_0000.JPEG" in str(error)
            faults += 1
    assert 10 < faults < 60


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_told_once_and_counted_in_the_process_that_trains(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    images = load_data(replace(folder(tmp_path, with_bad(b"")), broken="skip")).train
    plan = TrainingPlan(images.labels, 6, 0, balanced=False)
    with caplog.at_level(logging.WARNING, "pixlat"):
        batches = list(islice(training_batches(images, plan, 0, 6, 1, workers=workers), 8))
    assert len(caplog.messages) == 1
    assert "n01530575_0000.JPEG (0 bytes)" in caplog.messages[0] and "1 of 12 were skipped so far" in caplog.messages[0]
    assert list(images.broken) == [BAD]
    assert all(set(batch) == {"image", "label", "index"} for (batch,) in batches)


def test_a_class_without_a_readable_image_is_an_error(tmp_path: Path) -> None:
    train = [(synset, name, b"" if synset == SYNSETS[1] else content) for synset, name, content in TRAIN]
    with pytest.raises(UserError, match=r"no image of class 1 can be read.*n01530575_0003"):
        load_data(replace(folder(tmp_path, train), broken="skip")).train.fetch([7])


# -- shards ------------------------------------------------------------------------------------------------------------


def prepared(settings: DataConfig, to: Path, *more: str) -> int:
    return prepare.main(
        ["images", f"data={settings.name}", f"data.path={settings.path}", "data.image_size=16", f"to={to}", *more]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_hold_the_images_labels_split_and_digests_of_the_data(tmp_path: Path, workers: int) -> None:
    settings = wds(tmp_path / "data")
    assert prepared(settings, tmp_path / "shards", f"workers={workers}", "shard_images=5") == 0
    expected, found = load_data(settings), load_data(DataConfig(name="shards", path=str(tmp_path / "shards")))
    for ours, theirs in zip(everything(found), everything(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found.info == expected.info
    assert found.train.decoding == expected.train.decoding == decoding_digest()  # of the Pillow that cropped them
    assert len(list((tmp_path / "shards").glob("train-0*.npy"))) == 3
    np.testing.assert_array_equal(found.train.fetch([7], [True]), expected.train.fetch([7])[..., ::-1])
    pickle.loads(pickle.dumps(found.train)).fetch([11])


def test_preparing_again_keeps_whole_shards_and_refuses_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, shards = folder(tmp_path / "data", with_bad(b"")), tmp_path / "shards"
    assert prepared(settings, shards, "workers=0") == 2
    assert "n01530575_0000.JPEG (0 bytes)" in capsys.readouterr().err
    assert not (shards / "images.json").exists()
    assert prepared(settings, shards, "workers=0", "data.broken=skip") == 0
    assert "1 skipped" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in shards.glob("*-0*.npy")}
    (shards / "images.json").unlink()
    assert prepared(settings, shards, "workers=0", "data.broken=skip") == 0
    assert {file: file.stat().st_mtime_ns for file in shards.glob("*-0*.npy")} == before
    skipped = json.loads((shards / "images.json").read_text())["parts"]["train"]["skipped"]
    assert list(skipped) == [str(BAD)] and "0000.JPEG" in skipped[str(BAD)]
    assert prepared(wds(tmp_path / "other"), shards) == 2
    assert "cropped images of other data" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds images of 16 pixels"):
        load_data(config("shards", shards, image_size=32))
    (shards / "train-00000.npy").write_bytes(b"short")
    with pytest.raises(UserError, match=r"train-00000\.npy is not an \.npy file .* damaged"):
        load_data(config("shards", shards))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_hold_whole_images_for_random_crops(tmp_path: Path, workers: int) -> None:
    """Crops of the prepared images are those of the data behind them, in every process; all else is as without them."""
    settings = replace(wds(tmp_path / "data"), crop="random", resize=20)
    to = tmp_path / "shards"
    assert prepared(settings, to, "data.crop=random", "data.resize=20", f"workers={workers}", "shard_images=5") == 0
    random = DataConfig(name="shards", path=str(to), crop="random")
    expected, found = load_data(settings), load_data(random)
    plan = TrainingPlan(expected.train.labels, 6, 0, balanced=False, flip=True, crop=True)
    ours, theirs = (
        list(islice(training_batches(images, plan, 0, 6, 1, workers=workers), 4))
        for images in (found.train, expected.train)
    )
    for (a,), (b,) in zip(ours, theirs, strict=True):
        assert (a["image"] == b["image"]).all()
    centred = load_data(replace(random, crop="center"))
    for a, b in zip(
        everything(centred), everything(load_data(replace(settings, crop="center", resize=None))), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert found.info == centred.info == expected.info
    with pytest.raises(UserError, match="images whose shorter side has 20 pixels"):
        load_data(replace(random, resize=24))
    assert prepared(settings, to, "data.crop=random", "data.resize=24", "workers=0", "shard_images=5") == 2


def test_random_crops_of_shards_of_squares_are_refused(tmp_path: Path) -> None:
    assert prepared(wds(tmp_path / "data"), tmp_path / "shards", "workers=0") == 0
    with pytest.raises(
        UserError, match=r"holds only cropped squares. Prepare shards with .*data\.crop=random data\.resize=20"
    ):
        load_data(DataConfig(name="shards", path=str(tmp_path / "shards"), crop="random", resize=20))


def test_preparing_whole_images_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    settings, to = wds(tmp_path / "data"), tmp_path / "shards"
    keys = ("data.crop=random", "data.resize=20", "workers=0", "shard_images=5")
    assert prepared(settings, to, *keys) == 0
    card, before = (
        (to / "images.json").read_text(),
        {file: file.stat().st_mtime_ns for file in to.glob("train-resized-0*.bin")},
    )
    (to / "images.json").unlink()
    removed = to / "train-resized-00001.bin"
    removed.unlink()
    assert prepared(settings, to, *keys) == 0
    assert (to / "images.json").read_text() == card
    assert {file for file, time in before.items() if file.stat().st_mtime_ns != time} == {removed}


# -- damaged shards ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards with whole images, three files of each kind."""
    keys = ("data.crop=random", "data.resize=20", "workers=0", "shard_images=5")
    assert prepared(wds(tmp_path / "data"), tmp_path / "shards", *keys) == 0
    return tmp_path / "shards"


def opened(folder: Path, **changes: object) -> DataSource:
    return load_data(DataConfig(name="shards", path=str(folder), crop="random", **changes))  # type: ignore[arg-type]


def damage(file: Path, place: int) -> None:
    """Another byte, and a time of change that shows it."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize(
    "name",
    ["train-00001.npy", "train-labels.npy", "heldout-00000.npy", "train-resized-00002.bin", "train-resized-sizes.npy"],
)
def test_a_changed_byte_of_a_shard_is_found_when_it_is_opened(shards: Path, name: str) -> None:
    opened(shards)
    damage(shards / name, -24)  # the low byte of a label or of a size, or a pixel
    with pytest.raises(UserError, match=rf"{name.split('.')[0]}.*(is damaged: its SHA-256|labels from|shorter side)"):
        opened(shards)


def test_shards_are_verified_once_for_each_size_and_time(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    sha256_of = mapped.sha256_of
    monkeypatch.setattr(mapped, "sha256_of", lambda file: read.append(file.name) or sha256_of(file))  # type: ignore[func-returns-value]
    opened(shards)
    assert read == []  # the command has just computed the digests
    (shards / mapped.VERIFIED).unlink()
    opened(shards)
    opened(shards)
    assert len(read) == len(set(read)) == 11  # 3 + 2 shards, 3 of whole images, labels twice, sizes
    os.utime(shards / "train-00001.npy", ns=(1, 1))
    opened(shards)
    assert read[11:] == ["train-00001.npy"]
    (shards / mapped.VERIFIED).write_text("[damaged")
    opened(shards)
    assert len(read) == 23


def test_what_was_verified_in_a_read_only_folder_is_kept_elsewhere(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shards / mapped.VERIFIED).unlink()
    monkeypatch.setattr("pixlat.common.datasets.npy_shards.os.access", lambda path, mode: False)
    opened(shards)
    assert not (shards / mapped.VERIFIED).exists()
    monkeypatch.setattr(mapped, "sha256_of", lambda file: pytest.fail(f"{file} was read again"))
    opened(shards)


VERIFY_TOO = """
import sys
from pathlib import Path
from pixlat.common.images import tar as archives
from pixlat.common.datasets import npy_shards as mapped
from pixlat.common.config.schema import DataConfig
from pixlat.common.datasets.load import load_data

sha256_of = mapped.sha256_of
mapped.sha256_of = lambda file: sys.stdout.write(file.name + "\\n") and sha256_of(file)
load_data(DataConfig(name="shards", path=sys.argv[1], crop="random"))
"""


def test_one_process_of_a_machine_verifies_for_all(shards: Path) -> None:
    (shards / mapped.VERIFIED).unlink()
    command = [sys.executable, "-c", VERIFY_TOO, str(shards)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) for _ in range(3)
    ]
    read = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(map(len, read)) == [0, 0, 11] and all(process.returncode == 0 for process in processes)


def test_shards_without_digests_open_and_that_is_told_once(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = json.loads((shards / "images.json").read_text())
    for part in content["parts"].values():
        del part["sha256"]
    (shards / "images.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "pixlat"):
        opened(shards)
    assert [message.count("holds no digests") for message in caplog.messages] == [1]


def test_a_plan_does_not_read_the_shards(shards: Path) -> None:
    (shards / mapped.VERIFIED).unlink()
    damage(shards / "train-00001.npy", -1)
    assert summarise(DataConfig(name="shards", path=str(shards))).num_train == 12


def test_an_image_of_a_shard_is_one_request(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = opened(shards).train
    requests: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: requests.append(size) or pread(file, size, offset))  # type: ignore[func-returns-value]
    train.fetch([0, 7, 11])
    assert requests == [3 * 16 * 16] * 3


def test_a_shard_that_is_cut_during_the_run_is_named(shards: Path) -> None:
    train = opened(shards).train
    (shards / "train-00001.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-00001\.npy is cut short: it ends after"):
        train.fetch([6])


ODD_VALUES = [None, -1, 0, 10**15, 2**70, 1.5, True, "x", [], {}, [[]], {"a": 1}, {"train-00000.npy": "x"}, 11, 13]


def test_a_damaged_card_is_a_sentence(shards: Path) -> None:
    """Every field in turn is missing or holds something else; a folder opens as it was or is refused,
    and nothing large is allocated.
    """
    whole = json.loads((shards / "images.json").read_text())
    expected = everything(opened(shards))
    refused = 0
    for place in (
        [(key,) for key in whole]
        + [("parts", part, key) for part in ("train", "heldout") for key in whole["parts"]["train"]]
        + [("parts", "train")]
    ):
        for value in ODD_VALUES:
            changed = json.loads(json.dumps(whole))
            target = changed
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = value
            (shards / "images.json").write_text(json.dumps(changed))
            try:
                found = opened(shards)
            except UserError as error:
                assert (
                    "images.json" in str(error)
                    or ".npy" in str(error)
                    or ".bin" in str(error)
                    or "squares" in str(error)
                ), str(error)
                refused += 1
            else:
                assert place[-1] in ("name", "identity", "skipped", "sha256", "decoding", "class_names"), (place, value)
                assert all((a == b).all() for a, b in zip(everything(found), expected, strict=True))
    assert refused > 150
    for text in ("", "[]", "null", "[" * 100_000, "\x00"):
        (shards / "images.json").write_text(text)
        with pytest.raises(UserError, match=r"images\.json"):
            opened(shards)


def test_a_damaged_shard_file_is_a_sentence(shards: Path) -> None:
    """Any byte of a header, and any length: the digests are left out here, so that it is the shape that tells."""
    content = json.loads((shards / "images.json").read_text())
    for part in content["parts"].values():
        part["sha256"] = None
    (shards / "images.json").write_text(json.dumps(content))
    rng = np.random.Generator(np.random.PCG64(0))
    for name in ("train-00000.npy", "train-labels.npy", "train-resized-sizes.npy"):
        whole, refused = (shards / name).read_bytes(), 0
        for place in range(0, 128, 3):
            changed = bytearray(whole)
            changed[place] = int(rng.integers(256))
            (shards / name).write_bytes(changed)
            try:
                opened(shards)
            except UserError as error:
                assert name in str(error)
                refused += 1
        for length in (0, 5, 60, len(whole) - 1):
            (shards / name).write_bytes(whole[:length])
            with pytest.raises(UserError, match=name):
                opened(shards)
        (shards / name).write_bytes(whole)
        assert refused > 10
    for label in (2**62, -1, 3):
        np.save(shards / "train-labels.npy", np.array([label] + [0] * 11))
        with pytest.raises(UserError, match=r"train-labels\.npy holds labels from"):
            opened(shards)


def test_every_archive_says_what_it_is(tmp_path: Path) -> None:
    parquet(tmp_path)
    archive = open_archive("parquet", tmp_path)
    assert archive.name(8) == "train-00001-of-00002.parquet, row 1"
    assert archive.size(8) == (tmp_path / "data" / "train-00001-of-00002.parquet").stat().st_size
