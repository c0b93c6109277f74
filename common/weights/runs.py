"""The weights of a finished run of this suite, for a later stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pixlat.common.config.resolve import ema_names
from pixlat.common.config.saved import check_config, read_config
from pixlat.common.config.schema import TrainConfig
from pixlat.common.errors import UserError, close_match
from pixlat.common.weights import checkpoint
from pixlat.common.weights.tensors import listed


@dataclass(frozen=True)
class RunWeights:
    """What one run hands to another."""

    state: dict[str, Tensor]  # of the method, without its external networks
    config: dict[str, Any]  # the run's resolved configuration
    sha256: str  # of the checkpoint's manifest, as in records
    folder: Path
    facts: dict[str, Any]  # what the checkpoint says of itself


def run_weights(folder: Path, ema: str | None = None) -> RunWeights:
    """The newest whole checkpoint of a run folder, with an average in the place of the raw weights that it follows.

    Nothing else of it is read.

    ema: the average's name ("0.999", "500000img"), "raw" for none, None for the one that the run was evaluated with.
    A config.yaml that is not the one of the checkpoint is a UserError.
    """
    config = read_config(folder)
    averages = ema_names(
        TrainConfig(ema_decay=config["train"]["ema_decay"], ema_halflife_images=config["train"]["ema_halflife_images"])
    )
    name = ema or config["eval"]["ema"] or next(iter(averages), "raw")
    path = checkpoint.latest(folder / "checkpoints", stems=("model", f"ema-{name}"))
    if path is None:
        raise UserError(no_checkpoint(folder))
    facts = checkpoint.load_facts(path)
    check_config(folder, config, path, facts)
    if name != "raw" and name not in checkpoint.averages(path):
        raise UserError(
            f"{path} has no average {name!r}.{close_match(name, averages)} It has: {listed([*averages, 'raw'])}."
        )
    state = checkpoint.load_weights(path, None if name == "raw" else name)
    return RunWeights(state, config, checkpoint.digest(path), folder, facts)


def no_checkpoint(folder: Path) -> str:
    """What to do about a run folder without a whole checkpoint, as a sentence."""
    fault = f"{folder} has no whole checkpoint under checkpoints/. "
    # the run is finished, and the command that started it would say so and do nothing
    if (folder / "result.json").exists():
        return fault + (
            "The run is finished, so its files were damaged or removed afterwards: restore them from a copy, "
            "or remove the folder and run it again."
        )
    return fault + "Finish that run: the command that started it resumes it."
