"""The embedded data set: 5,106 emoji of 32x32 pixels in ten classes and three art styles.

The data card is common/data/README.md.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixlat.common.errors import UserError

IMAGE_SIZE = 32
HELD_OUT_SHARE = 0.2  # held-out share of every class; fixed, because the split is part of the data set
SHA256 = {
    "emoji32.webp": "1e6b76c1cf45760f295dd5d56f3e16d9de7d86956e2e1efd06cb2046d0b5b456",
    "emoji32.json": "e89c6e92338690b6e7d8f29ca6dc92335091e7f421c332d3518623557c48aa2b",
}

# Replaces man, woman, boy, girl, ... by the ungendered person of the same age or role. The data have no skin tones.
_NEUTRAL = {
    "1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2", "1f474": "1f9d3", "1f475": "1f9d3",
    "1f478": "1f934", "1fac5": "1f934", "1f936": "1f385",
}  # fmt: skip
_GENDER_AND_DIRECTION = {"2640", "2642", "27a1"}
# Different code points with (nearly) the same drawing: in some style their root mean square difference is below 0.035
# of the full range.
_SAME_DRAWING = {
    "1f46a": "1f9d1-1f9d2",  # family
    "1f491": "1f9d1-2764",  # couple with heart
    "1f48f": "1f9d1-2764-1f48b",  # kiss
    "1f46b": "1f9d1-1f91d", "1f46c": "1f9d1-1f91d", "1f46d": "1f9d1-1f91d",  # holding hands
    "1f431": "1f63a",  # cat faces
    "1f608": "1f47f",  # smiling and angry face with horns
    "1f4ac": "1f5e8", "1f4ad": "1f5e8", "1f5ef": "1f5e8",  # speech bubbles
    "1f7e1": "1f315",  # yellow circle, full moon
    "1f533": "25fc",  # black squares
    "26c4": "2603",  # snowmen
    "2721": "1f52f",  # six-pointed stars
}  # fmt: skip


@dataclass(frozen=True)
class Emoji32:
    """The decoded sheet and its index."""

    images: NDArray[np.uint8]  # (5106, 3, 32, 32)
    labels: NDArray[np.int64]  # (5106,)
    styles: NDArray[np.int64]  # (5106,) into style_names
    subgroups: NDArray[np.int64]  # (5106,) into subgroup_names
    codes: list[str]  # Unicode code points, hexadecimal, joined by "-"
    class_names: tuple[str, ...]
    style_names: tuple[str, ...]
    subgroup_names: tuple[str, ...]  # the 97 subgroups of Unicode's list, in alphabetical order

    @property
    def concepts(self) -> list[str]:
        """The concept of each image. The training part and the held-out part must not share a concept."""
        return [concept(code) for code in self.codes]


def concept(code: str) -> str:
    """The concept that an emoji shows: its code points without gender, direction, number of persons and synonyms.

    "1f468-200d-1f680" (man astronaut) -> "1f9d1-1f680";
    "1f3c3-200d-2640-200d-27a1" (woman running to the right) -> "1f3c3".
    """
    first, *rest = [_NEUTRAL.get(part, part) for part in code.split("-200d-")]
    parts = dict.fromkeys([first, *(part for part in rest if part not in _GENDER_AND_DIRECTION)])
    key = "-".join(parts)
    return _SAME_DRAWING.get(key, key)


def load_emoji32() -> Emoji32:
    """Decodes the sheet, in about 0.4 s. It is lossless, so every version of the decoder gives the same pixels."""
    index = json.loads(_read("emoji32.json"))
    with Image.open(io.BytesIO(_read("emoji32.webp"))) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    subgroup_names, subgroups = np.unique(index["sub"], return_inverse=True)
    tiles = pixels.reshape(-1, IMAGE_SIZE, index["cols"], IMAGE_SIZE, 3).transpose(0, 2, 4, 1, 3)
    return Emoji32(
        images=np.ascontiguousarray(tiles.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)[: index["n"]]),
        labels=np.array(index["labels"], dtype=np.int64),
        styles=np.array(index["source"], dtype=np.int64),
        subgroups=subgroups.astype(np.int64),
        codes=index["code"],
        class_names=tuple(index["classes"]),
        style_names=tuple(index["sources"]),
        subgroup_names=tuple(subgroup_names.tolist()),
    )


def _read(name: str) -> bytes:
    """Reads a file of the package and verifies its SHA-256.

    With a damaged or incomplete copy, results could not be compared with any others, and nobody would notice.
    """
    content = files("pixlat.common.data").joinpath(name).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[name]:
        raise UserError(
            f"common/data/{name} is damaged: its SHA-256 is {digest}, it should be {SHA256[name]}. "
            "Install the package again."
        )
    return content
