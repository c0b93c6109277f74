"""Our metrics against those of torch-fidelity and clean-fid on the same images and features,
through Inception with weights from a seed.
"""

import numpy as np
import pytest
import torch
from inception_weights import random_inception
from torch.utils.data import Dataset

from pixlat.evaluation.bench.frechet import compare
from pixlat.evaluation.features.moments import Gaussian, Moments
from pixlat.evaluation.features.networks import build_extractor
from pixlat.evaluation.features.reference_files import Reference
from pixlat.evaluation.metrics.frechet import factorise, frechet_distance
from pixlat.evaluation.metrics.inception_score import inception_score
from pixlat.evaluation.metrics.jackknife import jackknife
from pixlat.evaluation.metrics.kid import kernel_distance
from pixlat.evaluation.metrics.mind import monge_distance, unit_directions
from pixlat.evaluation.metrics.prdc import prdc
from pixlat.evaluation.metrics.spread import over_seeds, paired_differences
from pixlat.evaluation.protocols.named import INCEPTION, PROTOCOLS
from pixlat.evaluation.score.named import measure

N = 20  # images a side: at 299 px each costs a quarter of a second
SHORT = 100  # features whose covariance their general eigenvalues take in a moment; at 2048 they take half a minute


class Images(Dataset):
    """Smooth random images, the second set darker."""

    def __init__(self, seed, gain):
        noise = torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).normal(size=(N, 3, 6, 6)))
        self.images = (
            (128 + gain * torch.nn.functional.interpolate(noise, (48, 48), mode="bicubic"))
            .clamp(0, 255)
            .to(torch.uint8)
        )

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.images[index]


def moments_of(features, groups=10):
    moments = Moments.zeros(features.shape[1], groups)
    moments.add(features, torch.arange(len(features)))
    return moments


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The weights' file, both sets, and their features by our extractor."""
    file = random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")
    extractor = build_extractor(INCEPTION, file)
    both = Images(0, 40), Images(1, 55)
    return file, extractor, both, [extractor(one.images) for one in both]


def test_agrees_with_torch_fidelity(sets):
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file, _, (generated, real), (x, y) = sets

    class WithShort(FeatureExtractorBase):
        """torch-fidelity's extractor, and the first of its features as a layer of their own."""

        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.inception = FeatureExtractorInceptionV3(
                "inner", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
            )

        @staticmethod
        def get_provided_features_list():
            return ("2048", "logits_unbiased", "short")

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return {"isc": "logits_unbiased", "fid": "short", "kid": "2048", "prc": "2048"}[metric]

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            pooled, logits = self.inception(images)
            found = {"2048": pooled, "logits_unbiased": logits, "short": pooled[:, :SHORT]}
            return tuple(found[name] for name in self.features_list)

    torch_fidelity.register_feature_extractor("inception-and-short", WithShort)
    theirs = torch_fidelity.calculate_metrics(
        input1=generated, input2=real, feature_extractor="inception-and-short", isc=True, fid=True, kid=True, prc=True,
        isc_splits=10, kid_subsets=2, kid_subset_size=N, prc_neighborhood=3, batch_size=10, save_cpu_ram=True,
        cuda=False, cache=False, verbose=False,
    )  # fmt: skip
    short = factorise(moments_of(y.pooled[:, :SHORT]).total())
    assert frechet_distance(moments_of(x.pooled[:, :SHORT]).total(), short) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-4
    )  # their mean is fp32
    assert inception_score(x.logits, "RandomState").value == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    # of kernels near 1, in fp32
    assert kernel_distance(x.pooled, y.pooled).value == pytest.approx(
        theirs["kernel_inception_distance_mean"], abs=1e-6
    )
    near = prdc(x.pooled, y.pooled)
    assert float(near.precision.mean()) == pytest.approx(theirs["precision"], abs=1e-6)
    assert float(near.recall.mean()) == pytest.approx(theirs["recall"], abs=1e-6)


def test_agrees_with_clean_fid(sets):
    """Their distance takes a matrix root through a keyword that SciPy drops in 1.18."""
    from cleanfid import fid

    _, _, _, (x, y) = sets
    a, b = (side.pooled[:, :SHORT].double() for side in (x, y))
    # more rows than dimensions, for both to have a covariance of the same rank as before
    a, b = a.repeat(20, 1), b.repeat(20, 1)
    generator = torch.Generator().manual_seed(0)
    a, b = (side + 0.01 * torch.randn(side.shape, generator=generator, dtype=torch.float64) for side in (a, b))
    theirs = fid.frechet_distance(a.mean(0).numpy(), np.cov(a.numpy().T), b.mean(0).numpy(), np.cov(b.numpy().T))
    assert frechet_distance(moments_of(a).total(), factorise(moments_of(b).total())) == pytest.approx(theirs, rel=1e-6)


def test_a_named_protocol_measures_what_it_names(sets):
    """All of ADM's metrics in one stream, each equal to its own computation."""
    _, extractor, (generated, _), (x, y) = sets
    spatial = moments_of(y.spatial[:, :50]).total()
    reference = Reference(moments_of(y.pooled).total(), moments_of(y.spatial).total(), y.pooled, {})
    few = [(generated.images[part], part) for part in torch.arange(N).split(8)]
    metrics = measure(few, N, Cached(extractor, x, generated.images), short_of(reference, spatial), PROTOCOLS["adm256"])
    assert metrics.keys() == {"fid", "sfid", "is", "kid", "mind", "precision", "recall", "density", "coverage"}
    assert metrics["is"]["value"] == pytest.approx(inception_score(x.logits, "RandomState").value, rel=1e-6)
    assert metrics["kid"]["value"] == pytest.approx(
        kernel_distance(x.pooled[:, :SHORT], y.pooled[:, :SHORT]).value, rel=1e-6
    )
    assert metrics["sfid"]["value"] == pytest.approx(
        frechet_distance(moments_of(x.spatial[:, :50]).total(), factorise(spatial)), rel=1e-6
    )
    assert all(
        len(metrics[name]["left_out"]) == 10 and metrics[name]["se"] > 0 for name in ("fid", "sfid", "kid", "mind")
    )
    near = prdc(x.pooled[:, :SHORT], y.pooled[:, :SHORT])
    assert metrics["coverage"]["value"] == pytest.approx(float(near.coverage.mean()))


class Cached:
    """The extractor's answers, cut to fewer dimensions."""

    dims, spatial_dims, num_classes, device = SHORT, 50, 1008, torch.device("cpu")

    def __init__(self, extractor, features, images):
        self.features, self.images = features, images

    def __call__(self, images):
        rows = torch.cat([(self.images == image).flatten(1).all(1).nonzero()[0] for image in images])
        return type(self.features)(
            self.features.pooled[rows, :SHORT], self.features.logits[rows], self.features.spatial[rows, :50]
        )


def short_of(reference, spatial):
    pooled = Gaussian(N, reference.pooled.mean[:SHORT], reference.pooled.cov[:SHORT, :SHORT])
    return Reference(pooled, spatial, reference.features[:, :SHORT], {})


def test_the_benchmark_compares_equal_distances():
    result = compare(96)
    distances = [entry["distance"] for entry in result.values() if isinstance(entry, dict)]
    assert len(distances) == 4 and max(distances) - min(distances) < 1e-6 * max(distances)
    assert result["pixlat"]["times_slower_wall"] == result["pixlat"]["times_slower_cpu"] == 1


# -- MIND --------------------------------------------------------------------------------------------------------------


def test_mind_by_hand():
    rng = np.random.Generator(np.random.PCG64(0))
    x, y = torch.from_numpy(rng.normal(size=(30, 5))), torch.from_numpy(rng.normal(1, 2, size=(40, 5)))
    directions = unit_directions(5)
    assert torch.allclose(directions.norm(dim=1), torch.ones(1000, dtype=torch.float64))

    def direct(a, b):
        costs = [np.mean((np.sort(a.numpy() @ u) - np.sort(b.numpy() @ u)) ** 2) for u in directions.numpy()]
        return 15 * np.mean(costs)

    estimate = monge_distance(x, y, groups=5)
    assert estimate.value == pytest.approx(direct(x, y[:30]), rel=1e-10)
    rest = torch.arange(30) % 5 != 2
    assert estimate.left_out[2] == pytest.approx(direct(x[rest], y[:30][rest]), rel=1e-10)
    assert monge_distance(x, x).value == 0
    shifted = monge_distance(x, x + 3).value  # moving every image by 3 along all axes: 3 D E[(3 sum u)^2] = 3 D * 9
    assert shifted == pytest.approx(15 * 9, rel=0.1)


# -- seeds and pairs ---------------------------------------------------------------------------------------------------


def estimate_of(x, reference):
    moments = moments_of(x, 20)
    found = jackknife(
        frechet_distance(moments.total(), reference), [frechet_distance(g, reference) for g in moments.left_out()]
    )
    return {
        "value": found.value,
        "value_bc": found.value_bc,
        "se": found.se,
        "left_out": list(found.left_out),
        "n": len(x),
        "unit": "feature^2",
    }


def record(name, metrics, seeds=(0,), protocol="hash"):
    return {"name": name, "protocol_hash": protocol, "seeds": {"train": 0, "sample": list(seeds)}, "metrics": metrics}


def test_a_pair_on_the_same_seeds_tells_more_than_two_error_bars():
    """Two models that differ a little: what their samples share cancels."""
    rng = np.random.Generator(np.random.PCG64(0))
    reference = factorise(moments_of(torch.from_numpy(rng.normal(size=(4000, 8)))).total())
    differences, spread = [], []
    for _ in range(10):
        z = torch.from_numpy(rng.normal(size=(1000, 8)))
        first, second = estimate_of(1.2 * z, reference), estimate_of(1.18 * z, reference)
        (found,) = paired_differences(record("a", {"fid": first}), record("b", {"fid": second}))
        differences.append(found)
        spread.append(np.hypot(first["se"], second["se"]))
    assert np.mean([d.se for d in differences]) == pytest.approx(
        np.std([d.value for d in differences], ddof=1), rel=0.6
    )
    assert np.mean(spread) > 4 * np.mean([d.se for d in differences])
    assert all(d.deviations > 3 and d.metric == "fid" for d in differences)


def test_only_what_was_made_alike_is_compared():
    metrics = {"fid": {"value": 1.0, "left_out": [1.0, 1.1]}}
    for other, message in (
        (record("b", metrics, protocol="other"), "measured differently"),
        (record("b", metrics, seeds=(1,)), "the same seeds="),
        (record("b", {"fid": {"value": 1.0}}), "these records hold no jackknife values"),
    ):
        with pytest.raises(ValueError, match=message):
            paired_differences(record("a", metrics), other)


def test_seeds_become_a_mean_and_a_spread():
    rng = np.random.Generator(np.random.PCG64(1))
    reference = factorise(moments_of(torch.from_numpy(rng.normal(size=(4000, 4)))).total())
    floor = {"value": 3.0, "se": 0.1, "n": 5, "unit": "1"}
    parts = [
        {"fid": estimate_of(torch.from_numpy(rng.normal(0.2, 1.1, (500, 4))), reference), "fd_floor": floor}
        for _ in range(4)
    ]
    together = over_seeds(parts)
    values = [part["fid"]["value"] for part in parts]
    assert together["fid"]["values"] == values
    assert together["fid"]["value"] == pytest.approx(np.mean(values)) != min(values)
    assert together["fid"]["sd_seeds"] == pytest.approx(np.std(values, ddof=1))
    assert together["fid"]["se"] == pytest.approx(np.mean([part["fid"]["se"] for part in parts]) / 2, rel=0.2)
    assert together["fd_floor"] == floor  # does not depend on the seed
    assert over_seeds(parts[:1]) is parts[0]
