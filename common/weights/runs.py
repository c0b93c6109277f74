"""Loads the weights of a finished pixlat run, for a later stage."""

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
    """The weights and settings of a run that a later run uses."""

    state: dict[str, Tensor]  # the method's state dict, without its external networks
    config: dict[str, Any]  # the run's resolved configuration
    sha256: str  # of the checkpoint's manifest, as in records
    folder: Path
    facts: dict[str, Any]  # the checkpoint's trainer.json


def run_weights(folder: Path, ema: str | None = None) -> RunWeights:
    """Loads the weights of a run from its newest intact checkpoint. Reads no optimizer state.

    ema: the name of the average to load ("0.999", "500000img"), "raw" for the raw weights, None for the weights that
        the run was evaluated with.
    Raises UserError if config.yaml does not belong to the checkpoint.
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
    """The message for a run folder without an intact checkpoint, with advice."""
    fault = f"{folder} has no intact checkpoint under checkpoints/. "
    # To repeat the command would not help a finished run: it would say that the run is finished and do nothing.
    if (folder / "result.json").exists():
        return fault + (
            "The run is finished, so somebody damaged or removed its files afterwards: restore them from a copy, "
            "or remove the folder and run it again."
        )
    return fault + "Finish that run: the command that started it resumes it."
