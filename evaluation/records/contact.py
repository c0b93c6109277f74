"""Finds which judges a row has met: a network that took part in making a model judges that model too kindly.

A judge is met if the SHA-256 of its weights is that of a network that the row used: as encoder, teacher, tokenizer or
in a loss, itself or in one of the earlier runs that its weights come from. Records hold these digests
(`pretrained_components` and `parents`). Methods declare the networks (`Method.external`); nobody writes them by hand.

What digests cannot show:
- A file that other people released (Stable Diffusion's autoencoder, an encoder) may have met a judge in its own
  training. It counts as contact only if the file is the judge itself.
- The same network in another file format, or another network of the same family, has another digest.
- Images of unknown origin, a network without a digest, and an earlier run without a record: contact is then not
  known, which is None here and an absent field in the record. It is never reported as "no contact".

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]
BETWEEN = " > "  # between the names of earlier runs, the nearest first


def contact_of(components: Sequence[Entry], parents: Sequence[Entry], judges: Sequence[Entry]) -> list[Entry] | None:
    """The judges that a row has met, as the record's `contact`; None if that is not known.

    components, parents: `pretrained_components` and `parents` of the record. judges: each with "id" and "sha256".
    """
    if not is_traceable(components, parents):
        return None
    names: dict[str, list[str]] = {}
    for judge in judges:
        names.setdefault(judge["sha256"], []).append(judge["id"])
    found = [
        {"judge": name, "role": role, "component": component, "used_at": used_at, "via": via}
        for sha256, role, component, used_at, via in _networks(components, parents)
        for name in names.get(sha256 or "", [])
    ]
    return [entry for place, entry in enumerate(found) if entry not in found[:place]]


def is_traceable(components: Sequence[Entry], parents: Sequence[Entry]) -> bool:
    """Whether every network has a digest and every earlier run, also of earlier runs, names its networks."""
    return all(part["sha256"] for part in components) and all(
        "pretrained_components" in parent
        and is_traceable(parent["pretrained_components"], parent.get("parents", []))
        for parent in parents
    )  # fmt: skip


Network = tuple[str | None, str, str, str, str | None]  # digest, role, name, used at, via


def _networks(components: Sequence[Entry], parents: Sequence[Entry], via: tuple[str, ...] = ()) -> Iterator[Network]:
    """Every network behind a row: its own, its earlier runs' weights, and theirs in turn."""
    path = BETWEEN.join(via) or None
    for part in components:
        yield part["sha256"], part["role"], part["name"], part["used_at"], path
    for parent in parents:
        yield parent["checkpoint_sha256"], parent["key"], parent["name"], "both", path
        own = parent.get("pretrained_components", [])
        yield from _networks(own, parent.get("parents", []), (*via, parent["name"]))


def judges_of(protocol: Mapping[str, Any] | None) -> list[Entry]:
    """The judges of a protocol, each with "id" and "sha256"; none where nothing was evaluated."""
    if protocol is None:
        return []
    return list(protocol["judges"]) if "judges" in protocol else [protocol["extractor"]]


def contact_fields(
    components: Sequence[Entry], parents: Sequence[Entry], protocol: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The record's field `contact`; empty if nothing was evaluated, or if the contact is not known."""
    met = contact_of(components, parents, judges_of(protocol)) if protocol else None
    return {} if met is None else {"contact": met}
