"""The features in the package are those of its extractor and its data, and files of others are not taken for them."""

import numpy as np
import pytest
import torch
from evaluated_run import Projections
from safetensors.torch import load_file, save_file

from pixlat.common.config.schema import DataConfig
from pixlat.common.datasets.load import load_data
from pixlat.evaluation.features import feature_sets, shipped_features
from pixlat.evaluation.features.extractor import EmbeddedExtractor
from pixlat.evaluation.features.moments import Moments
from pixlat.evaluation.features.shipped_features import FOLDER, stored_as, write_shipped
from pixlat.evaluation.judges.panel import Judge
from pixlat.evaluation.judges.shipped import JUDGES, load_judge
from pixlat.evaluation.metrics.frechet import factorise, frechet_distance
from pixlat.evaluation.score.embedded import load_reals


@pytest.fixture(scope="module")
def source():
    return load_data(DataConfig())


@pytest.fixture(scope="module")
def extractor():
    return EmbeddedExtractor()


@pytest.mark.parametrize("name", ["embedded-v1", *JUDGES])
def test_rows_of_the_file_are_what_the_network_computes(source, extractor, name):
    """A few of every part; each number within half a step, and what machines differ by."""
    extractor = load_judge(name) if name in JUDGES else extractor
    for images in (source.train, *([] if name in JUDGES else [source.heldout])):
        known = shipped_features.shipped_features(extractor, images.digest, len(images))
        assert known is not None and known.shape == (len(images), extractor.dims) and known.dtype == torch.float32
        rows = [*range(0, len(images), len(images) // 5)][:6]
        live = extractor(torch.from_numpy(np.concatenate([images.fetch([row]) for row in rows]))).pooled
        step = (known.amax(0) - known.amin(0)) / shipped_features.LEVELS
        assert bool(((known[rows] - live).abs() <= 0.51 * step + 2e-5).all())


def test_the_16_bits_move_a_distance_by_less_than_a_millionth(source, extractor):
    """As far as the features themselves are fine numbers: stored once more, between other ends, they lose as much."""

    def gaussian(features):
        moments = Moments.zeros(320)
        moments.add(features, torch.arange(len(features)))
        return moments.total()

    train, heldout = (
        shipped_features.shipped_features(extractor, part.digest, len(part)) for part in (source.train, source.heldout)
    )
    generator = torch.Generator().manual_seed(0)
    exact = train + 1e-4 * torch.rand(train.shape, generator=generator)  # off the grid of stored numbers
    stored = stored_as(exact)
    again = (stored["low"] + stored["step"] * (stored["levels"].double() - shipped_features.LOWEST)).float()
    assert not torch.equal(again, exact)
    for generated in (heldout, exact[:1000], heldout + 0.05):
        values = [frechet_distance(gaussian(generated), factorise(gaussian(real))) for real in (exact, again)]
        assert values[1] == pytest.approx(values[0], rel=1e-6)


def test_an_evaluation_on_emoji32_extracts_no_real_image(source, extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_sets, "collect", lambda *_: pytest.fail("extracted what the package holds"))
    (reference,) = load_reals(source, [Judge(extractor, ranks=True)], tmp_path, 1000)
    assert len(reference.train.labels) == len(reference.train.features) == len(source.train)
    assert int(reference.heldout.moments.count.sum()) == len(source.heldout)
    weights = feature_sets.class_weights(torch.from_numpy(source.train.labels))[:, None]
    mean = (weights * reference.train.features.double()).sum(0) / weights.sum()
    assert torch.allclose(reference.train.moments.total().mean, mean)
    assert list(tmp_path.iterdir()) == []  # and caches nothing


def test_a_file_of_another_extractor_or_of_other_images_is_not_used(source, extractor, tmp_path, monkeypatch):
    digest, n = source.heldout.digest, len(source.heldout)
    assert shipped_features.shipped_features(extractor, digest, n - 1) is None
    assert shipped_features.shipped_features(extractor, digest[::-1], n) is None
    assert shipped_features.shipped_features(Projections(), digest, n) is None  # the same id, other weights
    file = FOLDER / f"{extractor.id}.safetensors"
    tensors = load_file(file)
    tensors[f"{digest}.levels"][0, 0] += 1
    changed = tmp_path / file.name
    facts = {"extractor": shipped_features.identity_of(extractor), "sha256": "0" * 64}
    for content in (tensors, load_file(file)):  # a changed number, and a checksum of something else
        save_file(content, changed, facts)
        monkeypatch.setattr(shipped_features, "FOLDER", tmp_path)
        shipped_features._read.cache_clear()
        assert shipped_features.shipped_features(extractor, digest, n) is None
    changed.write_bytes(file.read_bytes()[:-100])
    shipped_features._read.cache_clear()
    assert shipped_features.shipped_features(extractor, digest, n) is None
    shipped_features._read.cache_clear()


def test_the_file_can_be_written_anew(source, tmp_path, monkeypatch):
    few = source.heldout
    monkeypatch.setattr(shipped_features, "FOLDER", tmp_path)

    class Sums(Projections):
        """Two numbers of an image of any size."""

        id, dims = "sums", 2

        def __call__(self, images):
            flat = images.flatten(1).double()
            pooled = torch.stack((flat.mean(1), flat.std(1)), dim=1).float()
            return shipped_features_output(pooled)

    file = write_shipped(Sums(), {"held-out": few}, tmp_path)
    assert file == tmp_path / "sums.safetensors"
    known = shipped_features.shipped_features(Sums(), few.digest, len(few))
    live = Sums()(torch.from_numpy(few.fetch(range(len(few))))).pooled
    assert torch.allclose(known, live, atol=2e-3) and known[:, 0].amax() == pytest.approx(float(live[:, 0].amax()))
    shipped_features._read.cache_clear()


def shipped_features_output(pooled):
    from pixlat.evaluation.features.extractor import Features

    return Features(pooled, pooled[:, :0].new_zeros(len(pooled), 5))
