"""Named protocols: what moves a number is in the hash, the files they need,
and statistics read from files that others made.
"""

import copy
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonschema_rs import Draft202012Validator
from PIL import Image
from records import embedded_protocol

from pixlat.common.config.schema import DataConfig
from pixlat.common.datasets.load import load_data
from pixlat.common.errors import UserError
from pixlat.common.images.splits import fixed_draw
from pixlat.evaluation import reference
from pixlat.evaluation.features import samples as samples_module
from pixlat.evaluation.features.arrays import NpzImages, describe_arrays, read_floats
from pixlat.evaluation.features.extractor import Features
from pixlat.evaluation.features.reference_files import build, read_built, read_reference, write_built
from pixlat.evaluation.features.samples import drawn_images
from pixlat.evaluation.judges.panel import panel
from pixlat.evaluation.protocols.identity import judged_protocol, metric_hash, protocol_hash, protocol_name
from pixlat.evaluation.protocols.named import INCEPTION, PROTOCOLS, SampleRule, describe, get_protocol
from pixlat.evaluation.protocols.needed_files import NeededFile, checked, find, verify
from pixlat.evaluation.records.record import SCHEMA_FILE, read_record

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = {
    "id": "adm-imagenet256",
    "stats_sha256": "cd" * 32,
    "split": "train",
    "n_images": 1_281_167,
    "crop": "adm_center_crop",
}
SAMPLES = SampleRule(50_000, "random", "round_half_even")


def described(name="adm256", weights="ab" * 32, given=REFERENCE, n_features=10_000, resolution=256, samples=SAMPLES):
    return describe(PROTOCOLS[name], weights, given, n_features, resolution, samples)


# -- identity ----------------------------------------------------------------------------------------------------------


EXTRACTOR = SimpleNamespace(
    id="embedded-v1", sha256="ab" * 32, layer="pooled", resize="128", scaling="(x-127)/128", dims=320,
    comparable_with_inception_fid=False, resize_digest=None,
)  # fmt: skip
JUDGE = SimpleNamespace(extractor=EXTRACTOR, ranks=True, labels_of=None)


def judged(*judges, train="t", heldout="h", n=1000, law="heldout", **more):
    return judged_protocol(judges or (JUDGE,), "toy", train, heldout, 4089, 32, n, law, **more)


def test_the_embedded_protocol_keeps_its_hash():
    assert protocol_hash(embedded_protocol(EXTRACTOR, "toy", "t", None, 45990, 32, 50000)) == "50a78f5d7a8f"
    assert protocol_hash(judged()) == "68c7cffa121f"


def test_everything_that_moves_a_judged_number_is_in_the_hash():
    other = SimpleNamespace(extractor=EXTRACTOR, ranks=False, labels_of="toy")
    variants = [
        judged(), judged(JUDGE, other), judged(other), judged(train="u"), judged(heldout=None), judged(n=999),
        judged(law="balanced"), judged(uint8_rule="truncate"), judged(precision="tf32"), judged(decoding="0" * 12),
    ]  # fmt: skip
    assert len({protocol_hash(variant) for variant in variants}) == len(variants)
    first, second = judged(), judged()
    second["estimator"]["memory"]["copy_quantile"] = 0.1
    assert metric_hash(first, "fd_ratio") == metric_hash(second, "fd_ratio")
    assert metric_hash(first, "copies") != metric_hash(second, "copies")


def test_everything_that_moves_a_number_is_in_the_hash():
    card = replace(INCEPTION, resize="another resize")
    variants = [
        described(),
        described(weights="ef" * 32),
        described(given={**REFERENCE, "stats_sha256": "ef" * 32}),
        described(resolution=512),
        described(n_features=5000),
        described(samples=replace(SAMPLES, n=10_000)),
        described(samples=replace(SAMPLES, label_law="balanced")),
        described(samples=replace(SAMPLES, uint8_rule="truncate")),
        described(samples=replace(SAMPLES, container="lossy")),
        described(samples=replace(SAMPLES, container="lossy", decoding="0123456789ab")),
        described(samples=replace(SAMPLES, precision="float32")),
        described(samples=replace(SAMPLES, precision="bfloat16")),
        described(given={**REFERENCE, "decoding": "0123456789ab"}),
        describe(PROTOCOLS["clean"], "ab" * 32, REFERENCE, 10_000, 256, SAMPLES, resize_digest="0123456789ab"),
        describe(replace(PROTOCOLS["adm256"], extractor=card), "ab" * 32, REFERENCE, 10_000, 256, SAMPLES),
        *(described(name) for name in ("jit256", "pmf256", "clean", "fd_dinov2")),
    ]
    assert len({protocol_hash(variant) for variant in variants}) == len(variants)
    for path in (
        ("estimator", "is", "splits"),
        ("estimator", "prdc", "k_precision"),
        ("estimator", "kid", "seed"),
        ("estimator", "mind", "projections"),
    ):
        changed = copy.deepcopy(variants[0])
        target = changed
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] += 1
        assert protocol_hash(changed) != protocol_hash(variants[0]), path
    reordered = dict(reversed(variants[0].items()))
    assert protocol_hash(reordered) == protocol_hash(variants[0])


def test_names_are_not_in_the_hash():
    """Two laboratories with the same bytes under other names share a table: of folders, of built references,
    of the protocol itself.
    """
    ours, theirs = (described(given={**REFERENCE, "id": name}) for name in ("imagenet", "ILSVRC2012"))
    assert (
        ours != theirs
        and protocol_hash(ours) == protocol_hash(theirs)
        and metric_hash(ours, "fid") == metric_hash(theirs, "fid")
    )
    assert protocol_hash({**ours, "name": "mine"}) == protocol_hash(ours)


def test_the_committed_records_say_what_a_run_of_today_would():
    source = load_data(DataConfig())
    judges = panel(source.info, [], "cpu")
    for path in sorted((ROOT / "evaluation/results").glob("*.json")):
        kept = read_record(path)["protocol"]
        if "judges" not in kept:
            continue
        sizes = (len(source.train), 32, kept["samples"]["n"])
        digests = (source.train.digest, source.heldout.digest)
        assert judged_protocol(judges, "emoji32", *digests, *sizes, "heldout") == kept, path


def test_a_metrics_own_hash_forgets_other_estimators():
    first, second = described(), described()
    second["estimator"]["prdc"]["k_precision"] = 5
    assert metric_hash(first, "kid") == metric_hash(second, "kid")
    assert metric_hash(first, "fid") == metric_hash(second, "fid")
    assert metric_hash(first, "recall") != metric_hash(second, "recall")
    assert metric_hash(first, "fid") != metric_hash(described(weights="ef" * 32), "fid")
    renamed = {**first, "name": "other"}
    assert metric_hash(first, "fid") == metric_hash(renamed, "fid") != metric_hash(first, "sfid")


def test_protocols_fit_the_schema_and_have_names():
    schema = Draft202012Validator({"$ref": "#/$defs/protocol", "$defs": json.loads(SCHEMA_FILE.read_text())["$defs"]})
    for name, protocol in PROTOCOLS.items():
        if protocol.reference is not None:
            schema.validate(described(name))
    assert protocol_name(described()).startswith("adm256: inception-2015/adm-imagenet256/n=50000/random#")
    assert described("jit256")["extractor"]["comparable_with_inception_fid"]
    assert not described("clean")["extractor"]["comparable_with_inception_fid"]
    with pytest.raises(UserError, match="Did you mean 'adm256'"):
        get_protocol("adm265")


# -- needed files ------------------------------------------------------------------------------------------------------


def test_files_are_found_by_name_and_checked(tmp_path, monkeypatch):
    content = b"weights"
    file = NeededFile(
        "weights", ("a.pth", "b.pth"), "https://example.org/a.pth", len(content), hashlib.sha256(content).hexdigest()
    )
    chosen, cache = tmp_path / "chosen", tmp_path / "torch"
    (cache / "hub" / "checkpoints").mkdir(parents=True)
    chosen.mkdir()
    monkeypatch.setenv("PIXLAT_EVAL_DIR", str(chosen))
    monkeypatch.setenv("TORCH_HOME", str(cache))
    with pytest.raises(
        UserError, match=r"needs a\.pth \(https://example\.org/a\.pth, 7 bytes\).*weights=.*pixlat does not download it"
    ):
        find(file)
    (cache / "hub" / "checkpoints" / "b.pth").write_bytes(content)
    assert checked(file).name == "b.pth"
    (chosen / "a.pth").write_bytes(b"weighty")
    with pytest.raises(UserError, match="has sha256"):
        checked(file)
    assert not verify([file], {})[1]
    assert verify([file], {"weights": str(cache / "hub" / "checkpoints" / "b.pth")}) == (
        [f"weights   ok     {cache}/hub/checkpoints/b.pth: sha256 {file.sha256}, as expected"],
        True,
    )
    (chosen / "a.pth").write_bytes(b"short")
    with pytest.raises(UserError, match="has 5 bytes and not 7"):
        checked(file)
    with pytest.raises(UserError, match="does not exist"):
        checked(file, str(tmp_path / "nowhere.pth"))


def command(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "evaluation" / "reference.py", *arguments], capture_output=True, text=True
    )


def test_fetch_plan_names_every_file_and_imports_no_torch():
    steps = (
        "import sys",
        "sys.argv = ['x', 'fetch-plan']",
        "sys.path.insert(0, '.')",
        "from pixlat.evaluation import reference",
        "reference.main()",
    )
    code = "; ".join((*steps, "assert 'torch' not in sys.modules"))
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for name, protocol in PROTOCOLS.items():
        assert f"{name}: " in shown.stdout
        assert all(
            file.names[0] in shown.stdout and (file.sha256 or "not known") in shown.stdout for file in protocol.files
        )


def test_commands_refuse_mistakes(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for arguments, message in (
        (["fetch-pla"], "Did you mean 'fetch-plan'"),
        (["verify"], "give protocol="),
        (["verify", "protocol=jit256"], "jit_in256_stats.npz"),
        (["verify", "protocol=jit256", "weigths=x"], "Did you mean 'weights'"),
        (["build", "protocol=clean", "images=x", "size=big", "id=a", "out=a.safetensors"], "size=big does not fit"),
        (["build", "protocol=clean", "images=x", "size=8", "id=a"], "build needs out="),
        (
            ["build", "protocol=clean", f"images={tmp_path}", "size=8", "id=a", f"out={tmp_path}/a.safetensors"],
            "holds 0 image files",
        ),
    ):
        with pytest.raises(UserError, match=message):
            reference.work(arguments)
    assert command("verify", "protocol=jit256").returncode == 2


# -- arrays ------------------------------------------------------------------------------------------------------------


def pixels(n=30, size=8, seed=0):
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples_stream_from_an_npz(tmp_path, monkeypatch, save):
    from pixlat.evaluation.features import arrays

    images = pixels()
    save(tmp_path / "samples.npz", images)
    samples = NpzImages(tmp_path / "samples.npz")
    assert (len(samples), samples.resolution) == (30, 8)
    parts = [part for batch, indices in samples.batches(7) for part in [(batch, indices)]]
    assert torch.equal(torch.cat([batch for batch, _ in parts]), torch.from_numpy(images).permute(0, 3, 1, 2))
    assert torch.cat([indices for _, indices in parts]).tolist() == list(range(30))
    seen = []
    for rank in range(3):
        monkeypatch.setattr(arrays, "rank_and_size", lambda rank=rank: (rank, 3))
        for batch, indices in samples.batches(4):
            assert torch.equal(batch, torch.from_numpy(images).permute(0, 3, 1, 2)[indices])
            seen += indices.tolist()
    assert sorted(seen) == list(range(30))


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_few_of_many_images_are_of_all_classes_and_no_other_is_read(tmp_path, monkeypatch, kind):
    """Images sorted by class, whose brightness is their number: of the first 20,
    all would be of the first of five classes.
    """
    images = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "samples.npz", images)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number:03d}.png")
    opened = []
    monkeypatch.setattr(
        samples_module, "read_pixels", lambda path, read=samples_module.read_pixels: opened.append(path) or read(path)
    )
    samples = NpzImages(tmp_path / "samples.npz") if kind == "npz" else samples_module.FolderSamples(tmp_path)
    opened.clear()
    drawn = fixed_draw(100, 20)
    for module in ("arrays", "collect"):
        monkeypatch.setattr(f"pixlat.evaluation.features.{module}.rank_and_size", lambda: (0, 1))
    for shuffled in (False, True):
        parts = list(drawn_images(samples, 20, 7, shuffled))
        numbers = torch.cat([batch[:, 0, 0, 0] for batch, _ in parts])[
            torch.cat([indices for _, indices in parts]).argsort()
        ]
        assert sorted(numbers.tolist()) == drawn.tolist() and set(drawn // 20) == {0, 1, 2, 3, 4}
        assert (numbers.tolist() == drawn.tolist()) is not shuffled
        if shuffled:
            assert len(set((numbers[:8] // 20).tolist())) > 2  # the first ones of them as well
    assert kind == "npz" or sorted({int(path.stem) for path in opened}) == drawn.tolist()
    shares = []
    for rank in range(3):
        for module in ("arrays", "collect"):
            monkeypatch.setattr(f"pixlat.evaluation.features.{module}.rank_and_size", lambda rank=rank: (rank, 3))
        shares += [index for _, indices in drawn_images(samples, 20, 7) for index in indices.tolist()]
    assert sorted(shares) == list(range(20))


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def truncated(path):
    """A whole directory of the archive whose last array lost its end."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, pixels())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-100])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: npz(path, samples=pixels()), "no array 'arr_0'. It holds: samples"),
        (lambda path: npz(path, arr_0=pixels() / 255), "is float64"),
        (lambda path: npz(path, arr_0=pixels().transpose(0, 3, 1, 2)), "number, height, width, 3"),
        (lambda path: npz(path, arr_0=pixels()[:, :4]), "square"),
        (lambda path: npz(path, arr_0=pixels()[:0]), "is uint8 .0, 8"),
        (lambda path: npz(path, arr_0=np.array([{"a": 1}], dtype=object)), "Python objects"),
        (lambda path: npz(path, arr_0=np.asfortranarray(pixels())), "column by column"),
        (lambda path: path.write_bytes(b"PK no archive") and path, "cannot be read as .npz"),
        (truncated, "ends early: 100 bytes are missing"),
    ],
)
def test_wrong_sample_files_are_refused(tmp_path, make, message):
    path = make(tmp_path / "samples.npz")
    with pytest.raises(UserError, match=message):
        list(NpzImages(path).batches())


def test_wrong_statistics_are_refused(tmp_path):
    good = np.arange(4.0)
    path = npz(
        tmp_path / "stats.npz", mu=good, half=good.astype(np.float32), bad=np.array([1.0, np.nan]), whole=np.arange(4)
    )
    assert read_floats(path, "half", (4,)).dtype == np.float64
    for key, shape, message in (
        ("mu", (5,), "but it must be floating point"),
        ("whole", (4,), "is int64"),
        ("bad", (2,), "1 values that are NaN"),
        ("sigma", (4,), "no array"),
    ):
        with pytest.raises(UserError, match=message):
            read_floats(path, key, shape)


# -- references --------------------------------------------------------------------------------------------------------


class Projections:
    """A stand-in for Inception: 6 numbers of an 8 x 8 image, 3 of them as logits, 5 more as its map."""

    id, sha256, layer, resize, scaling, dims, spatial_dims, num_classes = (
        "linear",
        "0" * 64,
        "projections",
        "none",
        "x/255",
        6,
        5,
        3,
    )
    resize_digest = None
    comparable_with_inception_fid, device = False, torch.device("cpu")

    def __call__(self, images):
        weights = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).normal(size=(192, 11))).float()
        found = images.flatten(1).float() / 255 @ weights
        return Features(found[:, :6], found[:, :3], found[:, 6:])


def statistics(features):
    x = features.double().numpy()
    return x.mean(0), np.cov(x.T)


def test_adm_jit_and_pmf_files_are_read(tmp_path):
    images = pixels(60)
    found = Projections()(torch.from_numpy(images).permute(0, 3, 1, 2))
    (mu, sigma), (mu_s, sigma_s) = statistics(found.pooled), statistics(found.spatial)
    files = {
        "adm256": npz(tmp_path / "adm.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s),
        "jit256": npz(tmp_path / "jit.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32)),
        "pmf256": npz(tmp_path / "pmf.npz", ref_mu=mu, ref_sigma=sigma),
    }
    for name, path in files.items():
        read = read_reference(PROTOCOLS[name].reference, path, Projections(), 256, tmp_path)
        assert torch.allclose(read.pooled.mean, torch.from_numpy(mu), rtol=1e-6) and torch.allclose(
            read.pooled.cov, torch.from_numpy(sigma), rtol=1e-5
        )
        assert read.pooled.n == 1_281_167 and len(read.entry["stats_sha256"]) == 64
        assert (read.features is not None) == (read.spatial is not None) == (name == "adm256")
    adm = read_reference(PROTOCOLS["adm256"].reference, files["adm256"], Projections(), 256, tmp_path)
    assert torch.allclose(adm.features, found.pooled, rtol=1e-6) and torch.allclose(
        adm.spatial.cov, torch.from_numpy(sigma_s)
    )
    assert [describe_arrays(path)[-1].split(" (")[0] for path in files.values()] == [
        "looks like ADM's reference",
        "looks like JiT's or MAR's statistics",
        "looks like pMF's statistics",
    ]
    npz(tmp_path / "odd.npz", mu=mu, sigma=np.triu(sigma))
    with pytest.raises(UserError, match="no covariance"):
        read_reference(PROTOCOLS["jit256"].reference, tmp_path / "odd.npz", Projections(), 256, tmp_path)


def test_a_built_reference_comes_back_and_fits_nothing_else(tmp_path):
    images = torch.from_numpy(pixels(40)).permute(0, 3, 1, 2)
    extractor, path = Projections(), tmp_path / "own.safetensors"
    made = build(
        [(images, torch.arange(40))],
        40,
        extractor,
        {"id": "own", "digest": "d", "split": "train", "crop": "adm_center_crop"},
    )
    write_built(made, path, extractor, 8)
    read = read_built(path, extractor, 8)
    assert (
        torch.equal(read.pooled.cov, made.pooled.cov)
        and torch.equal(read.spatial.mean, made.spatial.mean)
        and torch.equal(read.features, made.features)
    )
    assert read.entry == made.entry and read.entry["n_images"] == 40
    assert torch.allclose(read.pooled.cov, torch.cov(extractor(images).pooled.double().T))
    with pytest.raises(UserError, match="8 px, but the generated images have 16"):
        read_built(path, extractor, 16)
    extractor.sha256 = "1" * 64
    with pytest.raises(UserError, match="was built with the extractor"):
        read_built(path, extractor, 8)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_built(path, Projections(), 8)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a reference"):
        read_built(path, Projections(), 8)


def test_build_takes_any_folder_of_images(tmp_path, monkeypatch):
    from pixlat.evaluation.features import networks as extractors

    for number, image in enumerate(pixels(25, 20)):
        (tmp_path / f"class{number % 3}").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"class{number % 3}" / f"{number}.png")
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"x")
    monkeypatch.setattr(extractors, "build_extractor", lambda card, file, device: Projections())
    monkeypatch.setattr(reference, "checked", lambda file, given: weights)
    out = tmp_path / "own.safetensors"
    arguments = ["build", "protocol=clean", f"images={tmp_path}", "size=8", "id=mine", f"out={out}"]
    assert "25 images of 8 px" in reference.work(arguments)
    entry = read_built(out, Projections(), 8).entry
    assert (entry["id"], entry["n_images"], entry["split"]) == ("mine", 25, "train")
    with pytest.raises(UserError, match="would be overwritten"):
        reference.work(arguments)
    assert "resolution: 8" in reference.work(["show", str(out)])
