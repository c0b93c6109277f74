"""pMF's flax archives: written here as flax and orbax write them (MessagePack, arrays as extensions),
opened without flax, imported to a run folder.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from test_import_export import SMALL, assert_same_images, built, imported
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.methods.base import DataInfo
from pixlat.methods.pmf.flax_archive import CHUNKED, read_archive
from pixlat.methods.pmf.reference import flax_layout, to_released

msgpack = pytest.importorskip("msgpack")


def packed(tree: Any) -> bytes:
    """As flax.serialization writes a state dict: an array is extension 1 of (shape, name of its type, bytes)."""

    def extension(value: Any) -> Any:
        assert isinstance(value, Tensor)
        raw = value.contiguous().view(torch.int16) if value.dtype == torch.bfloat16 else value.contiguous()
        return msgpack.ExtType(
            1, msgpack.packb((tuple(value.shape), str(value.dtype).removeprefix("torch."), raw.numpy().tobytes()))
        )

    return msgpack.packb(tree, default=extension, strict_types=True)


def archive(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in files.items():
            opened.writestr(name.replace("__", "/"), content)
    return path


def nested(flat: dict[str, Tensor]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, leaf = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = value
    return tree


def test_an_archive_becomes_a_run_folder(tmp_path, capsys):
    """The average that is asked for, of a full training state; the one set of weights of an archive for inference."""
    method = built("pmf", DataInfo("imagenet", 3, 16, 1), **{**SMALL, "head_depth": 1, "patch": 4, "bottleneck": 8})
    flat = flax_layout(to_released(method))
    tree, other = nested(flat), nested({name: 2 * value for name, value in flat.items()})
    state = {"step": 5, "params": other, "opt_state": {"0": {"mu": other}}, "ema_params": {"500": other, "2000": tree}}
    full = archive(
        tmp_path / "full.zip", checkpoint_5=packed({**state, "ema_params": {"500": tree}}), checkpoint_10=packed(state)
    )
    arguments = ("method=pmf", f"out={tmp_path}", "preset=imagenet256-b-mse")
    assert imported(*arguments, f"file={full}") == 2
    assert "weights= one of: 500, 2000, params" in capsys.readouterr().err
    assert imported(*arguments, f"file={full}", "weights=2000") == 0
    assert_same_images(tmp_path / "full", method)
    assert json.loads((tmp_path / "full" / "imported.json").read_text())["weights"] == "2000"
    alone = archive(tmp_path / "alone.zip", pMF__checkpoint_3__checkpoint=packed(tree))  # as orbax names its file
    assert imported(*arguments, f"file={alone}") == 0
    assert_same_images(tmp_path / "alone", method)


def test_types_and_arrays_in_pieces(tmp_path):
    values = torch.arange(24.0)
    pieces = {CHUNKED: True, "shape": {"0": 4, "1": 6}, "chunks": {"0": values[:10], "1": values[10:]}}
    read = read_archive(
        archive(
            tmp_path / "a.zip",
            checkpoint_1=packed({"a": {"b": pieces}, "h": values.bfloat16(), "n": torch.tensor([3])}),
        )
    )
    assert torch.equal(read["a"]["b"], values.reshape(4, 6))
    assert torch.equal(read["h"], values.bfloat16()) and read["h"].dtype == torch.bfloat16
    assert read["n"].tolist() == [3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("checkpoint_1", b"\xc1\x00", "not readable as a flax checkpoint"),
        ("checkpoint_1", packed({"params": {"a": "PLACEHOLDER://params.a"}}), "in files of their own"),
        ("checkpoint_1", packed([1]), "holds a list"),
        ("weights.pkl", b"", "no file in it is called checkpoint"),
    ],
)
def test_other_archives_are_explained(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read_archive(archive(tmp_path / "a.zip", **{name: content}))


def test_a_damaged_archive_is_explained(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="not readable as a zip archive"):
        read_archive(tmp_path / "a.zip")
