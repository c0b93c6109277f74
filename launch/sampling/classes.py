"""Which classes are sampled: from the words of `class=` to one label for each image. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pixlat.common.errors import UserError, close_match
from pixlat.common.files import read_text

BALANCED, RANDOM, HELDOUT, IN_TURN, LISTED = "balanced", "random", "heldout", "in turn", "listed"
LAWS = (BALANCED, RANDOM)  # the words that draw labels from all classes
SCORED_LAWS = (*LAWS, HELDOUT)  # how the labels of evaluations are chosen
LIST_SUFFIX = ".txt"
MAX_LIST_BYTES = 2**28
MAX_SHOWN = 20  # classes that a message lists


@dataclass(frozen=True)
class Classes:
    """How the images get their labels.

    law: balanced (all classes equally often, in random order), random (the class of each image is drawn on its own),
        heldout (`numbers` are the labels of held-out images, as an evaluation takes them),
        in turn (image i shows class i modulo their number of `numbers`), or listed (`numbers` are the labels).
    """

    law: str
    numbers: tuple[int, ...] = ()

    def labels(self, n: int, num_classes: int, seed: int) -> NDArray[np.int64]:
        """(n,) labels. The laws draw the same labels as an evaluation with this seed and this number of images."""
        if self.law in LAWS:
            from pixlat.evaluation.score.generate import draw_labels

            return draw_labels(self.law, n, num_classes, seed)
        return np.resize(np.array(self.numbers, dtype=np.int64), n)


def read_classes(asked: str, names: Sequence[str], num_classes: int) -> Classes:
    """What `class=` asks for. An unknown class and a list that cannot be read are UserErrors.

    asked: balanced, random, classes with commas between them, or a file NAME.txt that has a class on each line.
        A class is a name or a number from 0. If a word is both, it is taken as the name.
    names: of the classes; empty if they are not known.
    """
    if asked in LAWS:
        return Classes(asked)
    places = {name: number for number, name in enumerate(names)}
    if asked.endswith(LIST_SUFFIX):
        return Classes(LISTED, _read_list(Path(asked).expanduser(), places, num_classes))
    words = [word.strip() for word in asked.strip("[]").split(",")]
    if law := next((word for word in words if word in LAWS), None):
        raise UserError(
            f"class={asked}: {law} takes all classes, so it stands alone. Give class={law}, or only classes."
        )
    return Classes(IN_TURN, tuple(_number(word, places, num_classes, f"class={asked}") for word in words))


def _read_list(file: Path, places: Mapping[str, int], num_classes: int) -> tuple[int, ...]:
    """The numbers of the classes on the lines of a file; empty lines are left out."""
    if not file.is_file():
        raise UserError(
            f"class={file}: there is no such file. A list of classes is a file {LIST_SUFFIX} with a class a line."
        )
    lines = [line.strip() for line in read_text(file, MAX_LIST_BYTES).splitlines()]
    if not any(lines):
        raise UserError(f"class={file} is empty. Write a class name or number on each line, one for each image.")
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line]
    return tuple(_number(line, places, num_classes, f"{file}, line {number}") for number, line in filled)


def _number(word: str, places: Mapping[str, int], num_classes: int, where: str) -> int:
    """The number of a class that is given by name or number; `where` begins the message of the UserError."""
    if word in places:
        return places[word]
    if word.isascii() and word.isdigit() and int(word) < num_classes:
        return int(word)
    if not word:
        raise UserError(f"{where}: a class is missing before, between or after the commas.")
    fault = f"{where}: there is no class {word!r}.{close_match(word, places)} Numbers go from 0 to {num_classes - 1}"
    if not places:
        raise UserError(
            f"{fault}. Names cannot be used: neither a data.json beside the weights nor the data set gives them."
        )
    raise UserError(f"{fault}, names are: {listed(list(places))}.")


def listed(names: Sequence[str]) -> str:
    """The names with commas, at most MAX_SHOWN of them."""
    more = f" and {len(names) - MAX_SHOWN:,} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more


def described(classes: Classes, names: Sequence[str], num_classes: int) -> str:
    """For people: "10 classes, balanced", "vehicle, flag in turn" or "3 classes, as listed"."""
    if classes.law in LAWS:
        return f"{num_classes} classes, {classes.law}"
    if classes.law == HELDOUT:
        return f"{num_classes} classes, as often as among the held-out images"
    if classes.law == LISTED:
        return f"{len(set(classes.numbers))} classes, as listed"
    shown = listed([class_name(number, names) for number in classes.numbers])
    return shown if len(classes.numbers) == 1 else f"{shown} in turn"


def class_name(number: int, names: Sequence[str]) -> str:
    """The name of a class, or "class 7" if the names are not known."""
    return names[number] if names else f"class {number}"
