"""Where the weights come from: a run folder, an export, the name of an export on the hub, or a released file.

`find_run` and `find_released` read only small text files, so that a wrong class or setting is named before any weights
are read. `load` reads the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixlat.common.config.identity import identity_of
from pixlat.common.config.resolve import resolve
from pixlat.common.config.saved import CONFIG, read_config
from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.common.weights.fetch import HubFolder, fetch, is_hub_name
from pixlat.evaluation.score.models import saved_settings
from pixlat.launch.job.folder import DATA, WEIGHTS, read_data
from pixlat.methods import get_spec

if TYPE_CHECKING:
    import torch

    from pixlat.evaluation.score.models import Model

RUN, EXPORT, RELEASED = "run", "export", "released"
ADVICE = (
    "`pixlat sample --help` lists the keys of the command, `pixlat train method=NAME --help` "
    "those of sample, model and data."
)
TRAINING_ONLY: Mapping[str, str] = {"data.latents": "null"}  # stored latents are of no use to a sampler


@dataclass(frozen=True)
class Source:
    """A model that was found and is not loaded yet."""

    kind: str  # run, export or released
    path: Path
    run: RunConfig  # its configuration, with the command's settings in it
    settings: Mapping[str, str]  # the command's
    config_identity: str  # of the configuration as it was saved, without the command's settings
    class_names: tuple[str, ...]  # empty if they are not known
    num_classes: int
    image_size: int  # pixels
    hub: HubFolder | None = None

    @property
    def name(self) -> str:
        """For people."""
        if self.hub:
            return self.hub.repository
        return self.path.stem if self.kind == RELEASED else self.path.name


def find_run(place: str, settings: Mapping[str, str]) -> Source:
    """A run folder or an export, given by its folder or by its name on the hub; anything else is a UserError."""
    hub = fetch(place, (CONFIG,), optional=(DATA,)) if is_hub_name(place) else None
    folder = hub.folder if hub else Path(place).expanduser()
    saved = read_config(folder)
    exported = hub is not None or ((folder / WEIGHTS).is_file() and not (folder / "checkpoints").is_dir())
    run = resolve(get_spec(saved["method"]), {**saved_settings(folder), **TRAINING_ONLY, **settings}, ADVICE)
    names, num_classes, image_size = _from_file(folder) or _from_data(run)
    kind = EXPORT if exported else RUN
    return Source(kind, folder, run, dict(settings), identity_of(saved), names, num_classes, image_size, hub)


def find_released(file: Path, method: str, preset: str, settings: Mapping[str, str]) -> Source:
    """A file of a method's authors. The preset and the settings say which network it belongs to."""
    if not file.is_file():
        raise UserError(f"checkpoint={file}: there is no such file.")
    run = resolve(get_spec(method), {**settings, "preset": preset}, ADVICE)
    names, num_classes, image_size = _from_data(run)
    return Source(RELEASED, file, run, dict(settings), "released", names, num_classes, image_size)


def _from_file(folder: Path) -> tuple[tuple[str, ...], int, int] | None:
    """(names of the classes, their number, pixels) from data.json; None if it is missing or does not say it."""
    facts = read_data(folder)
    names, num_classes, image_size = (facts.get(key) for key in ("class_names", "num_classes", "image_size"))
    if not names or num_classes != len(names) or not isinstance(image_size, int):
        return None
    return tuple(map(str, names)), len(names), image_size


def _from_data(run: RunConfig) -> tuple[tuple[str, ...], int, int]:
    """The same from the data set. If it is not on this computer, the names are empty."""
    from pixlat.common.datasets.load import summarise

    info = summarise(run.data)
    return info.class_names, info.num_classes, info.image_size


def load(source: Source, average: str | None, device: torch.device) -> Model:
    """The model with its weights on a device.

    average: the name of one of a run's averages, or "raw"; None: the average that the run is evaluated with.
    """
    from pixlat.evaluation.score.models import load_released, load_run

    if source.kind == RUN:
        return load_run(source.path, source.settings, average, device)
    if source.kind == RELEASED:
        return load_released(source.path, source.run.method, source.run.preset, source.settings, device)
    return _load_export(source, device)


def _load_export(source: Source, device: torch.device) -> Model:
    from pixlat.common.files import sha256_of
    from pixlat.common.precision import executed_precision
    from pixlat.evaluation.score.models import Model
    from pixlat.launch.released import exported_lineage, from_export

    if source.hub:
        fetch(source.hub.pinned, (WEIGHTS,))
    run, method, found = from_export(get_spec(source.run.method), source.path, {**TRAINING_ONLY, **source.settings})
    checkpoint: dict[str, Any] = {
        "sha256": sha256_of(source.path / WEIGHTS),
        "step": None,
        "ema_decay": found.ema_decay,
        "ema_kind": found.weights,
    }
    dtype = executed_precision(run.eval.precision, device)
    lineage = exported_lineage(source.path / WEIGHTS)
    return Model(method.to(device).eval(), run, method.data, source.name, checkpoint, None, dtype, lineage=lineage)


def stage_digests(source: Source, model: Model) -> dict[str, str]:
    """The checkpoints of earlier runs that the model samples with, such as its decoder, by their key of `model`."""
    from pixlat.evaluation.records.parents import earlier_runs

    return {entry["key"]: entry["checkpoint_sha256"] for entry in earlier_runs(source.run, model.run.model)}
