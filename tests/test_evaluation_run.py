"""`pixlat evaluate`: a run, finished images and pairs of runs, from the command to the record."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluated_run import MODEL, Projections, image_folder, run_folder
from PIL import Image

from pixlat.common.config.schema import DataConfig
from pixlat.common.datasets.load import load_data
from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of
from pixlat.evaluation import run
from pixlat.evaluation.board.columns import IDENTITY
from pixlat.evaluation.board.entries import Entry
from pixlat.evaluation.features.reference_files import build, write_built
from pixlat.evaluation.protocols.named import PROTOCOLS
from pixlat.evaluation.records.record import SCHEMA_FILE, read_record
from pixlat.evaluation.score import assess
from pixlat.evaluation.score.embedded import evaluate_method
from pixlat.evaluation.score.generate import balanced_labels, generate
from pixlat.evaluation.score.models import load_released, load_run, saved_run
from pixlat.evaluation.score.outcome import SPACES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs with records, one without, and the data of all."""
    root = tmp_path_factory.mktemp("runs")
    data = image_folder(root / "data")
    for number, name in enumerate(("first", "second")):
        run_folder(root / name, data, seed=number)
    run_folder(root / "unfinished", data, record=False)
    return root


@pytest.fixture(autouse=True)
def _cheap_extractor(monkeypatch):
    monkeypatch.setattr("pixlat.evaluation.judges.panel.EmbeddedExtractor", Projections)


def records(folder):
    return [read_record(path) for path in sorted(folder.rglob("evaluations/*/result.json"))]


def samples(place, n=40):
    """Images of the first run, (n, 3, 8, 8) uint8."""
    model = load_run(place / "first", {}, None, torch.device("cpu"))
    labels = balanced_labels(n, 3, 0)
    return torch.cat([images for images, _ in generate(model.method, model.run.sample, labels, 0, 13, "cpu")])


# -- models ------------------------------------------------------------------------------------------------------------


def test_a_run_is_rebuilt_as_it_was(place):
    """The configuration comes back key by key, and the weights with the average over them."""
    raw, average = (load_run(place / "first", {}, ema, torch.device("cpu")) for ema in ("raw", None))
    assert raw.run == saved_run(place / "first", {}) and raw.run.model.width == 16 and raw.run.sample.steps == 2
    assert (
        average.checkpoint["ema_kind"] == "0.9"
        and average.checkpoint["ema_decay"] == 0.9
        and average.checkpoint["step"] == 7
    )
    for (name, p), (_, q) in zip(raw.method.named_parameters(), average.method.named_parameters(), strict=True):
        assert torch.equal(q, 0.5 * p if p.requires_grad else p), name
    assert not average.method.training
    changed = load_run(place / "first", {"sample.steps": "3"}, None, torch.device("cpu"))
    assert changed.run.sample.steps == 3
    with pytest.raises(UserError, match=r"unknown key 'sample.stepz'.* `pixlat train method=[a-z]+ --help all`"):
        load_run(place / "first", {"sample.stepz": "3"}, None, torch.device("cpu"))
    with pytest.raises(UserError, match=r"has no average '0.5'"):
        load_run(place / "first", {}, "0.5", torch.device("cpu"))
    with pytest.raises(UserError, match="is not a run folder"):
        load_run(place / "data", {}, None, torch.device("cpu"))


def test_a_released_file_is_loaded_by_its_methods_names(place, tmp_path, monkeypatch):
    """Authors' names go through `from_reference`; here they are ours with a prefix."""
    from pixlat.methods.jit.method import JiTMethod

    settings = {
        "data.name": "folder",
        "data.path": str(place / "data"),
        "data.image_size": "8",
        **{f"model.{key}": str(value) for key, value in MODEL.items()},
    }
    raw = load_run(place / "first", {}, "raw", torch.device("cpu"))
    file = tmp_path / "released.pth"
    torch.save({"ema": {f"net.{name}": value for name, value in raw.method.state_dict().items()}}, file)
    monkeypatch.setattr(
        JiTMethod,
        "from_reference",
        lambda self, state: {name.removeprefix("net."): value for name, value in state.items()},
    )
    released = load_released(file, "jit", "demo", settings, torch.device("cpu"))
    assert all(torch.equal(p, q) for p, q in zip(released.method.parameters(), raw.method.parameters(), strict=True))
    assert released.checkpoint["sha256"] == sha256_of(file) and released.name == "released" and released.record is None
    with pytest.raises(UserError, match="no such file"):
        load_released(tmp_path / "nowhere.pth", "jit", "demo", settings, torch.device("cpu"))


def test_the_command_measures_what_training_would_have(place):
    """The same numbers as evaluate_method, which launch/run.py calls, and a record with the run's own training."""
    shown = run.work([f"run={place}/first", "device=cpu"])
    model = load_run(place / "first", {}, None, torch.device("cpu"))
    expected = evaluate_method(model.method, model.run, assess.load_data(model.run.data), "cpu", place / ".references")
    (record,) = records(place / "first")
    assert record["metrics"] == expected.metrics and record["protocol"] == expected.protocol
    assert record["kind"] == "measured" and record["train"]["macs_total"] == 12345 and record["name"] == "first"
    assert record["code"]["git_sha"] == "abc"  # that trained
    assert record["scored_by"]["git_sha"] not in ("abc", "") and record["scored_by"]["package_versions"].keys() >= {
        "torch",
        "numpy",
        "scipy",
        "pillow",
    }
    assert record["sampling"]["steps"] == 2 and record["sampling"]["guidance_scale"] == 1.5
    assert record["params"]["gen_trainable"] == sum(p.numel() for p in model.method.parameters() if p.requires_grad)
    assert "fd" in shown and "result.json" in shown
    run.work([f"run={place}/first", "device=cpu", "sample.guidance=1", "ema=raw"])  # beside it, not over it
    assert {(r["checkpoint"]["ema_kind"], r["sampling"]["guidance"] == "none") for r in records(place / "first")} == {
        ("0.9", False),
        ("raw", True),
    }


def test_a_run_without_a_record_is_evaluated_all_the_same(place):
    run.work([f"run={place}/unfinished", "device=cpu", "seeds=[0,1]"])
    (record,) = records(place / "unfinished")
    assert record["kind"] == "evaluated" and "train" not in record and record["seeds"]["sample"] == [0, 1]
    fd = record["metrics"]["fd"]
    assert len(fd["values"]) == 2 and fd["value"] == pytest.approx(np.mean(fd["values"])) and fd["sd_seeds"] > 0


def test_two_runs_on_the_same_seeds(place):
    shown = run.work([f"run={place}/first", f"against={place}/second", "device=cpu", "seeds=[3]"])
    a, b = (next(r for r in records(place / name) if r["seeds"]["sample"] == [3]) for name in ("first", "second"))
    assert a["metrics"]["fd"]["value"] != b["metrics"]["fd"]["value"]
    difference = a["metrics"]["fd"]["value"] - b["metrics"]["fd"]["value"]
    assert f"{difference:+.5g}" in shown and "first minus second" in shown


# -- named protocols ---------------------------------------------------------------------------------------------------

TOY = replace(PROTOCOLS["clean"], name="toy", num_images=50_000)


@pytest.fixture
def toy_protocol(place, tmp_path, monkeypatch):
    """A named protocol whose extractor and reference are small; returns the reference's file."""

    class Toy(Projections):
        card, spatial_dims = TOY.extractor, 0

    monkeypatch.setitem(PROTOCOLS, "toy", TOY)
    monkeypatch.setattr(assess, "build_extractor", lambda card, file, device: Toy(device))
    monkeypatch.setattr(assess, "checked", lambda file, given: Path(given or tmp_path))
    real = torch.from_numpy(np.random.Generator(np.random.PCG64(5)).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8))
    reference = build(
        [(real, torch.arange(60))], 60, Toy(), {"id": "own", "digest": "d", "split": "train", "crop": "adm_center_crop"}
    )
    path = tmp_path / "own.safetensors"
    write_built(reference, path, Toy(), 8)
    return path


def test_finished_images_score_as_the_model_that_made_them(place, toy_protocol, tmp_path):
    """A run, a folder of PNG and an .npz of its samples: the same protocol where their labels and rounding are stated,
    and the same numbers.
    """
    images = samples(place)
    np.savez(tmp_path / "made.npz", images.permute(0, 2, 3, 1).numpy())
    (tmp_path / "made").mkdir()
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / "made" / f"{number:05d}.png")
    shared = ["protocol=toy", f"reference={toy_protocol}", f"out={tmp_path}/out", "device=cpu", "batch=11"]
    run.work([f"run={place}/first", "num_images=40", *shared])
    run.work([f"npz={tmp_path}/made.npz", "labels=balanced", "uint8=round", "precision=fp32", *shared])
    run.work([f"images={tmp_path}/made", *shared])
    (model,) = [r for r in records(place / "first") if r["protocol"].get("name") == "toy"]
    npz, folder = sorted(
        map(read_record, (tmp_path / "out").rglob("result.json")),
        key=lambda record: record["protocol"]["samples"]["label_law"],
    )
    assert (
        npz["protocol"] == model["protocol"]
        and npz["kind"] == "evaluated"
        and len(npz["artifacts"]["samples_npz_sha256"]) == 64
    )
    assert folder["protocol"]["samples"]["label_law"] == "unknown" and folder["protocol_hash"] != npz["protocol_hash"]
    for name, metric in model["metrics"].items():
        assert npz["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-9), name
        assert folder["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-9), name


def test_finished_images_are_of_an_unknown_space_unless_it_is_given(place, toy_protocol, tmp_path):
    """Nobody knows whether their maker denoised pixels, and a table of pixels against latents must not guess."""
    np.savez(tmp_path / "made.npz", samples(place).permute(0, 2, 3, 1).numpy())
    shared = [
        f"npz={tmp_path}/made.npz",
        "protocol=toy",
        f"reference={toy_protocol}",
        f"out={tmp_path}/out",
        "device=cpu",
    ]
    for extra in ([], ["method=rae", "space=latent_rae", "name=told"]):
        run.work([*shared, *extra])
    told, unknown = sorted(
        map(read_record, (tmp_path / "out").rglob("result.json")), key=lambda record: record["system"]["space"]
    )
    assert (told["system"]["method"], told["system"]["space"]) == ("rae", "latent_rae")
    assert (unknown["system"]["method"], unknown["system"]["space"]) == ("unknown", "unknown")
    assert [column.read(Entry((unknown,))).text for column in IDENTITY if column.key == "space"] == ["unknown"]
    schema = json.loads(SCHEMA_FILE.read_text())["properties"]["system"]["properties"]["space"]["enum"]
    assert tuple(schema) == SPACES


def test_precision_and_rounding_are_the_users_and_in_the_hash(place, toy_protocol, tmp_path):
    """The run's own settings hold unless the command sets others, and every combination is a protocol of its own."""
    shared = [f"run={place}/second", "protocol=toy", f"reference={toy_protocol}", "num_images=40", "device=cpu"]
    for changes in ([], ["precision=bf16"], ["uint8=truncate"], ["precision=tf32"]):
        run.work([*shared, *changes])
    found = {
        (r["protocol"]["samples"]["precision"], r["protocol"]["samples"]["uint8_rule"]): r
        for r in records(place / "second")
    }
    # a CPU has no TF32
    assert set(found) == {("float32", "round_half_even"), ("bfloat16", "round_half_even"), ("float32", "truncate")}
    assert len({record["protocol_hash"] for record in found.values()}) == 3
    for (precision, _), record in found.items():
        assert record["sampling"]["dtype"] == record["speed"]["dtype"] == precision
    scores = {key: record["metrics"]["fid"]["value"] for key, record in found.items()}
    assert len(set(scores.values())) == 3  # all three are computed, not only written down


def test_labels_are_drawn_as_the_protocol_says():
    balanced, random = (assess.draw_labels(law, 3000, 10, seed=0) for law in ("balanced", "random"))
    assert np.bincount(balanced).tolist() == [300] * 10
    assert 5 < np.std(np.bincount(random)) < 35 and random.dtype == np.int64


def test_images_without_a_protocol_are_told_what_they_are_compared_with(place, tmp_path, capsys, monkeypatch):
    """Before anything is computed; images that can hardly be meant for these data are told so, whoever made them."""
    own = [f"data.path={place}/data", "data=folder", "data.image_size=8"]
    shared = ["device=cpu", f"out={tmp_path}/out"]
    real = load_data(DataConfig(name="folder", path=str(place / "data"), image_size=8)).train
    np.savez(tmp_path / "real.npz", real.fetch(range(40)).transpose(0, 2, 3, 1))
    np.savez(tmp_path / "bright.npz", np.full((40, 8, 8, 3), 250, dtype=np.uint8))
    for name, warned in (("real", False), ("bright", True)):
        run.work([f"npz={tmp_path}/{name}.npz", *own, *shared])
        told = capsys.readouterr().err
        assert "comparing 40 images with the 72 training images of data (data=folder)" in told and "protocol=" in told
        assert ("warning: their mean brightness is 250" in told) == ("are they images of data?" in told) == warned
    monkeypatch.setattr(assess, "load_reals", lambda *_: pytest.fail("computed before it was told"))
    np.savez(tmp_path / "large.npz", np.zeros((30, 64, 64, 3), dtype=np.uint8))
    with pytest.raises(
        UserError,
        match=(
            r"64 px and those of emoji32 32 px. Without protocol=, .* data=emoji32: "
            r"your own real images are data=folder"
        ),
    ):
        run.work([f"npz={tmp_path}/large.npz", *shared])


def test_images_of_the_wrong_size_are_refused(place, toy_protocol, tmp_path):
    np.savez(tmp_path / "large.npz", np.zeros((30, 16, 16, 3), dtype=np.uint8))
    for arguments, message in (
        (["protocol=toy", f"reference={toy_protocol}"], "8 px, but the generated images have 16 px"),
        (["protocol=adm256"], "is for 256 px, but the images have 16 px"),
        (
            ["protocol=embedded", "data.name=folder", f"data.path={place}/data", "data.image_size=8"],
            "the images have 16 px and those of data 8 px",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run.work([f"npz={tmp_path}/large.npz", "device=cpu", f"out={tmp_path}", *arguments])
    (tmp_path / "mixed").mkdir()
    for number, size in enumerate([8] * 25 + [9]):
        Image.fromarray(np.zeros((size, size, 3), dtype=np.uint8)).save(tmp_path / "mixed" / f"{number:02d}.png")
    with pytest.raises(UserError, match=r"25.png has 9 x 9 pixels, the first image 8 x 8"):
        run.work(
            [f"images={tmp_path}/mixed", "protocol=toy", f"reference={toy_protocol}", "device=cpu", f"out={tmp_path}"]
        )


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "none of them"),
        (["run=a", "npz=b"], "run and npz"),
        (["checkpoint=a"], "needs method= and preset="),
        (["npz=a", "against=b"], "compares two runs"),
        (["npz=a", "sample.steps=3"], "sample.steps is a setting of a model"),
        (["npz=a", "protocol=adm265"], "Did you mean 'adm256'"),
        (["npz=a", "uint8=floor"], "round, truncate"),
        (["npz=a", "num_images=3"], "at least 20"),
        (["npz=a", "space=latent"], "space"),
        (["run=a", "space=pixel"], "is known of models"),
        (["run=a", "labels=random"], "labels of held-out images"),
        (["run=a", "protocol=adm256", "precision=half"], "auto, bf16, tf32, fp32"),
        (["npz=a", "precision=auto"], "Say which"),
        (["npz=a", "protocol=adm256", "data.path=b"], "compares with its own reference"),
        (["npz=a", "ema=0.9"], "ema=0.9 is not read with npz="),
        (["images=a", "seeds=[1,2]"], "seeds=.* is not read with images="),
        (["run=a", "preset=demo"], "preset=demo is not read with run="),
        (["run=a", "weights=b"], "weights=b is not read with protocol=embedded"),
        (["run=a", "protocol=rfid", "labels=random"], "labels=random is not read with protocol=rfid"),
        (["run=a", "seeds=[]"], "at least one"),
        (["run=a", "seeds=[1,1]"], "all different"),
        (["run=a", "sede=1"], "unknown key 'sede'"),
        (["run=a", "batch=many"], "^batch=many does not fit: it must be a whole number, for example 2.$"),
        (["run=a", "seeds=3"], r"^seeds=3 does not fit: it must be a list in brackets, for example \[0,1\].$"),
        (["npz=nowhere.npz"], "does not exist"),
        (["run=nowhere"], "is not a run folder"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        run.work([*arguments, "device=cpu"] if arguments else [])


def test_help_is_quick_and_imports_no_torch():
    for script in ("run", "sweep", "reference"):
        steps = (
            "import sys",
            "sys.argv = ['x', '--help']",
            "sys.path.insert(0, '.')",
            f"from pixlat.evaluation import {script} as s",
            "s.main()",
        )
        code = "; ".join((*steps, "assert 'torch' not in sys.modules"))
        shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0 and "protocol" in shown.stdout, shown.stderr
