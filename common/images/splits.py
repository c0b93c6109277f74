"""Chooses held-out images by hashes of names, and draws fixed samples. Both are the same on every machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pixlat.common.seeds import derive


def held_out(groups: Sequence[str], labels: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """Mask (N,) of the held-out images: about `fraction` of every class, without splitting a group.

    A group (all drawings of one concept, or one file) belongs to the class of its first image. This goes through the
    groups of a class in the order of their hashes, and holds out each group that does not exceed what is left of the
    quota. The quota is at least the smallest group. A class with only one group stays in training.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    groups_of: dict[int, list[str]] = defaultdict(list)
    for group, indices in members.items():
        groups_of[int(labels[indices[0]])].append(group)

    mask = np.zeros(len(labels), dtype=bool)
    for own_groups in groups_of.values():
        for group in _within_quota(own_groups, {group: len(members[group]) for group in own_groups}, fraction):
            mask[members[group]] = True
    return mask


def fixed_draw(available: int, wanted: int) -> NDArray[np.int64]:
    """A fixed random draw of at most `wanted` positions from 0 to `available` - 1, sorted.

    The first `wanted` positions would not do: stored images are sorted by class, so they would show a few classes only.
    """
    rng = np.random.Generator(np.random.PCG64(derive("reconstruction sample")))
    return np.sort(rng.permutation(available)[:wanted])


def _within_quota(groups: list[str], sizes: dict[str, int], fraction: float) -> list[str]:
    """The groups of one class that are held out."""
    if fraction <= 0 or len(groups) < 2:
        return []
    room = max(round(fraction * sum(sizes.values())), min(sizes.values()))
    chosen = []
    for group in sorted(groups, key=lambda name: derive("held-out", name)):
        if sizes[group] <= room:
            chosen.append(group)
            room -= sizes[group]
    return chosen
