"""RAE, section 4.3: a decoder trained on noisy latents decodes imperfect latents better, clean ones slightly worse."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from pixlat.common.config.resolve import resolve
from pixlat.common.images.splits import fixed_draw
from pixlat.evaluation.studies.claim_tools.emoji_runs import SIZE, emoji, few, pixels, ratio
from pixlat.evaluation.studies.claim_tools.framework import Budget, Claim, Criterion, Estimate, Evidence
from pixlat.evaluation.studies.claim_tools.training import fit, line, panels
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo
from pixlat.methods.rae.config import DecoderShape
from pixlat.methods.rae.decoder import DecoderMethod
from pixlat.methods.rae.vit import ViTDecoder

TRAINED, HELD_OUT = 1000, 200  # images
NOISES = (0.0, 0.2, 0.4, 0.6, 0.8)  # standard deviations of noise; the latents' tokens have variance 1 over channels
TAU = 0.8  # the paper's value
SHAPE = DecoderShape(width=64, depth=2, heads=4, hidden=256)
SETTINGS = {
    "preset": "demo",
    "model.perceptual": "none",
    "model.discriminator": "none",
    "train.batch": "16",
    "train.lr": "2e-3",
    "train.warmup_images": "0",
}


@cache
def latents_and_images(heldout: bool) -> tuple[Tensor, Tensor]:
    """Latents (N, C, h, h) and images (N, 3, 32, 32) of the training or the held-out emoji."""
    source = few(emoji(), TRAINED)
    x = (
        pixels(source.heldout, fixed_draw(len(source.heldout), HELD_OUT))
        if heldout
        else pixels(source.train, np.arange(TRAINED))
    )
    method = decoder_method(0.0)
    method.encoder.load()
    return torch.cat([method.encode(part) for part in x.split(50)]), x


def decoder_method(noise: float) -> DecoderMethod:
    """A small untrained decoder whose only loss is L1."""
    run = resolve(get_spec("rae_decoder"), SETTINGS | {"model.noise": str(noise)})
    method = get_class("rae_decoder")(run.model, DataInfo.of(emoji().info))
    assert isinstance(method, DecoderMethod)
    encoder, grid = method.encoder, method.encoder.grid(SIZE)
    method.decoder = ViTDecoder(SHAPE, encoder.channels, grid, SIZE // grid, encoder.pixel_mean, encoder.pixel_std)
    return method


def errors(noise: float, images: int, seed: int) -> list[float]:
    """Root mean square errors of held-out images after training with `noise`, one for each of NOISES on the latents.

    Pixels lie in [-1, 1].
    """
    train = resolve(get_spec("rae_decoder"), SETTINGS | {"train.images": str(images)}).train
    torch.manual_seed(seed)
    method = decoder_method(noise)
    latents, x = latents_and_images(heldout=False)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(TRAINED, (train.batch,))
        noisy = latents[chosen] + method.draw_noise(latents[chosen])
        return method.generator_objective(x[chosen], noisy, method.draw_augmentation(x[chosen]))["loss"]

    fit(method, loss, train, seed)
    return [decoding_error(method, sigma, seed) for sigma in NOISES]


@torch.no_grad()
def decoding_error(method: DecoderMethod, sigma: float, seed: int) -> float:
    """Root mean square error of the held-out images. The noise is the same for every decoder."""
    latents, x = latents_and_images(heldout=True)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return (method.decode(latents + sigma * noise).clamp(-1, 1) - x).square().mean().sqrt().item()


def measure(budget: Budget) -> Evidence:
    """Errors over the noise of the latents, for a decoder trained with noise and a decoder trained without."""
    images = budget.choose(4800, 48_000)
    found = {tau: list(zip(*(errors(tau, images, seed) for seed in budget.seeds), strict=True)) for tau in (0.0, TAU)}
    figure, [[axes]] = panels(1, 1, (5.0, 3.4))
    for color, (tau, by_noise) in enumerate(found.items()):
        values = [Estimate.over(each) for each in by_noise]
        label = f"trained with noise up to {tau:g}" if tau else "trained without noise"
        line(axes, NOISES, values, color, label)
    axes.set(xlabel="noise on the latents that are decoded", ylabel="error of the pixels, of a range of 2")
    axes.legend(frameon=False)
    return Evidence(
        estimates={"noisy": ratio(found[TAU][-1], found[0.0][-1]), "clean": ratio(found[TAU][0], found[0.0][0])},
        headers=["trained with noise", *(f"error at noise {sigma:g}" for sigma in NOISES)],
        rows=[[f"up to {tau:g}", *(str(Estimate.over(each)) for each in by_noise)] for tau, by_noise in found.items()],
        figure=figure,
    )


CLAIM = Claim(
    name="rae-noise",
    paper="RAE (arXiv 2510.11690), section 4.3",
    statement=(
        "A decoder trained on latents with noise is better on the imperfect latents that a generator makes, "
        "and little worse on clean ones."
    ),
    setting=(
        "A decoder of 2 blocks of width 64 of EfficientNet-Lite0's tokens with L1 alone on 1,000 emoji, noise of a "
        "standard deviation up to 0.8 an image or none; 48,000 images (quick: 4,800). The generator's errors are stood "
        "in for by noise on the latents of 200 held-out images of all classes (the paper: DINOv2, gFID and rFID)."
    ),
    amended=(
        "Measured again on 26 November 2026 with no bound moved: the 200 held-out images of the first record "
        "were the first ones, of four of the ten classes and one image of a fifth (0.870 ± 0.002 and 1.018 ± 0.003, "
        "with the same verdicts)."
    ),
    criteria=(
        Criterion(
            "noisy",
            "on latents with a noise of 0.8, the error of the decoder trained with noise over that of the one without",
            "at most",
            0.9,
        ),
        Criterion(
            "clean",
            "on clean latents, the error of the decoder trained with noise over that of the one without",
            "at most",
            1.25,
        ),
    ),
    measure=measure,
    minutes=(1.0, 12.0),
)
