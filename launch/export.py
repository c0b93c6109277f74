"""Exports a run for others: its weights as safetensors, the configuration, and a model card that describes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixlat.common.config.identity import identity_of
from pixlat.common.config.resolve import ema_names, published_score
from pixlat.common.config.schema import RunConfig, TrainConfig
from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of, write_whole
from pixlat.common.training.ema import decays_by_name
from pixlat.common.weights.checkpoint import save_tensors
from pixlat.common.weights.runs import RunWeights, run_weights
from pixlat.evaluation.records.imported import imported_facts
from pixlat.evaluation.records.parents import lineage_of_record
from pixlat.evaluation.records.record import RESULT, Record, read_record
from pixlat.evaluation.score.models import saved_run
from pixlat.launch.job.folder import DATA, WEIGHTS
from pixlat.methods import MethodSpec, get_spec

FILES = (WEIGHTS, "config.yaml", DATA, "README.md")


def export_run(folder: Path, to: Path, ema: str | None, licence: str) -> str:
    """Writes the files, with class names if the run folder has them. ema: as in `pixlat evaluate`.

    Returns the paths of the files. They hold no frozen networks, like checkpoints.
    """
    run = saved_run(folder, {})
    weights = run_weights(folder, ema)
    if to.exists() and any(to.iterdir()):
        raise UserError(f"{to} is not empty. Choose another to=.")
    to.mkdir(parents=True, exist_ok=True)
    imported = imported_facts(folder, weights.facts)
    name = ema or run.eval.ema or next(iter(ema_names(run.train)), "raw")
    decay = decays_by_name(run.train).get(name)
    decay_text = "" if decay is None else str(decay)
    metadata = {
        "format": "pt",
        "method": run.method,
        "ema": name,
        "ema_decay": decay_text,
        "licence": licence,
        "checkpoint_sha256": weights.sha256,
    }
    # `pixlat import` compares this identity with the config.yaml beside the file
    metadata["config_identity"] = identity_of(weights.config)
    # which networks of others the run used, and on which runs it is built, for the records of whoever imports it
    if lineage := lineage_of(folder, imported or {}):
        metadata["lineage"] = json.dumps(lineage)
    save_tensors({key: tensor.contiguous() for key, tensor in weights.state.items()}, to / WEIGHTS, metadata)
    for file in ("config.yaml", DATA):
        if (folder / file).exists():
            shutil.copyfile(folder / file, to / file)
    write_whole(to / "README.md", card(folder, run, weights, imported or {}, name, licence, sha256_of(to / WEIGHTS)))
    return "\n".join(str(to / file) for file in FILES if (to / file).exists())


def lineage_of(folder: Path, imported: Mapping[str, Any]) -> dict[str, Any]:
    """The networks and earlier runs behind the weights; empty where neither a record nor an export told them."""
    if (folder / RESULT).exists():
        return lineage_of_record(read_record(folder / RESULT))
    return dict(imported.get("lineage") or {})


def card(
    folder: Path, run: RunConfig, weights: RunWeights, imported: Mapping[str, Any], ema: str, licence: str, sha256: str
) -> str:
    """The model card as Markdown, with the front matter that Hugging Face reads."""
    spec, preset = get_spec(run.method), run.preset
    record: Record = read_record(folder / RESULT) if (folder / RESULT).exists() else {}
    licence = licence or imported.get("licence", "")
    front = [
        "---",
        f"license: {licence.lower() or 'other'}",
        "library_name: pixlat",
        "pipeline_tag: unconditional-image-generation",
        "---",
    ]
    return "\n".join(
        [
            *front,
            "",
            f"# {folder.name}",
            "",
            f"{spec.title}.",
            "",
            f"Method: {spec.paper}; preset `{preset}`.",
            "",
            *origin(record, imported, weights, ema),
            "",
            *state_of(record, imported, weights, run.train),
            *scores(record),
            *networks(lineage_of(folder, imported)),
            *expected(spec, preset),
            "## Use",
            "",
            f"    pixlat import method={spec.name} file=FOLDER name={folder.name}",
            f"    pixlat evaluate run=runs/{folder.name}",
            "",
            (
                f"`{WEIGHTS}` (sha256 {sha256}) holds {len(weights.state)} tensors under pixlat's names, "
                "`config.yaml` every setting. Frozen networks are not in it."
            ),
            f"Licence of the weights: {licence or 'not stated'}.",
            "",
        ]
    )


def origin(record: Mapping[str, Any], imported: Mapping[str, Any], weights: RunWeights, ema: str) -> list[str]:
    """The origin of the weights: a released file, or a training."""
    if imported:
        return [
            (
                f"Imported from `{Path(imported['file']).name}` (sha256 {imported['sha256']}, "
                f"its `{imported['weights']}`), released by the authors."
            )
        ]
    data, train = weights.config["data"], record.get("train", {})
    seen = (
        f" on {train['images_seen']:,} images shown, batch {train['batch']}, {train['optimizer']}, {train['precision']}"
        if train
        else ""
    )
    commit = f", code {record['code']['git_sha'][:12]}" if record.get("code") else ""
    return [
        (
            f"Trained on {record.get('data', {}).get('name', data['name'])}{seen}{commit}. Weights: {ema}, "
            f"checkpoint sha256 {weights.sha256}."
        )
    ]


def state_of(
    record: Mapping[str, Any], imported: Mapping[str, Any], weights: RunWeights, train: TrainConfig
) -> list[str]:
    """How far an unfinished run came; nothing for finished and for imported runs."""
    if record or imported or "step" not in weights.facts:
        return []
    step = int(weights.facts["step"])
    seen = step * train.batch
    if seen < train.images:
        return [
            (
                f"**This run is not finished**: these weights are of step {step:,}, "
                f"after {seen:,} of {train.images:,} training images."
            ),
            "",
        ]
    return [
        f"**This run is not finished**: its training is (step {step:,}, {seen:,} images), its evaluation has not been.",
        "",
    ]


def scores(record: Mapping[str, Any]) -> list[str]:
    """The measured scores and their protocol."""
    if not record.get("metrics"):
        return ["Not evaluated.", ""]
    rows = [
        f"| {name} | {entry['value']:.5g} | {'' if entry.get('se') is None else format(entry['se'], '.2g')} |"
        for name, entry in record["metrics"].items()
    ]
    return [
        f"Protocol `{record['protocol_hash']}`: compare with rows of the same hash only.",
        "",
        "| metric | value | standard error |",
        "|---|---|---|",
        *rows,
        "",
    ]


def networks(lineage: Mapping[str, Any], via: str = "") -> list[str]:
    """The networks of others that the weights have met, and the runs that they are built on, as a list."""
    lines = [
        f"- {part['name']} ({part['role']}, sha256 {part['sha256'] or 'unknown'}){via}"
        for part in lineage.get("pretrained_components", [])
    ]
    for parent in lineage.get("parents", []):
        lines.append(f"- the run {parent['name']} (model.{parent['key']}, {parent['method']}){via}")
        lines += networks(parent, f", used by {parent['name']}")
    return lines if via or not lines else ["Made with these networks and runs:", "", *lines, ""]


def expected(spec: MethodSpec, preset: str) -> list[str]:
    """The published score of the preset."""
    score = published_score(spec, preset)
    return [f"Published for this preset: {score}.", ""] if score else []
