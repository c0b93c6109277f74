"""What a model was made with: earlier runs, networks that others trained, and settings. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pixlat.common.config.identity import config_entry
from pixlat.evaluation.records.parents import current_parents, earlier_runs, stage_digests
from pixlat.methods import get_spec

if TYPE_CHECKING:
    from pixlat.evaluation.score.models import Model
    from pixlat.methods.base import Description, Method


@dataclass(frozen=True)
class Origin:
    """What a model was made with."""

    parents: list[dict[str, Any]]  # its earlier runs, as in records
    config: dict[str, Any]  # its settings, as in records
    #: all networks and earlier runs that it has met: those of its training, and those that it samples with if the user
    #: has replaced an earlier stage
    met: tuple[list[dict[str, Any]], list[dict[str, Any]]]


def networks_used(method: Method, described: Description) -> list[dict[str, Any]]:
    """All networks of others that a method has, as in records, for `contact`.

    A description may leave out what its sampling settings do not use, or what its author forgot; the training used it.
    """
    left_out = [part for part in method.components() if part not in described.pretrained]
    return [asdict(part) for part in (*described.pretrained, *left_out)]


def origin_of(model: Model) -> Origin:
    """What a model was made with, from its record or export and from the folders of its earlier runs."""
    named, trained = model.named or model.run, model.record or model.lineage or {}
    components = networks_used(model.method, model.method.describe(model.run.sample))
    now = earlier_runs(model.run, model.run.model, verified=True)
    parents = current_parents(trained.get("parents", []), now)
    config = config_entry(named, get_spec(named.method), stage_digests(parents))
    components += [part for part in trained.get("pretrained_components", []) if part not in components]
    return Origin(parents, config, (components, parents + [entry for entry in now if entry not in parents]))
