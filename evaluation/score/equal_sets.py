"""Sets of real and generated images with equal numbers of images of each class.

A Fréchet distance depends on the number of images, so a distance can only be compared with what real images reach if
both sets are alike. Generated images therefore get the labels of held-out images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pixlat.common.seeds import derive

MAX_DRAWS = 8  # sets of real images over which a floor is a mean


def stratified_order(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) positions in a fixed random order, in which every first part has nearly the class shares of the whole.

    The images of a class with k images get the places (i + u) / k of the interval [0, 1), with a random u in [0, 1)
    each.
    """
    rng = np.random.Generator(np.random.PCG64(derive("stratified order")))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + rng.random(len(members))) / len(members)
    return np.argsort(place, kind="stable")


def heldout_labels(labels: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """(n,) labels for generated images: those of the held-out images with labels (N,), in `stratified_order`.

    After N labels they begin again, so n may exceed N.
    """
    return labels[stratified_order(labels)][np.arange(n) % len(labels)]


def heldout_draws(labels: NDArray[np.int64], n: int) -> list[NDArray[np.int64]]:
    """Disjoint sets of n positions, at most MAX_DRAWS, or one set with all positions if there are no more than n.

    The first set has the labels of `heldout_labels(labels, n)`.
    """
    order = stratified_order(labels)
    count = max(1, min(len(labels) // n, MAX_DRAWS))
    return [order[draw * n : (draw + 1) * n] for draw in range(count)]


def training_draws(labels: NDArray[np.int64], wanted: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Disjoint sets of positions, at most MAX_DRAWS, in which each class has as many images as in `wanted`.

    labels: (M,) of the training images. If the data have fewer images of some class than wanted, there is one set with
    all of them.
    """
    order = stratified_order(labels)
    members = {label: order[labels[order] == label] for label in np.unique(wanted)}
    counts = {label: int((wanted == label).sum()) for label in members}
    draws = max(1, min(MAX_DRAWS, *(len(members[label]) // counts[label] for label in members)))
    return [
        np.concatenate([members[label][draw * counts[label] : (draw + 1) * counts[label]] for label in members])
        for draw in range(draws)
    ]
