"""Encode, decode, measure: every score of an autoencoder against a direct formula or a known answer."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonschema_rs import Draft202012Validator
from torch import nn

from pixlat.common.datasets.load import DataSource
from pixlat.common.datasets.summary import DataSummary
from pixlat.common.errors import UserError
from pixlat.common.images.image_set import ArrayImages
from pixlat.common.images.splits import fixed_draw
from pixlat.evaluation.features.collect import batches
from pixlat.evaluation.features.extractor import Features
from pixlat.evaluation.features.moments import Moments
from pixlat.evaluation.metrics.frechet import factorise, frechet_distance
from pixlat.evaluation.metrics.image_quality import psnr, ssim
from pixlat.evaluation.metrics.jackknife import jackknife
from pixlat.evaluation.protocols.identity import PSNR_CAP, protocol_hash, protocol_name
from pixlat.evaluation.records.record import SCHEMA_FILE
from pixlat.evaluation.score import reconstruction
from pixlat.evaluation.score.reconstruction import Rebuilder, evaluate_rebuilt, evaluate_reconstruction, paired_frechet
from pixlat.methods.base import Method


def noise_images(n, size, seed=0):
    return torch.from_numpy(
        np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    )


def direct_ssim(x, y):
    """The formula window by window, for one plane (H, W) of float64 grey levels."""
    offsets = np.arange(11) - 5
    gauss = np.exp(-(offsets**2) / (2 * 1.5**2))
    weight = np.outer(gauss, gauss) / np.outer(gauss, gauss).sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (plane[top : top + 11, left : left + 11] for plane in (x, y))
            ma, mb = (weight * a).sum(), (weight * b).sum()
            va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
            cov = (weight * (a - ma) * (b - mb)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


def test_ssim_equals_the_formula():
    x = noise_images(2, 15)
    y = (x.float() * 0.8 + 20 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    expected = [
        np.mean([direct_ssim(a[c].double().numpy(), b[c].double().numpy()) for c in range(3)])
        for a, b in zip(x, y, strict=True)
    ]
    assert ssim(x, y).tolist() == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(ssim(x, x), torch.ones(2, dtype=torch.float64), atol=1e-12)
    assert ssim(x, 255 - x).max() < 0  # inverted: structure anticorrelates


def test_psnr():
    x = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    assert psnr(x + 10, x).item() == pytest.approx(20 * np.log10(255 / 10), rel=1e-12)
    half = x.clone()
    half[:, :, :2] += 10  # the mean over pixels comes before the logarithm
    assert psnr(half, x).item() == pytest.approx(10 * np.log10(255**2 / 50), rel=1e-12)
    assert psnr(x, x).item() == PSNR_CAP
    bright = torch.full_like(x, 255)
    assert psnr(bright, torch.zeros_like(x)).item() == 0  # no wrap-around in uint8


class Blur(Method):
    """An autoencoder that keeps the mean of every square of `factor` pixels.

    Uses dropout, so that forgetting evaluation mode shows.
    """

    task = "reconstruction"

    def __init__(self, factor):
        super().__init__(None, None)
        self.factor = factor
        self.dropout = nn.Dropout(0.5)

    def encode(self, images):
        assert images.min() >= -1 and images.max() <= 1
        return self.dropout(nn.functional.avg_pool2d(images, self.factor))

    def decode(self, latents):
        assert not torch.is_grad_enabled()
        return nn.functional.interpolate(latents, scale_factor=float(self.factor))


class PixelDistance(nn.Module):
    """Stands in for a perceptual network."""

    sha256 = "ab" * 32

    def forward(self, x, y):
        assert x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return (x - y).abs().flatten(1).mean(1)


class Projections:
    """Stands in for the extractor: 12 numbers of an image shrunk to 8 pixels."""

    id, sha256, layer, resize, scaling, dims, num_classes = "embedded-v1", "0" * 64, "projections", "8", "x/255", 12, 5
    resize_digest = None
    comparable_with_inception_fid, device = False, torch.device("cpu")

    def __init__(self, device):
        self.weights = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).normal(size=(192, 12))).float()

    def __call__(self, images):
        pooled = nn.functional.interpolate(images.float() / 255, (8, 8)).flatten(1).double() @ self.weights.double()
        return Features(pooled.float(), pooled[:, :5].float())


@pytest.fixture(autouse=True)
def _cheap_networks(monkeypatch):
    monkeypatch.setattr(reconstruction, "load_perceptual", lambda device: ("perceptual_embedded", PixelDistance()))
    monkeypatch.setattr(reconstruction, "EmbeddedExtractor", Projections)  # also where its id is compared


def source(size=16, held_out=45):
    def part(n, seed):
        ramp = np.linspace(0, 200, size)[None, None, None] + np.random.Generator(np.random.PCG64(seed)).normal(
            20, 15, (n, 3, size, size)
        )
        return ArrayImages(np.clip(ramp, 0, 255).astype(np.uint8), np.arange(n) % 3, f"ramps{seed}")

    info = DataSummary("ramps", 3, size, 60, held_out, ("a", "b", "c"), "digest")
    return DataSource(info, part(60, 0), part(held_out, 1), balanced=True)


def measured(factor, folder, n=1000, **changes):
    run = SimpleNamespace(eval=SimpleNamespace(num_images=n, batch=7, precision="fp32", uint8="round"))
    return evaluate_reconstruction(Blur(factor), run, source(**changes), "cpu", folder)


def test_scores_fall_with_what_the_autoencoder_loses(tmp_path):
    perfect, fine, coarse = (measured(factor, tmp_path).metrics for factor in (1, 2, 4))
    assert perfect.keys() == {"rfd_embedded", "psnr", "ssim", "perceptual_embedded"}
    assert perfect["rfd_embedded"]["value"] == pytest.approx(0, abs=1e-6)
    assert (perfect["psnr"]["value"], perfect["perceptual_embedded"]["value"]) == (PSNR_CAP, 0)
    for name, better in (("rfd_embedded", -1), ("psnr", 1), ("ssim", 1), ("perceptual_embedded", -1)):
        assert better * (perfect[name]["value"] - fine[name]["value"]) > 0, name
        assert better * (fine[name]["value"] - coarse[name]["value"]) > 4 * fine[name]["se"] > 0, name
    assert fine["psnr"]["unit"] == "dB" and fine["psnr"]["n"] == 45
    with torch.autocast("cpu", torch.bfloat16):  # the trainer hands its method over like this
        assert measured(2, tmp_path).metrics == fine


def test_the_protocol_tells_sets_apart_and_fits_the_schema(tmp_path):
    whole, some, train = measured(2, tmp_path), measured(2, tmp_path, n=30), measured(2, tmp_path, held_out=5)
    assert protocol_name(whole.protocol).startswith("embedded-v1/ramps-heldout/n=45/reconstruction#")
    assert train.protocol["reference"]["split"] == "train" and train.metrics["psnr"]["n"] == 60
    small = measured(2, tmp_path, size=8)
    assert "ssim" not in small.metrics and "ssim" not in small.protocol["estimator"]  # no window fits
    assert len({protocol_hash(one.protocol) for one in (whole, some, train, small)}) == 4
    schema = Draft202012Validator({"$ref": "#/$defs/protocol", "$defs": json.loads(SCHEMA_FILE.read_text())["$defs"]})
    for one in (whole, some, train, small):
        schema.validate(one.protocol)


def test_reconstructions_in_a_file_score_as_the_method_that_made_them(tmp_path):
    data, extractor = source(), Projections("cpu")
    rebuilder = Rebuilder(Blur(2), torch.device("cpu"))
    rebuilt = [(images, indices) for images, _, indices in rebuilder(batches(data.heldout.fetch, 45, 10))]
    expected = measured(2, tmp_path)
    # what the file's owner says of it
    made = {name: expected.protocol["samples"][name] for name in ("uint8_rule", "precision")}
    found = evaluate_rebuilt(iter(rebuilt), data, 10, extractor, tmp_path, *made.values())
    assert found.protocol == expected.protocol and "unknown" not in made.values()
    assert evaluate_rebuilt(iter(rebuilt), data, 10, extractor, tmp_path).protocol["samples"]["uint8_rule"] == "unknown"
    for name, metric in expected.metrics.items():
        assert found.metrics[name]["value"] == pytest.approx(metric["value"], rel=1e-9), name
    extractor.id = "inception-2015"
    assert "rfid" in evaluate_rebuilt(iter(rebuilt), data, 10, extractor, tmp_path).metrics
    with pytest.raises(UserError, match="do not belong together"):
        evaluate_rebuilt(iter(rebuilt), data, 12, extractor, tmp_path)


def test_chosen_images_are_a_fixed_draw():
    assert fixed_draw(50, 1000).tolist() == list(range(50))
    few = fixed_draw(50, 20)
    assert np.array_equal(few, fixed_draw(50, 20)) and len(set(few)) == 20 and few.max() > 30


def test_the_paired_error_bar_is_that_of_the_pairs():
    """Reconstructions that follow their originals: leaving out a group on one side only would count
    the images' own spread as error.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    values = []
    for _ in range(12):
        x = torch.from_numpy(rng.normal(size=(400, 8)))
        y = 0.9 * x + 0.1 + 0.1 * torch.from_numpy(rng.normal(size=x.shape))
        real, rebuilt = Moments.zeros(8), Moments.zeros(8)
        real.add(x, torch.arange(400))
        rebuilt.add(y, torch.arange(400))
        values.append(paired_frechet(rebuilt, real)[0])
    spread = np.std([estimate.value for estimate in values], ddof=1)
    assert np.mean([estimate.se for estimate in values]) == pytest.approx(spread, rel=0.5)
    reference = factorise(real.total())
    one_sided = jackknife(
        frechet_distance(rebuilt.total(), reference), [frechet_distance(g, reference) for g in rebuilt.left_out()]
    )
    assert one_sided.se > 1.5 * values[-1].se


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 20"):
        measured(2, tmp_path, n=10)

    class Broken(Blur):
        def decode(self, latents):
            return super().decode(latents) * float("nan")

    run = SimpleNamespace(eval=SimpleNamespace(num_images=30, batch=7, precision="fp32", uint8="round"))
    with pytest.raises(UserError, match="NaN or infinity"):
        evaluate_reconstruction(Broken(2), run, source(), "cpu", tmp_path)
