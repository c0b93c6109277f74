"""Turns an evaluation into a record and writes it. Imports no torch.

A model that was trained here already has a record, whose other fields the new record copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixlat.common.config.resolve import settings_tried
from pixlat.common.errors import UserError
from pixlat.common.origin import code_state
from pixlat.evaluation.protocols.identity import digest, protocol_hash
from pixlat.evaluation.records.contact import contact_fields
from pixlat.evaluation.records.record import RESULT, Record, build_record, write_record
from pixlat.evaluation.records.selection import with_evaluations, with_sweep
from pixlat.evaluation.score.origin import origin_of
from pixlat.methods import get_spec

if TYPE_CHECKING:
    from pixlat.evaluation.score.assess import Request
    from pixlat.evaluation.score.embedded import Evaluation
    from pixlat.evaluation.score.models import Model

UNTRIED: dict[str, Any] = {"n_configs": 1, "n_samples": 0, "swept": []}


def record_of_model(
    model: Model,
    evaluation: Evaluation,
    request: Request,
    sweep: Mapping[str, Any] | None = None,
    earlier: Sequence[Record] = (),
) -> Record:
    """The record of a model's evaluation.

    It copies the training fields from the run's record. Without such a record it holds only the known fields, and its
    kind is `evaluated`.
    sweep: n_configs, n_samples and swept of the sweep that chose these settings; None: no sweep did.
    earlier: records of the same model; those with other settings count as tries.
    """
    from pixlat.common.hardware import device_name
    from pixlat.evaluation.score.models import sampling_fields

    trained = model.record or {}
    of_training = ("kind", "data", "code", "train", "memory")
    copied: dict[str, Any] = {key: trained[key] for key in of_training if key in trained}
    info, origin = model.info, origin_of(model)
    described = sampling_fields(model, model.run.sample)
    now = {
        "checkpoint": model.checkpoint, "sampling": described["sampling"], "config": origin.config,
        "protocol": evaluation.protocol, "protocol_hash": protocol_hash(evaluation.protocol),
    }  # fmt: skip
    tried = settings_tried(get_spec(model.run.method), model.run.preset)
    return build_record(
        {
            "kind": "evaluated",
            "data": {
                "name": info.name, "revision": "unknown", "resolution": info.image_size,
                "num_classes": info.num_classes, "train_images": info.num_train,
            },
            **copied,
            **described,
            "parents": origin.parents,
            "config": origin.config,
            **contact_fields(*origin.met, evaluation.protocol),
            "speed": speed_fields(evaluation, request.batch, model.dtype, device_name(request.device)),
            "scored_by": code_state(),
            "name": model.name,
            "checkpoint": model.checkpoint,
            "seeds": {"train": model.run.seed, "sample": list(request.seeds)},
            "protocol": evaluation.protocol,
            "selection": with_sweep(tried, sweep) if sweep else with_evaluations(tried, now, earlier),
            "metrics": evaluation.metrics,
            **evaluation.judged,
            "artifacts": {},
            "notes": "",
        }
    )  # fmt: skip


def speed_fields(
    evaluation: Evaluation | None, batch: int, dtype: str, device: str, compiled: bool = False
) -> dict[str, Any]:
    """Sampling throughput of one device during an evaluation, in images/s. `pixlat bench` measures it separately.

    batch: images per device and batch. A process knows only its own images and seconds, so the rate is that of the
    process that writes the record.
    """
    from pixlat.evaluation.features.ranks import rank_and_size

    rate = evaluation.images_made / evaluation.sampling_seconds if evaluation and evaluation.sampling_seconds else None
    undrawn = evaluation.sampling_seconds - evaluation.drawing_seconds if evaluation else 0.0
    computed = evaluation.images_made / undrawn if evaluation and undrawn > 0 else None
    devices = rank_and_size()[1]
    return {
        "images_per_s": rate,
        "images_per_s_without_draws": computed,
        "devices": devices,
        "latency_s_b1": None,
        "batch": batch,
        "dtype": dtype,
        "device": device,
        "compiled": compiled,
    }


UNKNOWN = "unknown"  # the method and the space of finished images if the user does not give them
# the spaces in which a method may denoise, as in the record's schema
SPACES = ("pixel", "latent_vae", "latent_rae", "latent_self", UNKNOWN)


def record_of_images(
    name: str,
    resolution: int,
    evaluation: Evaluation,
    npz_sha256: str | None,
    method: str = UNKNOWN,
    space: str = UNKNOWN,
    made_with: Mapping[str, Any] | None = None,
) -> Record:
    """The record of finished images. `method` and `space` are what the user says about their origin.

    made_with: `pretrained_components`, `parents`, `config` and `selection` of the model that made them; None: not
        known, and then the record does not say which judges they have met.
    """
    origin, contact = dict(made_with or {}), {}
    if made_with:
        contact = contact_fields(made_with["pretrained_components"], made_with["parents"], evaluation.protocol)
    unknown = {"variant": None, "size": None, "space": space, "prediction": None, "loss_space": None, "sampler": None}
    return build_record(
        {
            "kind": "evaluated",
            "name": name,
            "system": {"method": method, **unknown},
            "data": {
                "name": evaluation.protocol["reference"]["id"],
                "revision": "unknown",
                "resolution": resolution,
                "num_classes": 0,
                "train_images": 0,
            },
            "scored_by": code_state(),
            "selection": dict(UNTRIED),
            **contact,
            **origin,
            "protocol": evaluation.protocol,
            "metrics": evaluation.metrics,
            **evaluation.judged,
            "artifacts": {"samples_npz_sha256": npz_sha256},
            "notes": "finished images" if made_with else "finished images: how they were made is not known here",
        }
    )


def keep(record: Record, parent: Path, settings: Any) -> Path:
    """Writes the record into a folder below `parent` and returns the file's path.

    The folder's name contains the protocol and a digest of the settings, so that every evaluation has its own folder.
    """
    protocol = record["protocol"]
    name = protocol["name"] if "name" in protocol else protocol["extractor"]["id"]
    folder = parent / f"{name}-{protocol_hash(protocol)[:6]}-{digest(settings)[:6]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_record(record, folder / RESULT)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}. Choose another out=.") from error
    return folder / RESULT


def table(record: Record) -> str:
    """The metrics as text for a terminal."""
    return "\n".join(f"  {name:<20} {_value(metric)}" for name, metric in record["metrics"].items())


def _value(metric: Mapping[str, Any]) -> str:
    parts = [f"{metric['value']:.5g}"]
    if metric.get("se") is not None:
        parts.append(f"± {metric['se']:.2g}")
    if metric.get("value_bc") is not None:
        parts.append(f"(bias-corrected {metric['value_bc']:.5g})")
    if metric.get("sd_seeds") is not None:
        parts.append(f"over {len(metric['values'])} seeds, sd {metric['sd_seeds']:.2g}")
    return " ".join([*parts, f"n={metric['n']}"])
