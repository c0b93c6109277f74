"""`pixlat sample`: classes, files, interruptions, processes, sources, and the score of what it writes."""

import contextlib
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluated_run import MODEL, Projections, image_folder, run_folder
from PIL import Image

from pixlat.common.config.identity import to_yaml
from pixlat.common.config.resolve import resolve
from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of
from pixlat.common.seeds import image_seeds
from pixlat.common.weights import fetch as hub
from pixlat.evaluation import run
from pixlat.evaluation.records.record import read_record
from pixlat.evaluation.score import assess, judged
from pixlat.evaluation.score.generate import balanced_labels, draw_labels, generate
from pixlat.evaluation.score.models import load_run
from pixlat.launch import prepare, sample
from pixlat.launch.sampling import folder as sample_folder
from pixlat.launch.sampling import work as sample_work
from pixlat.launch.sampling.classes import Classes, described, read_classes
from pixlat.launch.sampling.files import EMPTY, grid_places, row_names, write_npz
from pixlat.launch.sampling.folder import SampleFolder, in_words
from pixlat.launch.sampling.request import changes
from pixlat.methods import get_spec
from pixlat.methods.jit.method import JiTMethod

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
NAMES = ("class0", "class1", "class2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with its record and its class names, and the data."""
    root = tmp_path_factory.mktemp("runs")
    run_folder(root / "first", image_folder(root / "data"))
    facts = {"class_names": NAMES, "num_classes": 3, "image_size": 8}
    (root / "first" / "data.json").write_text(json.dumps(facts))
    return root


def made(place, to, *arguments):
    """Runs the command on the first run."""
    return sample.work([f"run={place}/first", f"to={to}", "device=cpu", *arguments])


def expected(place, labels, seed=0, batch=50, settings=None, average=None):
    """(N, H, W, 3) what the sampler makes, with nothing of the command around it."""
    model = load_run(place / "first", settings or {}, average, CPU)
    where = (seed, batch, CPU, model.run.eval.precision, model.run.eval.uint8)
    return np.concatenate(
        [images.permute(0, 2, 3, 1).numpy() for images, _ in generate(model.method, model.run.sample, labels, *where)]
    )


def contents(folder):
    """Every file but the log of starts, which tells how often there was one."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: content for name, content in files.items() if name not in ("starts.jsonl", "code.diff", ".lock")}


# -- classes ----------------------------------------------------------------------------------------------------------


def test_classes_by_name_number_law_and_list(tmp_path):
    names = ("cat", "dog", "0")
    for law in ("balanced", "random"):
        assert read_classes(law, names, 3) == Classes(law)
    assert read_classes("dog, cat", names, 3).labels(5, 3, 0).tolist() == [1, 0, 1, 0, 1]
    assert read_classes("1", names, 3).numbers == (1,)
    assert read_classes("0", names, 3).numbers == (2,)  # a name that looks like a number
    assert read_classes("[2,1]", (), 3).numbers == (2, 1)
    (tmp_path / "list.txt").write_text("dog\n\n1\r\ncat\n")
    assert read_classes(f"{tmp_path}/list.txt", names, 3).numbers == (1, 1, 0)
    assert np.array_equal(Classes("balanced").labels(31, 3, 4), balanced_labels(31, 3, 4))
    assert np.array_equal(Classes("random").labels(31, 3, 4), draw_labels("random", 31, 3, 4))
    assert described(Classes("in turn", (1, 0)), names, 3) == "dog, cat in turn"
    assert described(Classes("random"), names, 3) == "3 classes, random"


@pytest.mark.parametrize(
    ("asked", "names", "message"),
    [
        (
            "dgo",
            ("cat", "dog"),
            r"class=dgo: there is no class 'dgo'. Did you mean 'dog'\? Numbers go from 0 to 1, names are: cat, dog.",
        ),
        ("2", ("cat", "dog"), "no class '2'.* Numbers go from 0 to 1"),
        ("-1", ("cat", "dog"), "no class '-1'"),
        ("dog", (), "Names cannot be used: neither a data.json"),
        ("cat,,dog", ("cat", "dog"), "a class is missing before, between or after the commas"),
        ("cat,random", ("cat", "dog"), "random takes all classes, so it stands alone"),
        ("nowhere.txt", ("cat", "dog"), "there is no such file. A list of classes"),
        ("x", tuple(f"n{number}" for number in range(30)), "n18, n19 and 10 more"),
    ],
)
def test_wrong_classes_are_named(asked, names, message):
    with pytest.raises(UserError, match=message):
        read_classes(asked, names, len(names) or 5)


def test_wrong_lines_of_a_list_are_named(tmp_path):
    (tmp_path / "list.txt").write_text("cat\n\nbird\n")
    with pytest.raises(UserError, match=r"list.txt, line 3: there is no class 'bird'"):
        read_classes(f"{tmp_path}/list.txt", ("cat", "dog"), 2)
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_classes(f"{tmp_path}/list.txt", ("cat", "dog"), 2)


# -- files ------------------------------------------------------------------------------------------------------------


def test_all_files_hold_the_samplers_images(place, tmp_path):
    """The same images as PNG, as .npz and in the grid."""
    told = made(place, tmp_path / "out", "n=17", "class=class2,0", "seed=3", "sample.guidance=2", "batch=5")
    labels = np.resize([2, 0], 17)
    images = expected(place, labels, 3, 5, {"sample.guidance": "2"})
    assert images.std() > 5 and len(np.unique(images.reshape(17, -1), axis=0)) == 17
    files = sorted((tmp_path / "out/images").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(17)]
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), images)
    with np.load(tmp_path / "out/samples.npz") as archive:
        assert (
            archive.files == ["arr_0", "labels", "seeds"]
            and archive["arr_0"].dtype == np.uint8
            and archive["labels"].dtype == np.int64
        )
        assert np.array_equal(archive["arr_0"], images) and np.array_equal(archive["labels"], labels)
        assert archive["seeds"].tolist() == image_seeds(3, range(17))
    grid = Image.open(tmp_path / "out/grid.png")
    assert grid.width > 9 * 96 and grid.height > 2 * 96
    assert (
        not (tmp_path / "out/.unfinished").exists() and "17 samples of first (class2, class0 in turn, seed 3)" in told
    )


def test_the_batch_changes_no_image_but_for_the_rounding_of_products(place, tmp_path):
    """Each image has its own generator. Matrix products of other shapes may round otherwise, so the batch is kept."""
    made(place, tmp_path / "out", "n=17", "class=random", "batch=5", "as=npz")
    labels = draw_labels("random", 17, 3, 0)
    other = expected(place, labels, batch=17).astype(int)
    with np.load(tmp_path / "out/samples.npz") as archive:
        difference = np.abs(archive["arr_0"] - other)
    assert difference.max() <= 1 and difference.mean() < 1e-3


def test_samples_json_says_where_the_images_come_from(place, tmp_path):
    made(place, tmp_path / "out", "n=4", "class=class1", "uint8=truncate", "precision=bf16", "average=raw")
    facts = json.loads((tmp_path / "out/samples.json").read_text())
    checkpoint = load_run(place / "first", {}, "raw", CPU).checkpoint
    assert (
        facts["source"]["checkpoint"] == checkpoint
        and facts["source"]["method"] == "jit"
        and facts["source"]["space"] == "pixel"
    )
    assert (
        facts["images"] | {"n": 4, "seed": 0, "uint8": "truncate", "precision": "bfloat16", "classes": {"1": "class1"}}
        == facts["images"]
    )
    assert (
        facts["sample"]["guidance"] == 1.5 and facts["labels"] == [1] * 4 and facts["seeds"] == image_seeds(0, range(4))
    )
    assert facts["code"]["git_sha"] and "torch" in facts["code"]["package_versions"]
    assert facts["command"].startswith("pixlat sample run=") and facts["files"]["samples.npz"] == sha256_of(
        tmp_path / "out/samples.npz"
    )
    (start,) = (tmp_path / "out/starts.jsonl").read_text().splitlines()
    assert "threads" in json.loads(start)["device"]
    settings = {"eval.precision": "bf16", "eval.uint8": "truncate"}
    with np.load(tmp_path / "out/samples.npz") as archive:
        assert np.array_equal(archive["arr_0"], expected(place, np.full(4, 1), settings=settings, average="raw"))
        assert not np.array_equal(archive["arr_0"], expected(place, np.full(4, 1)))


@pytest.fixture(scope="module")
def in_all_formats(place, tmp_path_factory):
    """The files of five images, as PNG, .npz and grid."""
    folder = tmp_path_factory.mktemp("all") / "out"
    made(place, folder, "n=5", "batch=2")
    return contents(folder)


@pytest.mark.parametrize("formats", ["png", "npz", "grid", "npz,grid"])
def test_only_the_wanted_files_are_made(place, tmp_path, in_all_formats, formats):
    made(place, tmp_path / "out", "n=5", f"as={formats}", "batch=2")
    names = {"png": "images", "npz": "samples.npz", "grid": "grid.png"}
    assert {name for name in names.values() if (tmp_path / "out" / name).exists()} == {
        names[word] for word in formats.split(",")
    }
    for name, content in contents(tmp_path / "out").items():
        assert name == "samples.json" or content == in_all_formats[name], name


def test_an_npz_is_streamed_and_the_same_bytes_each_time(tmp_path):
    shape, rng = (64, 128, 128, 3), np.random.Generator(np.random.PCG64(0))
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(64)
    tracemalloc.start()
    write_npz(tmp_path / "a.npz", shape, (images[start : start + 8] for start in range(0, 64, 8)), {"labels": labels})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes / 2, peak
    time.sleep(2.1)  # a zip archive's clock ticks every two seconds
    write_npz(tmp_path / "b.npz", shape, iter([images]), {"labels": labels})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as archive:
        assert np.array_equal(archive["arr_0"], images) and np.array_equal(archive["labels"], labels)
    with pytest.raises(ValueError, match="56 rows were written of 64"):
        write_npz(tmp_path / "c.npz", shape, iter([images[:56]]), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]  # nothing half-written


def test_the_grid_shows_the_first_images_of_each_class():
    labels = np.array([1, 0, 1, 1, 1])
    places, columns, rows = grid_places(labels)
    assert columns == 4 and rows == [0, 1] and places.tolist() == [1, EMPTY, EMPTY, EMPTY, 0, 2, 3, 4]
    places, columns, rows = grid_places(np.full(64, 5))
    assert columns == 8 and rows == [5] * 8 and places.tolist() == list(range(64))
    assert row_names(rows, str) == ["5", *[""] * 7]
    places, columns, rows = grid_places(np.repeat(np.arange(1000), 2))
    assert len(rows) == 10 and rows[0] == 0 and rows[-1] == 999 and columns == 2 and (places != EMPTY).all()
    places, columns, rows = grid_places(np.repeat([3, 7], 500))
    assert columns == 10 and rows == [3] * 5 + [7] * 5 and len(places) == 100


# -- interruptions and processes --------------------------------------------------------------------------------------

ASKED = ("n=23", "batch=4", "class=random", "seed=5")


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    """The files of an undisturbed command, made in a folder of the name that the others have."""
    return commanded(place, tmp_path_factory.mktemp("undisturbed"))


def commanded(place, folder):
    """The files after `pixlat sample` in `folder`, whose command line is the same everywhere."""
    with contextlib.chdir(folder):
        sample.work([f"run={place}/first", "to=out", "device=cpu", *ASKED])
    return contents(folder / "out")


@pytest.mark.parametrize(
    "when", ["at the first batch", "between batches", "between the files of a batch", "at the end"]
)
def test_an_interrupted_command_goes_on_and_ends_in_the_same_files(place, undisturbed, tmp_path, monkeypatch, when):
    owner, name, call = {
        "at the first batch": (SampleFolder, "write", 1),
        "between batches": (SampleFolder, "write", 4),
        "between the files of a batch": (sample_folder, "write_png", 10),
        "at the end": (sample_work, "write_grid", 1),
    }[when]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, killing(getattr(owner, name), call))
        commanded(place, tmp_path)
    assert not (tmp_path / "out/samples.json").exists()
    for name in (
        ".samples.npz.7.tmp",
        "images/.000003.png.7.tmp",
    ):  # what kill -9 leaves of a file that was being written
        (tmp_path / "out" / name).write_bytes(b"half of it")
    drawn = []
    monkeypatch.setattr(JiTMethod, "sample", counted(JiTMethod.sample, drawn))
    assert commanded(place, tmp_path) == undisturbed
    left = {"at the first batch": 23, "between batches": 11, "between the files of a batch": 15, "at the end": 0}
    assert sum(drawn) == left[when]
    drawn.clear()
    assert commanded(place, tmp_path) == undisturbed and not drawn  # it finds everything there


class Killed(Exception):
    """Stands in for a process that ends without warning."""


def killing(real, at):
    """The function, which ends the command at its call number `at`."""
    calls = itertools.count(1)

    def replacement(*arguments, **keywords):
        if next(calls) == at:
            raise Killed
        return real(*arguments, **keywords)

    return replacement


def counted(real, drawn):
    """The sampler, which notes how many images it made."""

    def replacement(self, labels, noise, config):
        drawn.append(len(labels))
        return real(self, labels, noise, config)

    return replacement


def start(place, folder, rank):
    """The command as one of two processes."""
    port = str(20_000 + (os.getpid() * 7 + 1) % 10_000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "pixlat", "sample", f"run={place}/first", "to=out", "device=cpu", *ASKED]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_give_the_files_of_one(place, undisturbed, tmp_path):
    children = [start(place, tmp_path, rank) for rank in (0, 1)]
    printed = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], printed
    assert contents(tmp_path / "out") == undisturbed
    assert "23 samples" in printed[0][0] and printed[1][0] == ""


def test_after_kill_9_the_same_command_ends_in_the_same_files(place, tmp_path):
    argv = [f"run={place}/first", "to=out", "device=cpu", "n=1200", "batch=4", "seed=5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for folder in ("killed", "whole"):
        (tmp_path / folder).mkdir()
    command = [sys.executable, "-m", "pixlat", "sample", *argv]
    child = subprocess.Popen(command, cwd=tmp_path / "killed", env=environment, stderr=subprocess.DEVNULL)
    unfinished = tmp_path / "killed/out/.unfinished"
    deadline = time.monotonic() + 120
    while len(list(unfinished.glob("*.npy"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    finished = len(list(unfinished.glob("0*.npy")))
    assert 5 <= finished < 300, finished
    for folder in ("killed", "whole"):
        with contextlib.chdir(tmp_path / folder):
            sample.work(argv)
    assert contents(tmp_path / "killed/out") == contents(tmp_path / "whole/out")
    assert len((tmp_path / "killed/out/starts.jsonl").read_text().splitlines()) == 2


# -- the folder -------------------------------------------------------------------------------------------------------


def test_another_request_into_the_same_folder_is_refused_with_the_difference(place, tmp_path):
    made(place, tmp_path / "out", "n=6", "class=class1")
    before = contents(tmp_path / "out")
    for change, difference in (
        ("sample.guidance=3", r"sample.guidance: 1.5 -> 3.0"), ("seed=1", "seed: 0 -> 1"),
        ("batch=3", "batch: 50 -> 3"),
        ("average=raw", "average: None -> raw"), ("uint8=truncate", "uint8: round -> truncate"),
        ("as=png", r"as: \['grid', 'npz', 'png'\] -> \['png'\]"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=difference):
            made(place, tmp_path / "out", "n=6", "class=class1", change)
    with pytest.raises(UserError, match=r"n: 6 -> 7; class: \['class1'\] -> \['class0'\]"):
        made(place, tmp_path / "out", "n=7", "class=0")
    # the same class by its number
    assert "has these 6 samples already" in made(place, tmp_path / "out", "n=6", "class=1")
    assert contents(tmp_path / "out") == before
    assert changes({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}, "c": 3}) == ["c: 2 -> 3"]


def test_other_weights_into_the_same_folder_are_refused(place, tmp_path):
    """The same configuration with another seed's weights: only the digest of the checkpoint tells them apart."""
    run_folder(tmp_path / "second", place / "data", seed=0, record=False)
    made(place, tmp_path / "out", "n=2")
    stored = next((tmp_path / "second/checkpoints").glob("*/manifest.json"))
    stored.write_text(stored.read_text() + "\n")
    with pytest.raises(
        UserError, match=r"holds samples of another request \(checkpoint: [0-9a-f]{64} -> [0-9a-f]{64}\)"
    ):
        sample.work(
            [f"run={tmp_path}/second", f"to={tmp_path}/out", "device=cpu", "n=2", "data.path=" + str(place / "data")]
        )


def test_a_request_without_any_image_binds_nobody(place, tmp_path, monkeypatch):
    """A batch that is too large for the memory is made smaller, in the same folder."""

    def no_memory(*_):
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(JiTMethod, "sample", no_memory)
        with pytest.raises(UserError, match=r"not enough memory for 9 images at once. Give a smaller batch="):
            made(place, tmp_path / "out", "n=9", "batch=9")
    made(place, tmp_path / "out", "n=9", "batch=3")
    assert len(list((tmp_path / "out/images").iterdir())) == 9


def test_a_disk_that_fills_up_keeps_what_is_finished(place, tmp_path, monkeypatch):
    write = SampleFolder.write

    def full(self, number, images):
        if number == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, number, images)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", full)
        with pytest.raises(
            UserError, match=r"the disk is full .* Finished batches are kept. .* the same command again; it goes on"
        ):
            made(place, tmp_path / "out", "n=9", "batch=2")
    drawn = []
    monkeypatch.setattr(JiTMethod, "sample", counted(JiTMethod.sample, drawn))
    made(place, tmp_path / "out", "n=9", "batch=2")
    assert sum(drawn) == 5


def test_room_on_the_disk_is_looked_at_before_anything(place, tmp_path, monkeypatch):
    folder = SampleFolder(tmp_path / "out", 50_000, 50, 256, ("npz",))
    assert folder.bytes_needed() == 2 * 50_000 * 3 * 256**2 and in_words(folder.bytes_needed()) == "19.7 GB"
    assert SampleFolder(tmp_path / "out", 10, 5, 8, ("png",)).bytes_needed() == 10 * 4096
    usage = sample_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sample_folder.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    monkeypatch.setattr("pixlat.launch.sampling.work.make_samples", lambda *_: pytest.fail("went on"))
    with pytest.raises(
        UserError,
        match=r"50,000 images of 8 px as npz take up to 19.2 MB while they are made, and the disk has 1 MB free",
    ):
        made(place, tmp_path / "out", "n=50000", "as=npz")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    made(place, tmp_path / "out", "n=5", "as=npz")
    monkeypatch.setattr(sample_folder.shutil, "disk_usage", lambda _: usage._replace(free=0))
    assert "has these 5 samples already" in made(place, tmp_path / "out", "n=5", "as=npz")  # nothing is missing


def test_a_folder_with_other_things_is_left_alone(place, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match=r"holds other things \(thesis.tex\). Choose a new or an empty folder"):
        made(place, tmp_path / "mine", "n=2")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"is a file. Give a folder"):
        made(place, tmp_path / "file", "n=2")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _cheap_extractor(monkeypatch):
    monkeypatch.setattr("pixlat.evaluation.judges.panel.EmbeddedExtractor", Projections)


def scored(*arguments):
    """The record that `pixlat evaluate` writes."""
    return read_record(Path(run.work([*arguments, "device=cpu"]).splitlines()[-1]))


@pytest.mark.usefixtures("_cheap_extractor")
@pytest.mark.parametrize("limit", [10_000, 10])
def test_the_npz_of_a_run_has_the_runs_own_score_to_the_last_digit(place, tmp_path, monkeypatch, limit):
    """Every metric and the protocol's hash, class accuracy included; also if only some are looked at for neighbours."""
    for module in (judged, assess):
        monkeypatch.setattr(module, "MAX_NEIGHBOURS", limit)
    own = scored(f"run={place}/first")
    made(place, tmp_path / "out", "like=evaluation", "as=npz")
    finished = scored(f"npz={tmp_path}/out/samples.npz", f"out={tmp_path}/scores")
    assert finished["metrics"] == own["metrics"] and "class_accuracy" in own["metrics"]
    assert finished["protocol_hash"] == own["protocol_hash"] and finished["protocol"] == own["protocol"]
    assert (finished["system"]["method"], finished["system"]["space"], finished["name"]) == ("jit", "pixel", "out")
    made(place, tmp_path / "other", "n=24", "seed=1", "as=npz")
    assert scored(f"npz={tmp_path}/other/samples.npz", f"out={tmp_path}/scores")["metrics"] != own["metrics"]


@pytest.mark.usefixtures("_cheap_extractor")
def test_what_is_said_of_an_npz_must_be_true_of_it(place, tmp_path):
    made(place, tmp_path / "out", "n=24", "as=npz")
    npz = tmp_path / "out/samples.npz"
    for key, message in (
        ("labels=random", "says balanced"),
        ("uint8=truncate", "says round"),
        ("precision=bf16", "says fp32"),
    ):
        with pytest.raises(UserError, match=message):
            scored(f"npz={npz}", f"out={tmp_path}/scores", key)
    own = [f"data.path={place}/data", "data=folder", "data.image_size=8", f"out={tmp_path}/scores"]
    with np.load(npz) as archive:
        # another file, of which samples.json says nothing
        np.savez(npz, **{**archive, "labels": archive["labels"] + 7})
    other = scored(f"npz={npz}", *own)
    assert other["protocol"]["samples"]["label_law"] == "unknown" and "class_accuracy" not in other["metrics"]
    made(place, tmp_path / "one", "n=24", "as=npz", "class=class1")
    one = scored(f"npz={tmp_path}/one/samples.npz", f"out={tmp_path}/scores")
    assert (
        one["protocol"]["samples"] | {"label_law": "unknown", "uint8_rule": "round_half_even"}
        == one["protocol"]["samples"]
    )
    assert "class_accuracy" in one["metrics"]


# -- sources ----------------------------------------------------------------------------------------------------------


def exported(place, folder):
    """What `pixlat export` writes of the first run."""
    assert prepare.main(["export", f"from={place}/first", f"to={folder}", "licence=MIT"]) == 0
    return folder


def samples_of(*arguments):
    sample.work(["device=cpu", "n=6", "class=class1,0", "as=npz", *arguments])
    to = next(Path(word.removeprefix("to=")) for word in arguments if word.startswith("to="))
    with np.load(to / "samples.npz") as archive:
        return archive["arr_0"]


def test_an_export_gives_the_runs_images(place, tmp_path):
    exported(place, tmp_path / "given")
    images = samples_of(f"run={tmp_path}/given", f"to={tmp_path}/out")
    assert np.array_equal(images, expected(place, np.resize([1, 0], 6)))
    facts = json.loads((tmp_path / "out/samples.json").read_text())["source"]
    assert facts["kind"] == "export" and facts["checkpoint"]["sha256"] == sha256_of(
        tmp_path / "given/model.safetensors"
    )
    assert facts["checkpoint"]["ema_kind"] == "0.9"
    with pytest.raises(UserError, match="is an export, which holds one set of weights"):
        samples_of(f"run={tmp_path}/given", f"to={tmp_path}/out", "average=0.9")


def test_a_released_file_is_sampled_with_method_and_preset(place, tmp_path, monkeypatch):
    settings = {
        "data.name": "folder",
        "data.path": place / "data",
        "data.image_size": 8,
        **{f"model.{key}": value for key, value in MODEL.items()},
    }
    raw = load_run(place / "first", {}, "raw", CPU)
    torch.save({f"net.{name}": value for name, value in raw.method.state_dict().items()}, tmp_path / "released.pth")
    monkeypatch.setattr(
        JiTMethod,
        "from_reference",
        lambda _, state: {name.removeprefix("net."): value for name, value in state.items()},
    )
    given = [f"{key}={value}" for key, value in settings.items()]
    same = ("sample.steps=2", "sample.guidance=1.5")
    shared = (f"checkpoint={tmp_path}/released.pth", "method=jit", "preset=demo", f"to={tmp_path}/out", *given, *same)
    assert np.array_equal(samples_of(*shared), expected(place, np.resize([1, 0], 6), average="raw"))


class Hub(BaseHTTPRequestHandler):
    """One repository, me/model, as huggingface.co serves it: every file with its commit and digest in the head."""

    folder: Path
    commit = "0123456789" * 4

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        content = self.answer()
        self.wfile.write(content)

    def answer(self):
        owner, name, _, revision, file = self.path.strip("/").split("/", 4)
        known = (owner, name) == ("me", "model") and revision in ("main", "v1", self.commit)
        path = self.folder / file
        content = path.read_bytes() if known and path.is_file() else b""
        self.send_response(200 if content else 404)
        if not content:
            self.send_header(
                "X-Error-Code", "EntryNotFound" if known else "RepoNotFound" if name != "model" else "RevisionNotFound"
            )
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{len(content)}-{file}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def log_message(self, *_):
        pass


@pytest.fixture
def _small_hub(place, tmp_path, monkeypatch):
    """A hub on the loopback address that has the export of the first run."""
    import huggingface_hub

    Hub.folder = exported(place, tmp_path / "given")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint, cache, download = (
        f"http://127.0.0.1:{server.server_port}",
        tmp_path / "cache",
        huggingface_hub.hf_hub_download,
    )
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: download(*a, **k, endpoint=endpoint, cache_dir=cache)
    )
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.usefixtures("_small_hub")
def test_a_name_on_the_hub_is_fetched_with_its_revision_recorded(place, tmp_path, monkeypatch):
    images = samples_of("run=hf:me/model@v1", f"to={tmp_path}/out")
    assert np.array_equal(images, expected(place, np.resize([1, 0], 6)))
    facts = json.loads((tmp_path / "out/samples.json").read_text())
    assert facts["source"]["hub"] == f"hf:me/model@{Hub.commit}" and facts["request"]["revision"] == Hub.commit
    assert facts["source"]["name"] == "me/model" and facts["images"]["classes"] == {"0": "class0", "1": "class1"}
    for name, message in (
        ("hf:me/nothing", "no such repository"), ("hf:me/model@v7", "no such revision"),
        ("hf:model", "Write hf:owner/name"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            samples_of(f"run={name}", f"to={tmp_path}/none")
    (tmp_path / "given/data.json").unlink()
    (tmp_path / "given/config.yaml").unlink()
    Hub.commit = "9" * 40
    with pytest.raises(UserError, match=r"has no config.yaml, so it is not what `pixlat export` writes"):
        samples_of("run=hf:me/model@main", f"to={tmp_path}/none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"hf download me/other config.yaml data.json --revision v2"):
        samples_of("run=hf:me/other@v2", f"to={tmp_path}/none")
    # from the cache, offline
    assert hub.fetch(f"hf:me/model@{'0123456789' * 4}", ("config.yaml",)).revision == "0123456789" * 4


def test_a_method_that_only_rebuilds_images_is_refused(place, tmp_path):
    config = resolve(get_spec("vae"), {"data.name": "synthetic"})
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.yaml").write_text(to_yaml(config))
    with pytest.raises(UserError, match="which rebuilds images and makes none of its own"):
        sample.work([f"run={tmp_path}/vae", f"to={tmp_path}/out", "device=cpu"])
    assert not (tmp_path / "out").exists()


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to=x"], "exactly one of run= and checkpoint="),
        (["run=a", "checkpoint=b", "to=x"], "exactly one of"),
        (["run=a"], "to= is missing"),
        (["run=a", "to=x", "n=0"], "n=0: must be at least 1"),
        (["run=a", "to=x", "seed=-1"], "seed=-1: must be at least 0"),
        (["run=a", "to=x", "sede=1"], "unknown key 'sede'. Did you mean 'seed'"),
        (["run=a", "to=x", "ema=raw"], "ema= is called average= here"),
        (["run=a", "to=x", "as=pgn"], "'pgn' is not a kind of file. Did you mean 'png'"),
        (["run=a", "to=x", "precision=half"], "precision='half' is not one of auto, bf16"),
        (["run=a", "to=x", "like=evalution"], "like='evalution' is not one of evaluation"),
        (["run=a", "to=x", "like=evaluation", "n=5"], "says how many images of which classes"),
        (["run=a", "to=x", "method=jit"], "method=jit is not read with run="),
        (["checkpoint=a", "to=x", "method=jit"], "needs method= and preset="),
        (["checkpoint=a", "to=x", "method=jit", "preset=demo", "average=raw"], "holds one set of weights"),
        (["checkpoint=nowhere.pth", "to=x", "method=jit", "preset=demo"], "there is no such file"),
        (["run=nowhere", "to=x"], "is not a run folder"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        sample.work(arguments)


def test_mistakes_about_a_run_are_named_before_torch_is_imported(place, tmp_path):
    (tmp_path / "list.txt").write_text("0\n1\n")
    cases = [
        (["class=clas1"], "no class 'clas1'. Did you mean 'class1'"),
        (["sample.guidence=2"], "unknown key 'sample.guidence'. Did you mean 'sample.guidance'"),
        (["sample.guidance=much"], "sample.guidance=much does not fit"),
        (["like=evaluation", "seed=4"], "the run was evaluated with 0"),
        (["class=list.txt", "n=5"], "lists the classes of 2 images"),
    ]
    steps = (
        "import sys",
        "from launch import sample",
        f"codes = [sample.main(['run={place}/first', 'to=out', *case]) for case in {[c for c, _ in cases]}]",
    )
    code = "; ".join((*steps, "assert set(codes) == {2}, codes", "assert 'torch' not in sys.modules"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for line, (_, message) in zip(ended.stderr.splitlines(), cases, strict=True):
        assert line.startswith("error: ") and message in line, line
    assert not (tmp_path / "out").exists()


def test_help_names_every_key(capsys):
    assert sample.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for key in ("class (", "as (", "like (", "average (", "uint8 (", "sample.*"):
        assert key in shown, key
