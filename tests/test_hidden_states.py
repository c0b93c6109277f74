"""CKNNA and the linear probe on features whose answers are known, and their way from a method's blocks."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reg_models import INFO, make, randomized

from pixlat.common.datasets.load import DataSource
from pixlat.common.datasets.summary import DataSummary
from pixlat.common.errors import UserError
from pixlat.common.images.image_set import ArrayImages
from pixlat.evaluation.studies.block_features import block_features, cknna, image_mean, linear_probe, tapped
from pixlat.evaluation.studies.hidden_states import Keys, measure


def cknna_by_hand(x, y, k):
    """The definition with loops."""
    n = len(x)
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    products = [(f @ f.T).tolist() for f in (x, y)]
    near = [
        [set(sorted((j for j in range(n) if j != i), key=lambda j: -p[i][j])[:k]) for i in range(n)] for p in products
    ]
    centred = [[[p[i][j] - sum(p[i]) / n for j in range(n)] for i in range(n)] for p in products]

    def align(a, b):
        return (
            sum(centred[a][i][j] * centred[b][i][j] for i in range(n) for j in near[a][i] & near[b][i]) / (n - 1) ** 2
        )

    return align(0, 1) / math.sqrt(align(0, 0) * align(1, 1))


def features(n=24, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 5, 23])
def test_cknna_by_hand(k):
    x = features()
    y = x[:, :4] + 0.5 * features(d=4, seed=1)
    assert cknna(x, y, k) == pytest.approx(cknna_by_hand(x, y, k), abs=1e-5)


def test_cknna_of_equal_and_of_unrelated_features():
    x = features(300, 16)
    rotation = torch.linalg.qr(features(16, 16, 3)).Q
    assert cknna(x, x) == pytest.approx(1, abs=1e-6)
    # in float32 the tenth and eleventh neighbour of an image may change places
    assert cknna(x, 3 * x @ rotation) == pytest.approx(1, abs=2e-3)
    assert abs(cknna(x, features(300, 16, 2))) < 0.1
    near = cknna(x, x + 0.2 * features(300, 16, 4))
    far = cknna(x, x + 1.0 * features(300, 16, 4))
    assert 1 > near > far > 0.1


def test_cknna_refuses_too_few():
    with pytest.raises(UserError, match=r"more than 10 features \(the number of neighbours\)"):
        cknna(features(10), features(10))


def test_probe_finds_what_is_linear_and_nothing_else():
    labels = torch.arange(600) % 3
    centres = torch.eye(3, 8) * 4
    x = centres[labels] + features(600, 8).float()
    split = (x[:400], labels[:400]), (x[400:], labels[400:])
    assert linear_probe(*split, 3, epochs=60) > 0.95
    assert linear_probe(*split, 3, epochs=60) == linear_probe(*split, 3, epochs=60)
    noise = features(600, 8, 5).float()
    assert linear_probe((noise[:400], labels[:400]), (noise[400:], labels[400:]), 3, epochs=60) < 1 / 3 + 5 * math.sqrt(
        2 / 9 / 200
    )


def test_scale_and_shift_of_a_channel_do_not_matter_to_the_probe():
    labels = torch.arange(300) % 3
    x = (torch.eye(3, 8) * 2)[labels] + features(300, 8).float()
    moved = x * torch.linspace(0.01, 100, 8) + 5
    results = [linear_probe((f[:200], labels[:200]), (f[200:], labels[200:]), 3, epochs=20) for f in (x, moved)]
    assert results[0] == results[1]


class ClassesInOrder(torch.nn.Module):
    """A generator and an encoder in one, whose tokens tell an image's class,
    which is its brightness, and nothing else.
    """

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.block = torch.nn.Identity()

    def load(self):
        pass

    def blocks(self):
        return [self.block]

    def token(self, images):
        return F.one_hot(((images[:, 0, 0, 0] + 1) * 127.5).round().long(), self.num_classes).float()

    def probe(self, images, time):
        self.block(self.token(images)[:, None])

    def forward(self, images):
        return self.token(images)[:, :, None, None]


@pytest.mark.parametrize("images", [2000, 60])
def test_the_probe_learns_and_tests_every_class_of_images_sorted_by_class(monkeypatch, images):
    """As the embedded set and every folder are sorted.

    The first images are of a few classes, whose probe cannot name the others (0.485 on emoji).
    """

    def part(count):
        labels = np.sort(np.arange(count) % 10)
        return ArrayImages(
            np.broadcast_to(labels[:, None, None, None], (count, 3, 4, 4)).astype(np.uint8), labels, "brightness"
        )

    info = DataSummary("toy", 10, 4, 4000, 500, tuple("abcdefghij"), "digest")
    source = DataSource(info, part(4000), part(500), balanced=True)
    monkeypatch.setattr("pixlat.common.datasets.load.load_data", lambda data: source)
    monkeypatch.setattr("pixlat.common.frozen.encoders.build_encoder", lambda name: ClassesInOrder())
    monkeypatch.setattr(
        "pixlat.evaluation.score.models.load_run",
        lambda *_: SimpleNamespace(method=ClassesInOrder(), run=SimpleNamespace(data=None)),
    )
    [block] = measure(Path("run"), Keys(images=images), {})["blocks"]
    assert block["probe_accuracy"] == 1.0
    # of all classes: the images of one class have no spread, and their alignment is not a number
    assert block["cknna"] > 0.999


def test_tokens_before_the_image_are_left_out():
    tokens = torch.randn(2, 17, 5)
    torch.testing.assert_close(image_mean(tokens), tokens[:, 1:].mean(dim=1))
    torch.testing.assert_close(image_mean(tokens[:, 1:]), tokens[:, 1:].mean(dim=1))


def test_taps_are_removed():
    block = torch.nn.Linear(2, 2)
    with tapped([block]) as seen:
        block(torch.zeros(1, 2))
    block(torch.zeros(1, 2))
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["dit", "sit", "repa", "reg"])
def test_every_block_gives_features(monkeypatch, name):
    # what is remembered of training images must not stand in for others
    method = randomized(make(name, monkeypatch, remember=True))
    method.load_external()
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)
    images = ArrayImages(pixels, np.zeros(6, dtype=np.int64), "noise")
    found, again, clean = (
        block_features(method, images, np.arange(6), time, 3, torch.device("cpu")) for time in (0.5, 0.5, 0.1)
    )
    assert [f.shape for f in found] == [(6, 24)] * 3 and INFO.image_size == 16
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert not torch.equal(found[0], clean[0])
