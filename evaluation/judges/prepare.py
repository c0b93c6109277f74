"""The work of `pixlat prepare judges`: trains judges, validates them and writes their files and cards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pixlat.common.accounting.macs import count_macs
from pixlat.common.config.schema import DataConfig
from pixlat.common.datasets.load import load_data
from pixlat.common.files import read_json, sha256_of, write_atomically, write_whole
from pixlat.common.origin import git_state
from pixlat.common.weights.checkpoint import save_tensors
from pixlat.evaluation.features.extractor import EmbeddedExtractor, Extractor, one_thread
from pixlat.evaluation.features.shipped_features import write_shipped
from pixlat.evaluation.judges.degradations import COPIES, ROWS, Validation, faults_of
from pixlat.evaluation.judges.networks import IMAGE_SIZE, JudgeNetwork, build
from pixlat.evaluation.judges.recipe import JudgeData, Recipe, accuracies, judge_data, train_judge
from pixlat.evaluation.judges.shipped import JUDGES, load_file

SHIPPED_TENSORS = torch.float16
NORMALISATION = ("shift", "scale")  # constants of the features, which stay float32


def prepare(folder: Path, recipes: Mapping[str, Recipe]) -> str:
    """Trains and validates the judges of these recipes; returns the table, and what is wrong with a judge.

    For each judge it writes ID.safetensors, ID.json and features/ID.safetensors (store_features); the table's part also
    for EfficientNet-Lite0, which is not trained here. Finished judges of the same recipe are not trained again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = judge_data()
    cards = [finished_card(folder, name, recipe, data) or prepare_one(folder, name, recipe, data)
             for name, recipe in recipes.items()]  # fmt: skip
    for card in cards:
        store_features(folder, card)
    compared = folder / f"{EmbeddedExtractor.id}.json"
    if not compared.exists():
        facts = {"id": EmbeddedExtractor.id, "sha256": EmbeddedExtractor.sha256, **validated(EmbeddedExtractor(), data)}
        write_whole(compared, json.dumps(facts, indent=1) + "\n")
    digests = [f"{card['id']}: sha256 {card['sha256']}, {folder / card['id']}.safetensors" for card in cards]
    faults = [f"{card['id']} must not be shipped. {fault}." for card in cards for fault in faults_of(card["ratios"])]
    return "\n".join([*table_lines([*cards, read_json(compared)]), "", *digests, *faults])


def finished_card(folder: Path, name: str, recipe: Recipe, data: JudgeData) -> dict[str, Any] | None:
    """The card of a judge that this recipe has already made in this folder, with its weights; otherwise None."""
    card_file, file = folder / f"{name}.json", folder / f"{name}.safetensors"
    if not (card_file.exists() and file.exists()):
        return None
    card: dict[str, Any] = read_json(card_file)
    same = (card["recipe"], card["data"]["digest"], card["sha256"]) == (asdict(recipe), data.digest, sha256_of(file))
    return card if same else None


def prepare_one(folder: Path, name: str, recipe: Recipe, data: JudgeData) -> dict[str, Any]:
    """Trains one judge, writes its weights and its card, and returns the card."""
    network = train_judge(name, recipe, data, folder / f"{name}.state.safetensors")
    file = folder / f"{name}.safetensors"
    write_atomically(file, lambda place: save_tensors(tensors_of(network), place))
    digest = sha256_of(file)
    extractor = load_file(name, file, digest)
    with one_thread():
        card = {
            "id": name,
            "title": JUDGES[name].title,
            "sha256": digest,
            "bytes": file.stat().st_size,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "dims": network.dims,
            **costs(name, recipe),
            "recipe": asdict(recipe),
            "data": {"name": "emoji32", "digest": data.digest, "train": len(data.train), "heldout": len(data.heldout)},
            "accuracy": {"heldout": accuracies(network, data.heldout), "train": accuracies(network, data.train)},
            **validated(extractor, data),
            "made_by": "pixlat prepare judges",
            "torch": torch.__version__,
            "git": git_state(),
        }
    write_whole(folder / f"{name}.json", json.dumps(card, indent=1) + "\n")
    return card


def store_features(folder: Path, card: Mapping[str, Any]) -> None:
    """Writes a judge's features of the training images, so that a first evaluation need not extract them.

    The package has them beside those of EfficientNet-Lite0. It has none of the held-out images, which also need logits.
    """
    extractor = load_file(card["id"], folder / f"{card['id']}.safetensors", card["sha256"])
    write_shipped(extractor, {"training": load_data(DataConfig()).train}, folder / "features")


def tensors_of(network: JudgeNetwork) -> dict[str, torch.Tensor]:
    """The tensors as the file has them: weights in float16, constants of the features in float32."""
    return {
        key: (tensor if key in NORMALISATION else tensor.to(SHIPPED_TENSORS)).contiguous()
        for key, tensor in network.state_dict().items()
    }


def costs(name: str, recipe: Recipe) -> dict[str, int]:
    """Images that the judge saw in training, and multiply-accumulates of one forward pass and of the training."""
    network = build(name)
    images = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta")

    def step() -> None:
        outputs = network(images)
        torch.stack([output.sum() for output in outputs]).sum().backward()

    seen = recipe.steps * recipe.batch
    return {
        "images_seen": seen,
        "macs_forward": count_macs(lambda: network(images)),
        "macs_training": seen * count_macs(step),
    }


def validated(extractor: Extractor, data: JudgeData) -> dict[str, Any]:
    """The distance of the held-out images, and the ratios of degraded ones, rounded to six digits."""
    validation = Validation(extractor, data)
    ratios = {name: [float(f"{value:.6g}") for value in row] for name, row in validation.table().items()}
    return {"fd_heldout": float(f"{validation.floor:.6g}"), "ratios": ratios}


def table_lines(cards: Sequence[Mapping[str, Any]]) -> list[str]:
    """The validation of several judges as lines of a Markdown table; accuracies where a judge has them."""
    head = ["images", *(f"`{card['id']}`" for card in cards)]
    rows = [["held-out accuracy: class, style, subgroup", *(accuracy_text(card) for card in cards)]]
    rows += [["held-out images", *("1" for _ in cards)]]
    titles = {name: row.title for name, row in ROWS.items()} | {COPIES: COPIES}
    for name, title in titles.items():
        rows.append([title, *(", ".join(f"{value:.3g}" for value in card["ratios"][name]) for card in cards)])
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def accuracy_text(card: Mapping[str, Any]) -> str:
    """The three held-out accuracies; empty for an extractor that was not trained on emoji32."""
    shares = card.get("accuracy", {}).get("heldout", {})
    return ", ".join(f"{share:.3f}" for share in shares.values())
