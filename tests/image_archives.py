"""The same small images as a folder, as tars and as tables."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SYNSETS = ("n01440764", "n01530575", "n02123045")


def photo(number: int, kind: str = "jpeg") -> bytes:
    """An encoded image of its own size and colours."""
    rng = np.random.Generator(np.random.PCG64(number))
    pixels = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((30 + number, 24), Image.Resampling.BICUBIC).save(stream, format=kind)
    return stream.getvalue()


Entry = tuple[str, str, bytes]  # synset, name, content


def entries(per_class: int = 4, start: int = 0) -> list[Entry]:
    """Images of three classes."""
    return [
        (synset, f"{synset}_{number:04d}.JPEG", photo(start + per_class * c + number))
        for c, synset in enumerate(SYNSETS)
        for number in range(per_class)
    ]


def write_folder(root: Path, images: list[Entry]) -> Path:
    for synset, name, content in images:
        (root / synset).mkdir(parents=True, exist_ok=True)
        (root / synset / name).write_bytes(content)
    return root


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def webdataset(file: Path, images: list[Entry]) -> Path:
    """As the released ImageNet shards are: 000.jpg, 000.cls, 000.json."""
    members = {}
    for number, (synset, _, content) in enumerate(images):
        label = str(SYNSETS.index(synset)).encode()
        members |= {f"{number:03d}.jpg": content, f"{number:03d}.cls": label, f"{number:03d}.json": b"{}"}
    return write_tar(file, members)


def table(images: list[Entry], names: tuple[str, ...] | None = SYNSETS):
    """As `datasets` writes it: a struct of bytes and path, a class number, class names in the metadata."""
    import pyarrow as pa

    column = pa.array(
        [{"bytes": content, "path": name} for _, name, content in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    found = pa.table(
        {"image": column, "label": pa.array([SYNSETS.index(synset) for synset, _, _ in images], pa.int64())}
    )
    features = {"image": {"_type": "Image"}, "label": {"names": list(names or ()), "_type": "ClassLabel"}}
    return (
        found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}) if names else found
    )


def write_parquet(file: Path, images: list[Entry], rows: int = 3, names: tuple[str, ...] | None = SYNSETS) -> Path:
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table(images, names), file, row_group_size=rows)
    return file


def write_arrow(file: Path, images: list[Entry], stream: bool = True) -> Path:
    import pyarrow as pa

    file.parent.mkdir(parents=True, exist_ok=True)
    found = table(images)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(file), found.schema) as writer:
        writer.write_table(found, max_chunksize=2)
    return file
