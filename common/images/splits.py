"""Which images are held out, decided by hashes of names, and which few images stand for all:
both are the same on every machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pixlat.common.seeds import derive


def held_out(groups: Sequence[str], labels: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """Mask (N,) of the held-out images: about `fraction` of every class, groups kept whole.

    A group (all drawings of one concept, or one file) goes with the label of its first image.
    In the order of their hashes the groups of a class are held out as long as the quota of the class,
    at least one image, is not exceeded; a class of a single group stays in training.
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
    """At most `wanted` of the positions 0 to `available` - 1, sorted: a fixed random draw, because stored images are
    sorted by class and the first ones are of a few classes only. A draw of all positions is all of them in their order.
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
