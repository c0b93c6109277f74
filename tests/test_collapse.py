"""The collapse study: what it measures of a known autoencoder, its claims on known numbers,
and the command from training to picture.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pixlat.common.images.image_set import ArrayImages
from pixlat.common.images.splits import fixed_draw
from pixlat.evaluation.command import run_command
from pixlat.evaluation.studies.collapse import PRESETS, Claim, claims, claims_table, measure, table, usage, work
from pixlat.methods.base import Method


def noise_images(count=40, size=8):
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return ArrayImages(pixels, np.zeros(count, dtype=np.int64), "noise")


class Halved(Method):
    """Keeps three numbers a patch of 4 pixels, its mean colour, and decodes half of it."""

    def __init__(self):
        super().__init__(None, None)
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def encode(self, images):
        assert not self.training and len(images) <= 16
        return torch.nn.functional.avg_pool2d(images, 4)

    def decode(self, latents):
        return self.weight * torch.nn.functional.interpolate(latents, scale_factor=4.0)


def test_measured_against_direct_formulas():
    images = noise_images()
    method = Halved().train()
    found = measure(method, images, 30, batch=16)
    assert method.training
    x = torch.from_numpy(images.images[fixed_draw(40, 30)]).double() / 127.5 - 1
    z = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean(dim=(3, 5))
    rebuilt = 0.5 * z.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert found["unexplained"] == pytest.approx(
        ((rebuilt - x) ** 2).sum().item() / ((x - x.mean(0)) ** 2).sum().item(), rel=1e-5
    )
    assert found["std_between"] == pytest.approx((z - z.mean(0)).square().sum().div(29 * 12).sqrt().item(), rel=1e-5)
    values = torch.linalg.svdvals(z.permute(0, 2, 3, 1).reshape(-1, 3))
    p = values / values.sum()
    assert found["erank"] == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-5)


def test_few_images_of_a_sorted_set_are_of_all_its_classes():
    """Two of ten images stand for both classes, black and white; the first two are equal,
    and their variance 0 cannot be lost.
    """
    pixels = np.repeat(np.array([0, 255], dtype=np.uint8), 20)[:, None, None, None] * np.ones(
        (1, 3, 8, 8), dtype=np.uint8
    )
    found = measure(Halved(), ArrayImages(pixels, np.repeat([0, 1], 20), "black and white"), 20, batch=16)
    assert found["unexplained"] == pytest.approx(0.25, rel=0.1) and found["std_between"] > 0.9


def run_of(start, end, std, edof, predicted, lost):
    first = {"step": 0, "erank": start, "erank_share": start / 8, "std_between": 0.5, "edof": 2.0, "unexplained": 1.0}
    return [
        first,
        {
            "step": 9,
            "erank": end,
            "erank_share": end / 8,
            "std_between": std,
            "edof": edof,
            "erank_predicted": predicted,
            "unexplained": lost,
        },
    ]


# The prototype's seed 0: digits, 200 steps.
SOUND = {
    "collapse-naive": {0: run_of(4.33, 1.60, 0.043, 0.02, 8.0, 0.74)},
    "collapse-stopgrad": {0: run_of(4.33, 2.63, 0.668, 1.3, 7.84, 0.49)},
    "collapse-clean": {0: run_of(4.33, 4.24, 0.691, 1.5, 4.58, 0.40)},
    "collapse-full": {0: run_of(4.33, 4.26, 0.680, 1.7, 4.19, 0.18)},
}


def test_claims_hold_for_the_story_and_fail_for_its_opposite():
    assert all(claim.holds for claim in claims(SOUND, PRESETS)) and len(claims(SOUND, PRESETS)) == 16
    backwards = dict(zip(PRESETS, reversed(SOUND.values()), strict=True))
    told = {claim.text: claim.holds for claim in claims(backwards, PRESETS)}
    assert not any(told[text] for text in told if "share of the rank" in text and not text.startswith("clean"))
    assert Claim("x", 0, 1.0, at_least=1.0).holds and not Claim("x", 0, 1.0, at_most=0.9).holds
    assert "| naive: share of the rank that is kept | at most 0.5 | 0.37" in claims_table(
        claims(SOUND, PRESETS)
    ).replace("  ", "").replace(" |", " |")
    assert "4.26 (4.26 to 4.26)" in table(SOUND, PRESETS)


def command(arguments):
    """The exit code."""
    return run_command(arguments, usage, work)


def test_the_command_trains_measures_and_draws(tmp_path, capsys):
    arguments = [
        "method=dsd",
        f"out={tmp_path}",
        "seeds=[0,1]",
        "heldout=20",
        "train.images=16",
        "train.batch=8",
        "train.preview_images=8",
        "train.log_images=8",
    ]
    assert command([*arguments, "model.depth=1", "model.width=16", "model.health_every=1"]) == 0
    report = json.loads((tmp_path / "collapse.json").read_text())
    assert list(report["runs"]) == PRESETS and len(report["claims"]) == 32
    for by_seed in report["runs"].values():
        assert [[row["step"] for row in rows] for rows in by_seed.values()] == [[0, 1, 2]] * 2
        assert by_seed["0"][0]["erank"] != by_seed["1"][0]["erank"] and "erank_predicted" in by_seed["0"][-1]
    starts = {
        json.dumps(by_seed["0"][0]["erank"]) for name, by_seed in report["runs"].items() if name != "collapse-full"
    }
    assert len(starts) == 1  # the same network before training, whatever the loss
    assert Image.open(tmp_path / "collapse.png").size == (800, 350)
    assert capsys.readouterr().err.count("collapse-naive-seed") == 2
    assert command([*arguments, "model.depth=1", "model.width=16", "model.health_every=1"]) == 0
    assert "collapse-naive" not in capsys.readouterr().err  # kept
    assert command([*arguments, "model.depth=2", "model.width=16", "model.health_every=1"]) == 2
    assert "was measured with other settings" in capsys.readouterr().err
    assert command(["out=x", "seeds=[0]"]) == 2
    assert "give method=" in capsys.readouterr().err
