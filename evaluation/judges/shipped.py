"""The judges that the package contains: ids, files, digests, and how to load one.

No method may use them in any role: they rank methods because they have met none. tests/test_judges.py holds that.
Importing this module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pixlat.common.errors import UserError, close_match
from pixlat.common.files import sha256_of

if TYPE_CHECKING:
    import torch

    from pixlat.evaluation.judges.extractor import JudgeExtractor

FOLDER = Path(__file__).resolve().parent / "data"


@dataclass(frozen=True)
class ShippedJudge:
    """The weights of a judge. Its card, with recipe, accuracies and validation, is the .json file beside it."""

    file: Path
    sha256: str
    title: str

    @property
    def card(self) -> Path:
        return self.file.with_suffix(".json")


JUDGES: dict[str, ShippedJudge] = {
    name: ShippedJudge(FOLDER / f"{name}.safetensors", sha256, title)
    for name, sha256, title in (
        (
            "emoji32-plain-v1",
            "4cdb279bfa19bee7ebc582e7a3da029b2bf957bc8c206cf98154372f1b4afa2d",
            "plain CNN with 5x5 kernels",
        ),
        (
            "emoji32-residual-v1",
            "178e24141444e9f412a680cc8c879edbc3dd531a3bb5ad844eb5c8d7b8296b61",
            "residual CNN with 3x3 kernels",
        ),
        (
            "emoji32-vit-v1",
            "78b223b611c100e823b9d8e7ac0c2eb4bab721e551bedad405c5555b4ee815cf",
            "small vision transformer",
        ),
    )
}


def load_judge(name: str, device: torch.device | str = "cpu") -> JudgeExtractor:
    """The extractor of a shipped judge. UserError for an unknown name, and for a missing or damaged file."""
    if name not in JUDGES:
        raise UserError(f"{name!r} is not a judge.{close_match(name, JUDGES)} Judges: {', '.join(JUDGES)}.")
    judge = JUDGES[name]
    return load_file(name, judge.file, judge.sha256, device)


def load_file(name: str, file: Path, sha256: str, device: torch.device | str = "cpu") -> JudgeExtractor:
    """The extractor of a judge whose weights are in a file with this digest; UserError for any other file."""
    if not file.is_file():
        raise UserError(f"{file} is missing: the weights of the judge {name}. Install the package again.")
    if (digest := sha256_of(file)) != sha256:
        raise UserError(
            f"{file} is damaged: its SHA-256 is {digest}, it should be {sha256}. Install the package again."
        )
    from pixlat.common.weights.tensors import load_strictly, read_tensors
    from pixlat.evaluation.judges.extractor import JudgeExtractor
    from pixlat.evaluation.judges.networks import build

    network = build(name)
    load_strictly(network, read_tensors(file), file)
    return JudgeExtractor(name, sha256, network, device)
