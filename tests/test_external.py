"""Weights made elsewhere: found in caches and given places, refused when damaged, never fetched;
what one run hands to another.
"""

import argparse
import hashlib
import os

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from pixlat.common.errors import UserError
from pixlat.common.weights import checkpoint
from pixlat.common.weights.checkpoint import Checkpoint
from pixlat.common.weights.hub import hub_checkpoint_file, hub_file, hub_files
from pixlat.common.weights.runs import run_weights
from pixlat.common.weights.tensors import load_strictly, read_tensors

WEIGHTS = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}


def same(found, expected=None):
    expected = WEIGHTS if expected is None else expected
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin", "w.ckpt"])
def test_reads_every_kind_of_file(tmp_path, name):
    (save_file if name.endswith("safetensors") else torch.save)(WEIGHTS, tmp_path / name)
    assert same(read_tensors(tmp_path / name))


def test_takes_the_average_of_a_training_checkpoint(tmp_path):
    raw = {key: value + 1 for key, value in WEIGHTS.items()}
    rest = {"args": argparse.Namespace(lr=1e-4), "opt": {"state": {}}, "steps": 3}
    torch.save({"model": raw, "ema": WEIGHTS, **rest}, tmp_path / "both.pt")
    torch.save({"model": raw, **rest}, tmp_path / "raw.pt")
    assert same(read_tensors(tmp_path / "both.pt"))
    assert same(read_tensors(tmp_path / "raw.pt"), raw)


def test_leaves_out_what_is_none(tmp_path):
    torch.save({"mean": None, "var": WEIGHTS["a"]}, tmp_path / "stat.pt")
    assert same(read_tensors(tmp_path / "stat.pt"), {"var": WEIGHTS["a"]})


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("malice",))


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut short"])
def test_refuses_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: not readable .*Download it again"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "listed"), [([1, 2], "list"), ({"x": 1}, "x"), ({"model": {"y": 1}, "step": 2}, "model, step")]
)
def test_refuses_what_holds_no_tensors(tmp_path, content, listed):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"no named tensors. It holds: {listed}\."):
        read_tensors(tmp_path / "w.pt")


def test_runs_no_code_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Malice()}, "w.pt")
    with pytest.raises(UserError, match="not readable"):
        read_tensors(tmp_path / "w.pt")
    assert not (tmp_path / "malice").exists()
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "none.pt")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hugging Face cache in the place of the user's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_hub(hub, repository, file, revision="0" * 40):
    """Lays a file out as huggingface_hub does, and returns its path."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    path = folder / "snapshots" / revision / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(file)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    return path


def test_finds_files_in_the_hugging_face_cache(hub):
    first, second = put_in_hub(hub, "org/net", "model.safetensors"), put_in_hub(hub, "org/net", "sub/config.json")
    assert hub_files("org/net", ["sub/config.json", "model.safetensors"]) == [second, first]
    assert hub_file("org/net") == first
    newer = put_in_hub(hub, "org/net", "pytorch_model.bin", revision="1" * 40)
    assert hub_file("org/net") == newer  # of the newest `main`, the best that it has


def test_a_missing_hub_file_says_what_to_get(hub):
    with pytest.raises(UserError) as caught:
        hub_files("org/net", ["model.safetensors"], key="model.weights", licence="MIT")
    message = str(caught.value)
    for part in (
        "model.safetensors of org/net",
        str(hub),
        "hf download org/net model.safetensors",
        "model.weights=",
        "Licence of the weights: MIT",
    ):
        assert part in message
    assert not hub.exists()  # nothing is written into a cache


def test_a_given_place_comes_before_the_cache(hub, tmp_path):
    put_in_hub(hub, "org/net", "model.safetensors")
    (tmp_path / "mine").mkdir()
    (mine := tmp_path / "mine" / "pytorch_model.bin").write_text("x")
    assert hub_file("org/net", given=str(mine.parent)) == mine
    assert hub_file("org/net", given=str(mine)) == mine
    with pytest.raises(
        UserError, match=r"pixlat needs config.json of org/net on Hugging Face, but the folder holds pytorch_model.bin"
    ):
        hub_files("org/net", ["config.json"], given=str(mine.parent))
    with pytest.raises(UserError, match=r"nowhere: pixlat needs .* there is no such file or folder"):
        hub_file("org/net", given=str(tmp_path / "nowhere"))


def test_checkpoint_files_of_the_torch_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = "https://example.org/net.pth"
    with pytest.raises(UserError, match=rf"net.pth is needed and not in torch's hub cache {tmp_path}.*curl -L .*{url}"):
        hub_checkpoint_file("net.pth", url)
    assert not list(tmp_path.iterdir())
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "net.pth").write_text("weights")
    assert hub_checkpoint_file("net.pth", url) == folder / "net.pth"
    assert hub_checkpoint_file("net.pth", url, given=str(folder)) == folder / "net.pth"


def test_the_digest_in_a_name_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    good = f"net-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    for name in (good, "net-00000000.pth"):
        (folder / name).write_text("weights")
    assert hub_checkpoint_file(good, "url").name == good
    with pytest.raises(UserError, match="does not begin with the 00000000 of its name"):
        hub_checkpoint_file("net-00000000.pth", "url")


def test_strict_loading_onto_meta_and_its_complaints():
    source = nn.Linear(3, 2)
    with torch.device("meta"):
        target = nn.Linear(3, 2).requires_grad_(False)
    load_strictly(target, {key: value.double() for key, value in source.state_dict().items()}, "file")
    assert (
        torch.equal(target.weight, source.weight)
        and target.weight.dtype == torch.float32
        and not target.weight.requires_grad
    )
    with pytest.raises(UserError) as caught:
        load_strictly(target, {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}, "some/file.pt")
    for part in (
        "some/file.pt does not fit Linear, 3 keys differ",
        "missing bias (2,)",
        "not known scale (1,)",
        "weight is (2, 4), expected (2, 3)",
    ):
        assert part in str(caught.value)


@pytest.fixture
def run_folder(tmp_path):
    """What a run leaves behind: two averages, of which one is what it was evaluated with."""
    train = {"ema_decay": [0.9, 0.99], "ema_halflife_images": [500.0]}
    OmegaConf.save({"method": "toy", "train": train, "eval": {"ema": None}}, tmp_path / "config.yaml")
    tensors = {"model": {"weight": torch.zeros(2), "buffer": torch.ones(1)}, "meters": {}}
    tensors |= {
        f"ema-{name}": {"weight": torch.full((2,), value)}
        for name, value in (("0.9", 1.0), ("0.99", 2.0), ("500img", 3.0))
    }
    for step in (1, 2):
        checkpoint.save(tmp_path / "checkpoints", step, Checkpoint(tensors, {"step": step}), keep=2)
        tensors["model"]["buffer"] = torch.full((1,), 7.0)
    return tmp_path


def test_run_weights_are_the_evaluated_average_over_the_raw_ones(run_folder):
    found = run_weights(run_folder)
    assert same(found.state, {"weight": torch.ones(2), "buffer": torch.full((1,), 7.0)})  # of the newest checkpoint
    assert found.config["method"] == "toy" and found.folder == run_folder
    assert found.sha256 == checkpoint.digest(run_folder / "checkpoints" / "step-00000002")
    assert [float(run_weights(run_folder, ema).state["weight"][0]) for ema in ("raw", "0.99", "500img")] == [0, 2, 3]


def test_run_weights_refuse_what_is_not_there(run_folder, tmp_path):
    with pytest.raises(UserError, match=r"no average '0.999'. Did you mean '0.99'.*0.9, 0.99, 500img, raw"):
        run_weights(run_folder, "0.999")
    for step in (1, 2):
        (run_folder / "checkpoints" / f"step-0000000{step}" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no intact checkpoint.*Finish that run"):
        run_weights(run_folder)
    with pytest.raises(UserError, match="not a run folder"):
        run_weights(tmp_path / "elsewhere")
