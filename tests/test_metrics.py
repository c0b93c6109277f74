"""The arithmetic of every metric, against identities, hand examples and torch-fidelity."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from pixlat.common.errors import UserError
from pixlat.evaluation.features.moments import Gaussian, Moments
from pixlat.evaluation.metrics import frechet, kid, prdc
from pixlat.evaluation.metrics.frechet import factorise, frechet_distance, frechet_distance_few
from pixlat.evaluation.metrics.inception_score import inception_score, split_score
from pixlat.evaluation.metrics.jackknife import jackknife
from pixlat.evaluation.metrics.kid import kernel_distance


def normal(n, dims, seed, scale=1.0, shift=0.0):
    rng = np.random.Generator(np.random.PCG64(seed))
    mixing = np.random.Generator(np.random.PCG64(99)).normal(size=(dims, dims)) / dims**0.5 + np.eye(dims)
    return torch.from_numpy(rng.normal(size=(n, dims)) @ mixing * scale + shift)


def moments_of(x, groups=20, indices=None, weights=None):
    moments = Moments.zeros(x.shape[1], groups)
    moments.add(x, torch.arange(len(x)) if indices is None else indices, weights)
    return moments


def gaussian_of(x):
    return moments_of(x).total()


# -- Fréchet distance --------------------------------------------------------------------------------------------------


def test_frechet_of_a_set_with_itself_is_zero():
    a = gaussian_of(normal(500, 64, seed=0))
    assert abs(frechet_distance(a, factorise(a))) < 1e-8 * float(a.cov.trace())


def test_frechet_is_symmetric():
    a, b = gaussian_of(normal(500, 64, seed=0)), gaussian_of(normal(700, 64, seed=1, scale=1.3, shift=0.2))
    assert frechet_distance(a, factorise(b)) == pytest.approx(frechet_distance(b, factorise(a)), rel=1e-8)


def test_frechet_agrees_with_general_eigenvalues():
    a, b = gaussian_of(normal(500, 64, seed=0)), gaussian_of(normal(700, 64, seed=1, scale=1.3, shift=0.2))
    root = torch.linalg.eigvals(a.cov @ b.cov).sqrt().real.sum()
    expected = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * root
    assert frechet_distance(a, factorise(b)) == pytest.approx(float(expected), rel=1e-10)


def test_eigenvalues_are_numpys_and_their_failure_is_told():
    matrix = normal(50, 30, seed=0).T.cov().numpy()
    expected = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(
        frechet.symmetric_eigenvalues(np.asfortranarray(np.tril(matrix))), expected, rtol=1e-12, atol=1e-14
    )
    with pytest.raises(UserError, match="dsterf"):
        frechet.symmetric_eigenvalues(np.full((4, 4), np.nan, order="F"))


def test_frechet_of_commuting_covariances():
    variances_a, variances_b = (
        torch.arange(1.0, 9.0, dtype=torch.float64),
        torch.linspace(0.2, 5, 8, dtype=torch.float64),
    )
    a, b = (Gaussian(100, torch.zeros(8, dtype=torch.float64), torch.diag(v)) for v in (variances_a, variances_b))
    expected = (variances_a.sqrt() - variances_b.sqrt()).square().sum()
    assert frechet_distance(a, factorise(b)) == pytest.approx(float(expected), rel=1e-12)


def test_frechet_with_deficient_rank():
    few, many = normal(40, 64, seed=0), normal(500, 64, seed=1, shift=0.1)
    reference = factorise(gaussian_of(many))
    assert not reference.regularised
    from_moments = frechet_distance(gaussian_of(few), reference)
    assert frechet_distance_few(few, reference) == pytest.approx(from_moments, rel=1e-10)
    swapped = factorise(gaussian_of(few))  # Cholesky does not apply
    assert swapped.regularised
    assert frechet_distance(gaussian_of(many), swapped) == pytest.approx(from_moments, rel=1e-7)
    both = factorise(gaussian_of(normal(30, 64, seed=2)))
    assert frechet_distance_few(few, both) == pytest.approx(frechet_distance(gaussian_of(few), both), rel=1e-8)


def test_singular_covariance_is_recorded_as_regularised():
    flat = normal(500, 8, seed=0)
    flat[:, 3] = 0
    reference = factorise(gaussian_of(flat))
    assert reference.regularised
    assert abs(frechet_distance(reference.gaussian, reference)) < 1e-6


def test_float32_features_are_widened_before_they_are_summed():
    x = (normal(20_000, 4, seed=0) + 50).float()
    total = moments_of(x).total()
    assert torch.allclose(total.cov, torch.cov(x.double().T), rtol=1e-11, atol=0)
    assert total.mean.dtype == total.cov.dtype == torch.float64


# -- moments -----------------------------------------------------------------------------------------------------------


def test_moments_of_uneven_shards_merge_to_the_whole():
    x = normal(103, 16, seed=0)
    whole = moments_of(x, groups=7)
    merged = Moments.zeros(16, 7)
    for indices in torch.randperm(103, generator=torch.Generator().manual_seed(0)).split([50, 1, 30, 22]):
        merged.merge(moments_of(x[indices], 7, indices))
    for name, tensor in merged.tensors().items():
        assert torch.allclose(tensor, whole.tensors()[name], rtol=1e-12, atol=1e-12), name
    assert torch.equal(merged.count, torch.bincount(torch.arange(103) % 7))
    total = merged.total()
    assert total.n == 103
    assert torch.allclose(total.cov, torch.cov(x.T), rtol=1e-12, atol=1e-12)


def test_leaving_out_a_group():
    x = normal(50, 5, seed=0)
    for g, left in enumerate(moments_of(x, groups=4).left_out()):
        rest = x[torch.arange(50) % 4 != g]
        assert left.n == len(rest)
        assert torch.allclose(left.mean, rest.mean(0), rtol=1e-12)
        assert torch.allclose(left.cov, torch.cov(rest.T), rtol=1e-10)
    assert len(list(moments_of(x[:3], groups=20).left_out())) == 3  # groups without images say nothing


def test_weights_act_like_repeated_images():
    x, weights = normal(40, 5, seed=0), torch.tensor([1.0, 3.0] * 20, dtype=torch.float64)
    repeated = x.repeat_interleave(weights.long(), 0)
    weighted = moments_of(x, weights=weights).total()
    assert torch.allclose(weighted.mean, repeated.mean(0), rtol=1e-12)
    correction = (80 - 1) / (80 - weights.square().sum() / 80)  # repeated images are not independent ones
    assert torch.allclose(weighted.cov, torch.cov(repeated.T) * correction, rtol=1e-10)


# -- jackknife ---------------------------------------------------------------------------------------------------------


def test_jackknife_recovers_the_true_distance():
    dims, n = 16, 2000
    rng = np.random.Generator(np.random.PCG64(0))
    true = dims * 0.1**2 + dims * (1.2 - 1) ** 2  # N(0, I) against N(0.1, 1.44 I)
    reference = factorise(Gaussian(10**9, torch.zeros(dims, dtype=torch.float64), torch.eye(dims, dtype=torch.float64)))
    estimates = []
    for _ in range(20):
        moments = moments_of(torch.from_numpy(rng.normal(0.1, 1.2, (n, dims))))
        estimates.append(
            jackknife(
                frechet_distance(moments.total(), reference),
                [frechet_distance(g, reference) for g in moments.left_out()],
            )
        )
    spread = np.std([e.value for e in estimates], ddof=1)
    bias = np.mean([e.value for e in estimates]) - true
    assert bias > 3 * spread / 20**0.5  # the plain value is biased,
    assert abs(np.mean([e.value_bc for e in estimates]) - true) < 3 * spread / 20**0.5  # the corrected one is not
    assert np.mean([e.se for e in estimates]) == pytest.approx(spread, rel=0.4)


def test_jackknife_of_a_mean():
    x = torch.arange(20.0, dtype=torch.float64)
    estimate = jackknife(float(x.mean()), [float(x[torch.arange(20) != i].mean()) for i in range(20)])
    assert estimate.value_bc == pytest.approx(9.5)
    assert estimate.se == pytest.approx(float(x.std()) / 20**0.5)


# -- inception score ---------------------------------------------------------------------------------------------------


def test_inception_score_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.6, 0.4]], dtype=torch.float64)
    marginal = p.mean(0)
    mutual_information = sum(p[i, j] * math.log(p[i, j] / marginal[j]) for i in range(4) for j in range(2)) / 4
    assert split_score(p) == pytest.approx(math.exp(mutual_information), rel=1e-12)


def test_inception_score_of_a_perfect_predictor():
    assert split_score(torch.eye(10, dtype=torch.float64)) == pytest.approx(10, rel=1e-12)
    score = inception_score(torch.zeros(100, 10))  # every image in every class: nothing is told
    assert (score.value, score.se) == (pytest.approx(1, rel=1e-12), pytest.approx(0, abs=1e-12))


def test_inception_score_does_not_depend_on_the_order_of_classes():
    logits = torch.eye(10).repeat_interleave(500, 0) * 1000
    in_order = inception_score(logits).value
    interleaved = inception_score(logits[torch.arange(5000).view(10, 500).T.flatten()]).value
    assert in_order > 9.8  # unshuffled, each of the ten splits would hold one class and score 1
    assert in_order == pytest.approx(interleaved, abs=0.1)


# -- precision, recall, density, coverage ------------------------------------------------------------------------------


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_prdc_by_hand():
    reference = column(0, 1, 2, 3, 4, 5, 6, 7)
    generated = column(0.5, 1.5, 20, 21, 22, 23, 24, 25)
    result = prdc.prdc(generated, reference)
    # Radii of the reference: k=3: 3 2 2 2 2 2 2 3; k=5: 5 4 3 3 3 3 4 5. Of the generated, k=3:
    # 20.5 19.5 2 2 2 2 2 3 (rounded where it matters not).
    assert result.precision.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert result.recall.tolist() == [1] * 8  # all lie in the wide balls of the two near images
    inside = [
        [abs(g - r) < d for r, d in zip(range(8), (5, 4, 3, 3, 3, 3, 4, 5), strict=True)]
        for g in generated.flatten().tolist()
    ]
    assert result.density.tolist() == [sum(row) / 5 for row in inside]
    assert result.coverage.tolist() == [float(any(row[r] for row in inside)) for r in range(8)]
    assert result.density[0] == pytest.approx(4 / 5)


def test_prdc_comparisons_are_closed_and_open():
    reference = column(0, 1, 2, 3, 4, 5)  # k=3 radius of 5 is 3, k=5 radius of 5 is 5
    at_precision_radius, at_density_radius = column(8, 80, 81, 82, 83, 84), column(10, 80, 81, 82, 83, 84)
    assert prdc.prdc(at_precision_radius, reference).precision[0] == 1
    assert prdc.prdc(at_density_radius, reference).density[0] == 0


def test_radii_leave_oneself_out():
    x = normal(50, 8, seed=0) + 1000  # far from the origin, the computed distance to oneself is not 0
    expected = (
        torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        .fill_diagonal_(torch.inf)
        .sort(1)
        .values[:, [2, 4]]
    )
    assert torch.allclose(prdc.squared_radii(x - x.mean(0), (3, 5)).sqrt(), expected, rtol=1e-9)


def test_collapse_has_high_precision_and_low_recall():
    reference = normal(300, 8, seed=0)
    collapsed = reference.mean(0) + 0.01 * normal(300, 8, seed=1)
    result = prdc.prdc(collapsed, reference)
    assert result.precision.mean() > 0.95
    assert result.recall.mean() < 0.05


def test_swapping_the_sets_swaps_precision_and_recall():
    a, b = normal(200, 8, seed=0), normal(300, 8, seed=1, scale=1.5)
    forward, backward = prdc.prdc(a, b), prdc.prdc(b, a)
    assert torch.equal(forward.precision, backward.recall)
    assert torch.equal(forward.recall, backward.precision)


def test_prdc_does_not_depend_on_the_block(monkeypatch):
    a, b = normal(200, 8, seed=0), normal(300, 8, seed=1, scale=1.5)
    whole = prdc.prdc(a, b)
    monkeypatch.setattr(prdc, "BLOCK", 7)
    for name in ("precision", "recall", "density", "coverage"):
        assert torch.equal(getattr(prdc.prdc(a, b), name), getattr(whole, name))


# -- KID ---------------------------------------------------------------------------------------------------------------


def brute_force_kid(x, y):
    def k(a, b):
        return (float(a @ b) / x.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_equals_brute_force(monkeypatch):
    x, y = normal(6, 4, seed=0), normal(9, 4, seed=1, shift=1)
    expected = brute_force_kid(x, y)
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(kid, "BLOCK", 2)
    value, left_out = kid.complete(x, y, torch.ones(9, dtype=torch.float64), groups=3)
    assert value == pytest.approx(expected, rel=1e-12)
    assert left_out == pytest.approx([brute_force_kid(x[torch.arange(6) % 3 != g], y) for g in range(3)], rel=1e-12)


def test_kid_of_equal_distributions_is_zero_within_its_error():
    same = kernel_distance(normal(600, 8, seed=0), normal(500, 8, seed=1))
    other = kernel_distance(normal(600, 8, seed=0, shift=0.5), normal(500, 8, seed=1))
    assert abs(same.value) < 4 * same.se
    assert other.value > 8 * other.se


def test_kid_weights_act_like_repeated_images():
    x, y, weights = normal(60, 4, seed=0), normal(10, 4, seed=1), torch.tensor([1.0, 2.0] * 5, dtype=torch.float64)
    shares = weights / weights.sum()
    kernel_yy, kernel_xy = ((a @ y.T / 4 + 1) ** 3 for a in (y, x))
    off = ~torch.eye(10, dtype=torch.bool)
    pairs = (shares[:, None] * shares)[off]
    plain = kernel_distance(x, y).value
    within, across = kernel_yy[off].mean(), kernel_xy.mean()
    expected = (
        plain
        - within
        + 2 * across
        + (pairs * kernel_yy[off]).sum() / pairs.sum()
        - 2 * (kernel_xy * shares).sum(1).mean()
    )
    assert kernel_distance(x, y, weights).value == pytest.approx(float(expected), rel=1e-10)


def test_the_error_of_kid_beyond_the_limit_is_that_of_other_generated_images(monkeypatch):
    """Against a reference that stays: the spread over draws of the generated images, which subsets do not show,
    and all pairs at once in float32.
    """
    monkeypatch.setattr(kid, "KID_COMPLETE_LIMIT", 60)
    monkeypatch.setattr(kid, "KID_SUBSET_SIZE", 50)
    monkeypatch.setattr(kid, "KID_SUBSETS", 40)
    monkeypatch.setattr(kid, "BLOCK", 64)
    reference = normal(150, 6, seed=1)
    found = [
        kernel_distance(normal(300, 6, seed=100 + seed, shift=0.3).float(), reference.float()) for seed in range(60)
    ]
    spread = np.std([each.value for each in found], ddof=1)
    told = np.sqrt(np.mean([each.se**2 for each in found]))
    assert told == pytest.approx(spread, rel=0.25)  # 60 draws know their spread to 9 %
    choice = np.mean(
        [
            kid.of_subsets(normal(300, 6, seed=100 + seed, shift=0.3), reference, torch.ones(150).double())[1]
            for seed in range(5)
        ]
    )
    assert choice < 0.6 * spread  # what was printed
    assert not found[0].left_out and found[0] == kernel_distance(
        normal(300, 6, seed=100, shift=0.3).float(), reference.float()
    )
    x, ones = normal(300, 6, seed=100, shift=0.3), torch.ones(150, dtype=torch.float64)
    exact, single = (
        kid.complete(x, reference, ones, groups=20),
        kid.complete(x.float(), reference.float(), ones, groups=20),
    )
    assert jackknife(*single).se == pytest.approx(jackknife(*exact).se, rel=1e-4)


def test_kid_of_large_sets_uses_seeded_subsets(monkeypatch):
    monkeypatch.setattr(kid, "KID_COMPLETE_LIMIT", 300)
    monkeypatch.setattr(kid, "KID_SUBSET_SIZE", 100)
    x, y = normal(400, 8, seed=0, shift=0.3), normal(400, 8, seed=1)
    subsets = kernel_distance(x, y)
    assert subsets == kernel_distance(x, y)
    complete = kid.complete(x, y, torch.ones(400, dtype=torch.float64), groups=1)[0]
    assert subsets.value == pytest.approx(complete, abs=5 * subsets.se)
    assert subsets.value != complete


# -- torch-fidelity ----------------------------------------------------------------------------------------------------


class Images(Dataset):
    def __init__(self, seed, high):
        self.images = torch.from_numpy(
            np.random.Generator(np.random.PCG64(seed)).integers(0, high, (200, 3, 8, 8), dtype=np.uint8)
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def linear_features(images):
    """24 fixed random projections of uint8 images, of unit scale."""
    weights = torch.from_numpy(np.random.Generator(np.random.PCG64(5)).normal(size=(192, 24)) / 192**0.5)
    return ((images.flatten(1).double() / 127.5 - 1) @ weights).float()


def test_agrees_with_torch_fidelity():
    """The same features through both: this is how our numerics are proven without Inception's weights."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Linear(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("projections",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "projections"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            return (linear_features(images),)

    torch_fidelity.register_feature_extractor("linear-projections", Linear)
    generated, reference = Images(0, 256), Images(1, 230)
    theirs = torch_fidelity.calculate_metrics(
        input1=generated, input2=reference, feature_extractor="linear-projections", isc=True, fid=True, kid=True,
        prc=True, samples_shuffle=False,
        kid_subsets=2, kid_subset_size=200, prc_neighborhood=3, save_cpu_ram=True, cuda=False,
        cache=False, verbose=False,
    )  # fmt: skip
    x, y = linear_features(generated.images), linear_features(reference.images)
    assert frechet_distance(gaussian_of(x), factorise(gaussian_of(y))) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-5
    )
    assert kernel_distance(x, y).value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    near = prdc.prdc(x, y)
    assert 0.2 < near.precision.mean() < 1 and 0.2 < near.recall.mean() < 1
    assert float(near.precision.mean()) == pytest.approx(theirs["precision"], abs=1e-6)
    assert float(near.recall.mean()) == pytest.approx(theirs["recall"], abs=1e-6)
    scores = [split_score(part) for part in x.double().softmax(1).tensor_split(10)]
    assert np.mean(scores) == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
