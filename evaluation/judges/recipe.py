"""Trains the judges of emoji32 from scratch, on the training part only.

Each judge learns four things about an image at once: its class, its art style, its Unicode subgroup, and what it looks
like (`networks.describe`). It sees the training images shifted, rotated and scaled, but never degraded. So the
validation table (degradations.py) tests a judge on images of a kind that it was not trained on.

One thread and one seed determine the weights. Every step draws from (judge, seed, step), so an interrupted training
continues from its last saved state with the same numbers.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixlat.common.config.schema import DataConfig
from pixlat.common.datasets.load import load_data
from pixlat.common.errors import UserError
from pixlat.common.files import write_atomically
from pixlat.common.images.emoji32 import HELD_OUT_SHARE, load_emoji32
from pixlat.common.images.splits import held_out
from pixlat.common.progress import progress_bar
from pixlat.common.seeds import derive
from pixlat.common.weights.checkpoint import save_tensors
from pixlat.evaluation.features.extractor import one_thread
from pixlat.evaluation.judges.networks import NETWORKS, JudgeNetwork, Outputs, describe

SAVE_EVERY = 200  # steps


@dataclass(frozen=True)
class Recipe:
    """How a judge is trained. A judge's card holds these values."""

    steps: int
    seed: int = 0
    batch: int = 64  # images, drawn with replacement by 1 / sqrt(number of images of their class)
    lr: float = 1.5e-3
    warmup: int = 200  # steps of linear warm-up; then a cosine to 0
    weight_decay: float = 0.05
    smoothing: float = 0.1  # of the labels of classes and subgroups
    style_weight: float = 0.5
    description_weight: float = 1.0
    upright: float = 0.5  # share of images that are shifted by whole pixels only, and so stay as sharp as they were
    shift: float = 3.0  # pixels, at most, in both directions
    rotation: float = 0.25  # radians, at most
    zoom: float = 1.2  # scale from 1 / zoom to zoom


RECIPES: dict[str, Recipe] = {
    "emoji32-plain-v1": Recipe(steps=3000),
    "emoji32-residual-v1": Recipe(steps=4000),
    "emoji32-vit-v1": Recipe(steps=2500),
}


class Part(NamedTuple):
    """Images of emoji32 with all their labels."""

    images: Tensor  # (N, 3, 32, 32) uint8
    classes: Tensor  # (N,) int64, like the other two
    styles: Tensor
    subgroups: Tensor

    def __len__(self) -> int:
        return len(self.images)


class JudgeData(NamedTuple):
    """The two parts of emoji32 and the digest of both."""

    train: Part
    heldout: Part
    digest: str


def judge_data() -> JudgeData:
    """emoji32 in the split that every run uses, with art styles and subgroups beside the classes."""
    source, sheet = load_data(DataConfig()), load_emoji32()
    mask = held_out(sheet.concepts, sheet.labels, HELD_OUT_SHARE)

    def part(chosen: NDArray[np.bool_], labels: NDArray[np.int64]) -> Part:
        assert np.array_equal(sheet.labels[chosen], labels), "the split of load_data is another one"
        arrays = (sheet.images, sheet.labels, sheet.styles, sheet.subgroups)
        return Part(*(torch.from_numpy(array[chosen]) for array in arrays))

    return JudgeData(part(~mask, source.train.labels), part(mask, source.heldout.labels), source.info.digest)


# -- one step ----------------------------------------------------------------------------------------------------------


class Training:
    """A judge in training: network, optimizer, and the constants that it computes from the data once."""

    def __init__(self, name: str, recipe: Recipe, data: JudgeData) -> None:
        self.name, self.recipe, self.train, self.data_digest = name, recipe, data.train, data.digest
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(derive("judge", name, recipe.seed))
            self.network: JudgeNetwork = NETWORKS[name]().train()
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
        counts = torch.bincount(self.train.classes).double()
        self.shares = counts.rsqrt()[self.train.classes]
        descriptions = describe(self.train.images.float())
        self.mean, self.std = descriptions.mean(0), descriptions.std(0) + 1e-3
        self.step = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        """Positions (B,) and augmented pixels (B, 3, 32, 32) of the next step."""
        generator = torch.Generator().manual_seed(derive("judge", self.name, self.recipe.seed, self.step))
        positions = torch.multinomial(self.shares, self.recipe.batch, replacement=True, generator=generator)
        return positions, augmented(self.train.images[positions].float(), self.recipe, generator)

    def do_step(self) -> dict[str, float]:
        """One step of the optimizer; returns the terms of the loss."""
        positions, pixels = self.batch()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * lr_factor(self.step, self.recipe)
        targets = (describe(pixels) - self.mean) / self.std
        terms = loss_terms(self.network(pixels), self.train, positions, targets, self.recipe)
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        self.step += 1
        return {name: term.item() for name, term in terms.items()}

    @property
    def identity(self) -> str:
        """What determines the weights: the judge, the recipe and the data."""
        return json.dumps({"judge": self.name, "recipe": asdict(self.recipe), "data": self.data_digest})

    def save(self, file: Path) -> None:
        """Writes everything that the next step needs."""
        tensors = {f"network.{key}": value for key, value in self.network.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
        facts = {"step": str(self.step), "identity": self.identity}
        write_atomically(file, lambda place: save_tensors(tensors, place, facts), sync=True)

    def resume(self, file: Path) -> None:
        """Continues from the state in a file. UserError if it is of another judge, recipe or data."""
        try:
            with safe_open(file, framework="pt") as opened:
                facts = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged: {error}. Remove it to train this judge from the start.") from error
        if facts.get("identity") != self.identity:
            raise UserError(
                f"{file} is the state of another training: {facts.get('identity')}. This one is {self.identity}. "
                "Choose another folder, or remove the file to train from the start."
            )
        prefix = "network."
        self.network.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        states: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            if not key.startswith(prefix):
                _, number, name = key.split(".")
                states[int(number)][name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(states), "param_groups": groups})
        self.step = int(facts["step"])


def train_judge(name: str, recipe: Recipe, data: JudgeData, state: Path) -> JudgeNetwork:
    """Trains a judge to the end of its recipe, on one thread. Saves to `state` now and then and continues from it.

    Returns the network as it is shipped: rounded to float16, with the shift and the scale of its features.
    """
    with one_thread():
        training = Training(name, recipe, data)
        if state.exists():
            training.resume(state)
        with progress_bar(name, recipe.steps, initial=training.step, unit=" steps", keep=True) as bar:
            while training.step < recipe.steps:
                terms = training.do_step()
                bar.update()
                bar.set_postfix({key: f"{term:.3f}" for key, term in terms.items()}, refresh=False)
                if training.step % SAVE_EVERY == 0 or training.step == recipe.steps:
                    training.save(state)
        return finished(training.network, data.train)


def finished(network: JudgeNetwork, train: Part) -> JudgeNetwork:
    """Rounds the weights to float16 and sets the shift and the scale of the features, in place."""
    network.eval().requires_grad_(False)
    network.load_state_dict({key: tensor.half() for key, tensor in network.state_dict().items()})
    pooled = pooled_features(network, train.images).double()
    network.shift.copy_(pooled.mean(0))
    network.scale.copy_(pooled.var(0, correction=0).mean().rsqrt())
    return network


@torch.no_grad()
def pooled_features(network: JudgeNetwork, images: Tensor) -> Tensor:
    """Features (N, D), not normalised, of images (N, 3, 32, 32) uint8."""
    return torch.cat([network.pooled(batch.float()) for batch in images.split(64)])


@torch.no_grad()
def accuracies(network: JudgeNetwork, part: Part) -> dict[str, float]:
    """The share of images whose class, style and subgroup the judge names."""
    outputs = network.heads(pooled_features(network, part.images))
    pairs = {
        "class": (outputs.classes, part.classes),
        "style": (outputs.styles, part.styles),
        "subgroup": (outputs.subgroups, part.subgroups),
    }
    return {name: float((logits.argmax(1) == labels).double().mean()) for name, (logits, labels) in pairs.items()}


def lr_factor(step: int, recipe: Recipe) -> float:
    """The learning rate of a step as a share of the highest one: linear warm-up, then a cosine to 0."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)))


def loss_terms(
    outputs: Outputs, labels: Part, positions: Tensor, description: Tensor, recipe: Recipe
) -> dict[str, Tensor]:
    """The weighted terms of the loss. description: (B, NUM_DESCRIPTION) standardised, of the augmented images."""
    classes, styles, subgroups = labels.classes[positions], labels.styles[positions], labels.subgroups[positions]
    return {
        "class": F.cross_entropy(outputs.classes, classes, label_smoothing=recipe.smoothing),
        "style": recipe.style_weight * F.cross_entropy(outputs.styles, styles),
        "subgroup": F.cross_entropy(outputs.subgroups, subgroups, label_smoothing=recipe.smoothing),
        "description": recipe.description_weight * F.mse_loss(outputs.description, description),
    }


def augmented(pixels: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [0, 255], shifted, rotated and scaled over white."""
    count, side = len(pixels), pixels.shape[-1]
    draws = 2 * torch.rand(5, count, generator=generator) - 1
    upright = draws[0] < 2 * recipe.upright - 1
    angle = (draws[1] * recipe.rotation).where(~upright, torch.zeros(()))
    zoom = (recipe.zoom ** draws[2]).where(~upright, torch.ones(()))
    shift = draws[3:] * recipe.shift
    shift = shift.where(~upright, shift.round()) * 2 / side
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    rows = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], dim=1)
    grid = F.affine_grid(rows, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(255 - pixels, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return (255 - moved).clamp(0, 255)
