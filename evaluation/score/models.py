"""Loads a trained method for sampling, from a run folder or from a released file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixlat.common.config.identity import differences, identity, identity_of
from pixlat.common.config.resolve import evaluated_ema, resolve, split_overrides, sweep
from pixlat.common.config.saved import check_config, read_config
from pixlat.common.config.schema import RunConfig, flatten, to_dict
from pixlat.common.errors import UserError
from pixlat.common.files import split_rows
from pixlat.evaluation.records.imported import imported_facts
from pixlat.evaluation.records.record import RESULT, Record, read_record
from pixlat.methods import get_class, get_spec

if TYPE_CHECKING:
    import torch

    from pixlat.common.accounting.macs import SamplingCost
    from pixlat.methods.base import DataInfo, Description, Method


ADVICE = "`--help` lists the command's keys, `pixlat train method={method} --help all` those of sample, model and data."


@dataclass(frozen=True)
class Model:
    """A method with its weights on a device, in evaluation mode."""

    method: Method
    run: RunConfig  # the settings of its training, and those of its sampling
    info: DataInfo
    name: str
    checkpoint: dict[str, Any]  # the field `checkpoint` of records
    record: Record | None  # the record of its run; None if the run is not finished
    dtype: str  # the precision in which it samples: float32, tf32 or bfloat16
    #: `run` with the word `train` where its stages were trained with it; None: `run` names no such stage
    named: RunConfig | None = None
    lineage: dict[str, Any] | None = None  # of an import of `pixlat export`: the networks and runs behind the weights


def saved_run(folder: Path, overrides: Mapping[str, str]) -> RunConfig:
    """The configuration of a run folder for sampling.

    It applies the overrides, fills in the folders of earlier stages, and removes stored latents, which only training
    reads.
    """
    return with_stage_folders(folder, named_run(folder, overrides))


def named_run(folder: Path, overrides: Mapping[str, str]) -> RunConfig:
    """The same with the word `train` in the place of earlier stages that were trained with the run."""
    check_saved(folder)
    settings = saved_settings(folder) | {"data.latents": "null"} | dict(overrides)
    return resolve(get_spec(str(json.loads(settings["method"]))), settings, ADVICE)


def with_stage_folders(folder: Path, run: RunConfig) -> RunConfig:
    """The configuration with the folders of earlier stages in the place of the word `train`."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **stage_folders(folder, run)))


def saved_settings(folder: Path) -> dict[str, str]:
    """Every key of a folder's config.yaml with its value as on the command line."""
    saved = read_config(folder)
    return {key: json.dumps(value) for key, value in flatten(saved)} | {"preset": str(saved.get("preset"))}


def check_saved(folder: Path) -> None:
    """Raises UserError if config.yaml was changed after the newest checkpoint was written.

    Runs before anything uses the settings or reads large files.
    """
    from pixlat.common.weights import checkpoint

    saved = checkpoint.latest(folder / "checkpoints", stems=())
    if saved is None:
        return
    settings, facts = read_config(folder), checkpoint.load_facts(saved)
    try:
        check_config(folder, settings, saved, facts)
    except UserError as error:
        changed = changed_settings(folder, settings, facts.get("config_identity", facts["identity"]))
        detail = f"Changed since: {'; '.join(changed[:8])}." if changed else "The changed setting could not be found."
        raise UserError(f"{error} {detail}") from error


def changed_settings(folder: Path, settings: Mapping[str, Any], expected: str) -> list[str]:
    """The settings that were changed, such as `"model.clip: 0.05 -> 0.25"`.

    It looks for a configuration with the expected identity among the recorded commands and the preset. If there is
    none, the list is empty.
    """
    for original in original_runs(folder, settings):
        if identity(original) == expected:
            return differences(to_dict(original), settings)
        usual, now = dict(flatten(to_dict(original))), dict(flatten(settings))
        for key in (key for key in now if key in usual and now[key] != usual[key]):
            if identity_of(now | {key: usual[key]}) == expected:
                return [f"{key}: {usual[key]} -> {now[key]}"]
    return []


def original_runs(folder: Path, settings: Mapping[str, Any]) -> Iterator[RunConfig]:
    """Configurations that the folder may have had: those of the commands in starts.jsonl, and that of its preset."""
    commands = [str(row.get("command", "")) for row in split_rows(folder / "starts.jsonl")[0]]
    for command in (*commands, f"run.py method={settings['method']} preset={settings.get('preset')}"):
        # skips other kinds of commands and commands of another version of the code; a UserError is a ValueError
        with contextlib.suppress(ValueError):
            # the command may be `pixlat train method=...` or `launch/run.py method=...`
            words = [word for word in shlex.split(command)[1:] if word != "train"]
            for overrides in sweep(split_overrides(words)):
                yield resolve(
                    get_spec(overrides.get("method", RunConfig.method)), {"preset": RunConfig.preset} | overrides
                )


def stage_folders(folder: Path, run: RunConfig) -> dict[str, str]:
    """The folders of earlier stages that this run's configuration calls `train`, by key.

    They lie beside the run's folder and have the names in its record.
    """
    waiting = [stage.key for stage in get_spec(run.method).stages if getattr(run.model, stage.key) == "train"]
    if not waiting:
        return {}
    parents = {parent["key"]: parent["name"] for parent in (finished(folder) or {}).get("parents", [])}
    folders = {key: folder.parent / parents[key] for key in waiting if key in parents}
    for key in waiting:
        if key not in folders or not folders[key].is_dir():
            raise UserError(
                f"{folder} depends on an earlier run, which is not beside it. Give its folder as model.{key}=FOLDER."
            )
    return {key: str(path) for key, path in folders.items()}


def finished(folder: Path) -> Record | None:
    """The record of a run folder; None if the run is not finished."""
    return read_record(folder / RESULT) if (folder / RESULT).exists() else None


def load_run(folder: Path, overrides: Mapping[str, str], ema: str | None, device: torch.device) -> Model:
    """Loads the newest complete checkpoint of a run folder.

    ema: which average of the weights to load; None: the one that the run evaluates.
    """
    from pixlat.common.precision import executed_precision
    from pixlat.common.training.ema import decays_by_name
    from pixlat.common.training.state import load_state_without_external
    from pixlat.common.weights.runs import run_weights

    named = named_run(folder, overrides)
    run = with_stage_folders(folder, named)
    weights = run_weights(folder, ema)
    method, info = build(run)
    load_state_without_external(method, weights.state)
    name = ema or evaluated_ema(run)
    decays = decays_by_name(run.train)
    record = finished(folder)
    step = (record or {}).get("checkpoint", {}).get("step")
    checkpoint = {"sha256": weights.sha256, "step": step, "ema_decay": decays.get(name), "ema_kind": name}
    if (origin := imported_facts(folder, weights.facts)) is not None:
        checkpoint = {
            "sha256": origin["sha256"],
            "step": None,
            "ema_decay": origin["ema_decay"],
            "ema_kind": origin["weights"],
        }
    return Model(
        method.to(device).eval(),
        run,
        info,
        folder.name,
        checkpoint,
        record,
        executed_precision(run.eval.precision, device),
        dataclasses.replace(named, eval=dataclasses.replace(named.eval, ema=name)),
        (origin or {}).get("lineage"),
    )


def load_released(
    file: Path, method_name: str, preset: str, overrides: Mapping[str, str], device: torch.device
) -> Model:
    """Loads a released file with weights in their authors' format."""
    from pixlat.common.files import sha256_of
    from pixlat.common.precision import executed_precision
    from pixlat.common.training.state import load_state_without_external
    from pixlat.common.weights.tensors import read_tensors

    run = resolve(get_spec(method_name), {**overrides, "preset": preset}, ADVICE)
    method, info = build(run)
    load_state_without_external(method, method.from_reference(read_tensors(file)))
    checkpoint = {"sha256": sha256_of(file), "step": None, "ema_decay": None, "ema_kind": "released"}
    return Model(
        method.to(device).eval(), run, info, file.stem, checkpoint, None, executed_precision(run.eval.precision, device)
    )


def build(run: RunConfig) -> tuple[Method, DataInfo]:
    """The method of a configuration, with loaded external networks and with its initial weights."""
    from pixlat.common.datasets.load import summarise
    from pixlat.methods.base import DataInfo

    info = DataInfo.of(summarise(run.data))
    method = get_class(run.method)(run.model, info)
    method.load_external()
    return method, info


def sampling_fields(model: Model, sample: Any) -> dict[str, Any]:
    """The record's fields about the system, its size and the cost of a sample with these sampling settings."""
    from pixlat.common.accounting.macs import on_meta, sampling_cost

    described = model.method.describe(sample)
    bare = on_meta(get_class(model.run.method), model.run.model, model.info)
    cost = sampling_cost(bare, sample)
    return {
        "system": system_fields(model.run, described, model.method.space),
        "pretrained_components": [dataclasses.asdict(component) for component in described.pretrained],
        **cost_fields(bare, described, cost, model.dtype),
    }


def system_fields(run: RunConfig, described: Description, space: str) -> dict[str, Any]:
    """The record's fields about the method and its sampler. space: the space in which it generates (`Method.space`)."""
    return {
        "method": run.method,
        "variant": described.variant,
        "size": described.size or run.preset,
        "space": space,
        "prediction": described.prediction,
        "loss_space": described.loss_space,
        "sampler": described.sampler,
    }


def cost_fields(method: Method, described: Description, cost: SamplingCost, dtype: str) -> dict[str, Any]:
    """The record's fields about the cost of an image and the number of parameters.

    method: on the meta device; cost: of one image; dtype: the precision of sampling.
    """
    from pixlat.common.accounting.macs import parameter_counts

    return {
        "sampling": {
            "steps": described.steps,
            "nfe_evals": cost.nfe,
            "net_forwards": sum(cost.net_forwards.values()),
            "guidance": described.guidance,
            "guidance_scale": described.guidance_scale,
            "interval": None if described.interval is None else list(described.interval),
            "dtype": dtype,
        },
        "params": dataclasses.asdict(parameter_counts(method)),
        "compute": {
            "macs_per_forward": max(
                (macs for name, macs in cost.macs_per_forward.items() if name != "decoder"), default=0
            ),
            "macs_decoder": cost.macs_decoder,
            "macs_per_image": cost.macs_per_image,
            "attention_counted": True,
            "counter": "torch.utils.flop_counter on the meta device, 1 MAC = 1 multiply-accumulate",
        },
    }
