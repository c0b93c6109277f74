"""The number of embedded-v2: ratios to real images, the larger of two, memorisation, and means over judges."""

import math

import numpy as np
import pytest
import torch

from pixlat.evaluation.features.extractor import Features
from pixlat.evaluation.features.feature_sets import FeatureSet, class_weights, jackknife_groups
from pixlat.evaluation.features.moments import Moments
from pixlat.evaluation.judges.panel import Judge
from pixlat.evaluation.metrics.frechet import factorise, frechet_distance, frechet_distance_few
from pixlat.evaluation.metrics.kid import KernelReference
from pixlat.evaluation.metrics.neighbours import Distances, copies, memorisation, nearest_distances
from pixlat.evaluation.score.equal_sets import heldout_draws, heldout_labels, stratified_order, training_draws
from pixlat.evaluation.score.headline import headline, mean, over_judges
from pixlat.evaluation.score.judged import ImageFeatures, Reals, judge_metrics, real_metrics

DIMS, CLASSES = 6, 4
COUNTS = (90, 60, 30, 20)  # images of each class among the held-out images


class NoExtractor:
    """The identity of a judge whose features the tests make themselves."""

    id, sha256, dims, num_classes = "toy", "0" * 64, DIMS, CLASSES

    def __call__(self, images: torch.Tensor) -> Features:
        raise AssertionError("no images are extracted here")


def real_images(counts=COUNTS, times: int = 1, seed: int = 0):
    """Features (n, D) and labels of images of each class, in the order of their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(counts) * times)
    centres = 3 * torch.randn(CLASSES, DIMS, generator=torch.Generator().manual_seed(7))
    return centres[labels] + torch.randn(len(labels), DIMS, generator=generator), labels


def as_set(features: torch.Tensor, labels: torch.Tensor) -> FeatureSet:
    moments = Moments.zeros(DIMS)
    moments.add(features, torch.arange(len(features)), class_weights(labels))
    return FeatureSet(moments, features, labels, torch.nn.functional.one_hot(labels, CLASSES).float())


def as_images(features: torch.Tensor, labels: torch.Tensor) -> ImageFeatures:
    return ImageFeatures(features, torch.nn.functional.one_hot(labels, CLASSES).float(), labels)


@pytest.fixture(scope="module")
def parts():
    return as_set(*real_images(times=4)), as_set(*real_images(seed=1))


def reals_of(parts, n: int = sum(COUNTS)) -> Reals:
    return Reals(Judge(NoExtractor(), ranks=True, labels_of="toy"), *parts, n)


@pytest.fixture(scope="module")
def reals(parts) -> Reals:
    return reals_of(parts)


def like_heldout(reals: Reals, seed: int, shift: float = 0.0) -> ImageFeatures:
    """New images of the same distribution with the labels of an evaluation, moved by `shift`."""
    labels = torch.from_numpy(heldout_labels(reals.heldout.labels.numpy(), reals.block))
    pool, pool_labels = real_images(seed=seed)
    taken = {label: iter(np.flatnonzero(pool_labels == label)) for label in range(CLASSES)}
    chosen = torch.tensor([int(next(taken[int(label)])) for label in labels])
    return as_images(pool[chosen] + shift, labels)


# -- equal sets --------------------------------------------------------------------------------------------------------


def test_every_first_part_of_the_order_has_nearly_the_class_shares_of_the_whole():
    labels = np.repeat(np.arange(CLASSES), COUNTS)
    order = stratified_order(labels)
    assert sorted(order) == list(range(len(labels)))
    for n in (20, 50, 111):
        found = np.bincount(labels[order[:n]], minlength=CLASSES)
        assert np.abs(found - n * np.array(COUNTS) / sum(COUNTS)).max() <= 2
    assert np.array_equal(order, stratified_order(labels))


def test_classes_are_not_tied_to_jackknife_groups():
    labels = np.repeat(np.arange(10), 100)
    order = labels[stratified_order(labels)]
    per_group = [len(np.unique(order[g::20])) for g in range(20)]
    assert min(per_group) >= 8


def test_labels_begin_again_after_the_last_held_out_image():
    labels = np.repeat(np.arange(CLASSES), COUNTS)
    long = heldout_labels(labels, 2 * len(labels) + 3)
    assert np.array_equal(long[: len(labels)], long[len(labels) : 2 * len(labels)])
    assert np.array_equal(np.bincount(long[: len(labels)]), COUNTS)


def test_draws_are_disjoint_and_have_the_wanted_classes():
    labels = np.repeat(np.arange(CLASSES), COUNTS)
    sets = heldout_draws(labels, 60)
    assert len(sets) == 3 and len(np.unique(np.concatenate(sets))) == 180
    assert np.array_equal(labels[sets[0]], heldout_labels(labels, 60))
    training = np.repeat(np.arange(CLASSES), [4 * count for count in COUNTS])
    drawn = training_draws(training, labels)
    assert len(drawn) == 4 and len(np.unique(np.concatenate(drawn))) == len(training)
    assert all(np.array_equal(np.bincount(training[draw]), COUNTS) for draw in drawn)


def test_with_too_few_training_images_there_is_one_set_of_all():
    (drawn,) = training_draws(np.array([0, 0, 1]), np.array([0, 0, 0, 1]))
    assert sorted(drawn) == [0, 1, 2]


# -- single metrics ----------------------------------------------------------------------------------------------------


def test_the_weighted_distance_of_few_images_is_that_of_their_moments():
    features, labels = real_images(counts=(1, 1, 2, 1))
    weights, target = class_weights(labels), factorise(as_set(*real_images(seed=3)).moments.total())
    moments = Moments.zeros(DIMS)
    moments.add(features, torch.arange(len(features)), weights)
    expected = frechet_distance(moments.total(), target)
    assert frechet_distance_few(features, target, weights) == pytest.approx(expected, rel=1e-9)


def test_the_plugin_kernel_distance_is_the_squared_distance_of_mean_embeddings():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 3, generator=generator).double(), torch.randn(40, 3, generator=generator).double()
    v, w = torch.rand(30, generator=generator).double(), torch.rand(40, generator=generator).double()
    joint, signs = torch.cat((x, y)), torch.cat((v / v.sum(), -w / w.sum()))
    kernel = (joint @ joint.T / 3 + 1) ** 3
    value, left_out = KernelReference(y, w).statistic(x, v, torch.arange(30) % 5, plugin=True)
    assert value == pytest.approx(float(signs @ kernel @ signs), rel=1e-10)
    kept = torch.arange(30) % 5 != 2
    again, _ = KernelReference(y, w).statistic(x[kept], v[kept], torch.zeros(24, dtype=torch.int64), plugin=True)
    assert left_out[2] == pytest.approx(again, rel=1e-10)


def test_the_unbiased_kernel_distance_with_weights_by_hand():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(7, 2, generator=generator).double(), torch.randn(9, 2, generator=generator).double()
    v, w = torch.rand(7, generator=generator).double(), torch.rand(9, generator=generator).double()

    def mean_pair(a, b, s, t, same):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        weights = [float(s[i] * t[j]) for i, j in pairs]
        values = [float(a[i] @ b[j] / 2 + 1) ** 3 for i, j in pairs]
        return sum(p * q for p, q in zip(weights, values, strict=True)) / sum(weights)

    expected = mean_pair(x, x, v, v, True) + mean_pair(y, y, w, w, True) - 2 * mean_pair(x, y, v, w, False)
    value, _ = KernelReference(y, w).statistic(x, v, torch.zeros(7, dtype=torch.int64), plugin=False)
    assert value == pytest.approx(expected, rel=1e-10)


def test_nearest_distances_are_those_of_a_brute_search():
    x, y = torch.randn(50, 5) + 100, torch.randn(70, 5) + 100
    assert torch.allclose(nearest_distances(x, y), torch.cdist(x.double(), y.double()).min(1).values, atol=1e-6)


def test_memorisation_and_copies_of_known_distances():
    heldout = Distances(torch.linspace(1, 3, 201, dtype=torch.float64), None)
    zeros = Distances(torch.zeros(100, dtype=torch.float64), None)
    assert memorisation(zeros, heldout).estimate.value == 0
    assert copies(zeros, heldout).estimate.value == 1
    assert memorisation(heldout, heldout).estimate.value == 1
    assert copies(heldout, heldout).estimate.value == pytest.approx(0.05, abs=0.006)
    mixed = torch.cat((zeros.values, heldout.values[:100] + 1))[torch.randperm(200, generator=torch.manual_seed(0))]
    found = copies(Distances(mixed, None), heldout)
    assert found.estimate.value == pytest.approx(0.5)
    assert found.estimate.se == pytest.approx((0.5 * 0.5 / 200) ** 0.5, rel=0.5)


def test_classes_weigh_alike_in_distances():
    values, labels = torch.tensor([1.0, 1, 1, 5], dtype=torch.float64), torch.tensor([0, 0, 0, 1])
    assert Distances(values, labels).mean() == 3
    assert Distances(values, labels).share_below(1) == 0.5


def test_jackknife_groups_share_every_class():
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(COUNTS))[torch.randperm(sum(COUNTS))]
    groups = jackknife_groups(labels, len(labels))
    for label, count in enumerate(COUNTS):
        sizes = torch.bincount(groups[labels == label], minlength=20)
        assert sizes.max() - sizes.min() <= 1 and sizes.sum() == count
    assert torch.bincount(groups).tolist() == [10] * 20


# -- the number --------------------------------------------------------------------------------------------------------


def test_new_images_of_the_same_distribution_are_about_as_far_as_held_out_ones(reals):
    values = [judge_metrics(like_heldout(reals, seed), reals, "toy")["fd_ratio"]["value"] for seed in range(2, 7)]
    assert 0.7 < np.mean(values) < 1.5


def test_held_out_images_in_the_place_of_generated_ones_have_ratio_one(reals):
    images = reals.heldout_sets[0]
    measured = judge_metrics(images, reals, "toy")
    assert measured["fd_ratio_train"]["value"] == pytest.approx(1, rel=1e-9)
    assert measured["kid_ratio_train"]["value"] == pytest.approx(1, rel=1e-9)
    assert measured["memorisation"]["value"] == pytest.approx(1)
    real = real_metrics(reals, "toy")
    assert {name for name in measured if not name.endswith("left_out")} == set(real)
    assert real["fd_ratio"]["value"] == real["kid_ratio"]["value"] == 1
    assert real["fd"]["value"] == pytest.approx(measured["fd"]["value"])
    assert real["copies"]["value"] == pytest.approx(0.05, abs=0.02)


def test_copies_of_training_images_do_not_beat_unseen_images(reals):
    copied = reals.training_sets[0]
    metrics = judge_metrics(copied, reals, "toy")
    assert metrics["fd_ratio_train"]["value"] < 0.6  # which would win if only the training images counted
    assert metrics["fd_ratio"]["value"] > 0.75
    assert metrics["fd_ratio"]["value"] == metrics["fd_ratio_heldout"]["value"]
    assert metrics["copies"]["value"] == 1 and metrics["memorisation"]["value"] < 1e-6


def test_worse_images_have_larger_ratios_and_honest_errors(reals):
    near, far = (judge_metrics(like_heldout(reals, 2, shift), reals, "toy") for shift in (0.3, 1.0))
    assert 1 < near["fd_ratio"]["value"] < far["fd_ratio"]["value"]
    assert near["kid_ratio"]["value"] < far["kid_ratio"]["value"]
    entry = far["fd_ratio"]
    assert len(entry["left_out"]) == 20
    assert entry["se"] == pytest.approx(math.hypot(entry["se_real"], jackknife_se(entry["left_out"])))


def jackknife_se(left_out) -> float:
    return float(np.sqrt((len(left_out) - 1) / len(left_out) * np.square(np.array(left_out) - np.mean(left_out)).sum()))


def test_the_error_is_the_spread_over_new_images(reals):
    """The jackknife over generated images, against the spread of the ratio over independent sets of images."""
    entries = [judge_metrics(like_heldout(reals, seed, 0.5), reals, "toy")["fd_ratio"] for seed in range(2, 22)]
    spread = np.std([entry["value"] for entry in entries], ddof=1)
    assert 0.6 < np.mean([jackknife_se(entry["left_out"]) for entry in entries]) / spread < 1.6


def test_fewer_images_are_compared_with_as_few_real_ones(parts):
    """The bias of few images must not look like a worse generator."""
    ratios = {}
    for n in (40, 200):
        reals = reals_of(parts, n)
        assert len(reals.heldout_sets) == 200 // n and len(reals.heldout_sets[0].features) == n
        drawn = [like_heldout(reals, seed) for seed in range(2, 12)]
        ratios[n] = np.mean([judge_metrics(images, reals, "toy")["fd_ratio_train"]["value"] for images in drawn])
    assert ratios[40] == pytest.approx(ratios[200], rel=0.25)


def test_more_images_are_compared_in_parts_of_as_many_as_are_held_out(parts):
    reals = reals_of(parts, 3 * sum(COUNTS) + 5)
    assert reals.block == sum(COUNTS)
    images = like_heldout(reals_of(parts), 2)
    tripled = ImageFeatures(*(torch.cat((each, each, each, each[:5])) for each in vars(images).values()))
    once, thrice = (judge_metrics(each, reals, "toy") for each in (images, tripled))
    assert thrice["fd_ratio"]["value"] == pytest.approx(once["fd_ratio"]["value"], rel=1e-9)


def test_class_weights_hold_on_all_sides(parts):
    """A generator that makes one class badly is judged by that class's weight, not by its number of images."""
    reals = reals_of(parts)
    images = like_heldout(reals, 2)
    worse = {}
    for label in (0, 3):  # the most and the least frequent class
        moved = images.features + 2.0 * (images.labels == label)[:, None]
        worse[label] = judge_metrics(as_images(moved, images.labels), reals, "toy")["fd"]["value"]
    assert worse[3] == pytest.approx(worse[0], rel=0.35)


def test_without_held_out_images_there_are_distances_and_no_ratios(parts):
    reals = Reals(Judge(NoExtractor(), ranks=True), parts[0], None, 60)
    images = ImageFeatures(*(each[:60] for each in vars(like_heldout(reals_of(parts), 2)).values()))
    metrics = judge_metrics(images, reals, "toy")
    assert {"fd", "kid", "recall", "class_accuracy"} <= set(metrics)
    assert not any("ratio" in name or name in ("memorisation", "copies") for name in metrics)
    assert real_metrics(reals, "toy") == {}


def test_without_labels_there_is_no_class_accuracy(reals):
    images = like_heldout(reals, 2)
    metrics = judge_metrics(ImageFeatures(images.features, images.logits, None), reals, "toy")
    assert "class_accuracy" not in metrics and "fd_ratio" in metrics


def test_class_accuracy_is_the_judges_own_where_its_classes_are_the_datas(parts):
    reals = reals_of(parts)
    images = like_heldout(reals, 2)
    wrong = ImageFeatures(images.features, images.logits.roll(1, 1), images.labels)
    assert judge_metrics(images, reals, "toy")["class_accuracy"]["value"] == 1
    assert judge_metrics(wrong, reals, "toy")["class_accuracy"]["value"] == 0
    assert judge_metrics(wrong, reals, "another set")["class_accuracy"]["value"] > 0.9  # the linear discriminant's


# -- the headline ------------------------------------------------------------------------------------------------------


JUDGES = [{"id": "a", "ranks": True}, {"id": "b", "ranks": True}, {"id": "c", "ranks": False}]


def entry(value: float, offset: float = 0.0, se_real: float | None = None) -> dict:
    left_out = [value + 0.01 * math.sin(g + offset) for g in range(20)]
    se = math.hypot(jackknife_se(left_out), se_real or 0.0)
    extra = {} if se_real is None else {"se_real": se_real}
    return {"value": value, "value_bc": None, "se": se, "n": 100, "unit": "1", "left_out": left_out} | extra


def scores(train: float, heldout: float) -> dict:
    return {"fd_ratio_train": entry(train, se_real=0.1), "fd_ratio_heldout": entry(heldout, 1.0, se_real=0.2)}


def test_the_headline_is_the_larger_mean_over_ranking_judges_that_were_not_met():
    parts = [[scores(2, 3), scores(4, 4), scores(50, 50)]]
    judged_by, (metrics,) = headline(JUDGES, parts, [])
    assert judged_by == ["a", "b"]
    assert metrics["fd_ratio"]["value"] == metrics["fd_ratio_heldout"]["value"] == 3.5
    assert metrics["fd_ratio_train"]["value"] == 3
    judged_by, (metrics,) = headline(JUDGES, parts, [{"judge": "b"}])
    assert judged_by == ["a"] and metrics["fd_ratio"]["value"] == 3
    assert headline(JUDGES, parts, [{"judge": "a"}, {"judge": "b"}])[0] == ["a", "b"]
    assert headline(JUDGES, parts, [{"judge": "c"}])[0] == ["a", "b"]


def test_the_error_of_the_mean_follows_from_the_jackknife_of_the_mean():
    first, second = entry(2.0, 0.0, 0.1), entry(3.0, 2.0, 0.3)
    combined = mean([first, second])
    left_out = [(a + b) / 2 for a, b in zip(first["left_out"], second["left_out"], strict=True)]
    assert combined["left_out"] == pytest.approx(left_out)
    assert combined["se_real"] == pytest.approx(0.2)
    assert combined["se"] == pytest.approx(math.hypot(jackknife_se(left_out), 0.2))


def test_a_single_judges_own_distances_are_kept():
    one = {"fd": entry(120.0), **scores(2, 1)}
    assert over_judges([one])["fd"]["value"] == 120
    assert "fd" not in over_judges([one, one])
