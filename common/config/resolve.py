"""Makes a checked `RunConfig` from the command line and a preset. Imports no torch.

Presets override the defaults of schema.py, and the command line overrides both.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pixlat.common.config.schema import DataConfig, RunConfig, Spec, TrainConfig, flatten
from pixlat.common.errors import UserError, close_match

PRECISIONS = ("auto", "bf16", "tf32", "fp32")  # common/precision.py explains them
UINT8_RULES = ("round", "truncate")
MIN_EVAL_IMAGES = 20  # the evaluator's jackknife forms 20 groups of images

# `data=folder` is short for `data.name=folder`.
GROUPS_WITH_NAME = ("data", "cluster")


def split_overrides(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Converts `["seed=0,1", "train.lr=1e-3"]` to `{"seed": ["0", "1"], "train.lr": ["1e-3"]}`.

    Commas inside brackets and quotes do not separate values.
    """
    overrides: dict[str, list[str]] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.strip().lstrip("-")
        if not equals or not key:
            example = f"{key}=jit" if key == "method" else "train.lr=1e-4"
            raise UserError(
                f"{argument!r} is not of the form key=value, for example {example}. `--help` lists the keys."
            )
        if key in overrides:
            raise UserError(
                f"{key} is given twice: {'='.join((key, ','.join(overrides[key])))} and {argument}. Keep one, "
                "or sweep with a comma list."
            )
        key = f"{key}.name" if key in GROUPS_WITH_NAME else key
        overrides[key] = re.split(r""",(?![^\[{]*[\]}])(?=(?:[^"']|"[^"]*"|'[^']*')*$)""", value)
    return overrides


def sweep(overrides: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """Yields every combination of the comma lists. The last key varies fastest."""
    for values in itertools.product(*overrides.values()):
        yield dict(zip(overrides, values, strict=True))


def load_presets(path: str) -> dict[str, dict[str, Any]]:
    """All presets of a presets.yaml, with `extends` resolved."""
    raw: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]

    def resolve(name: str) -> dict[str, Any]:
        preset = dict(raw[name])
        parent = preset.pop("extends", None)
        if parent is None:
            return preset
        merged = OmegaConf.merge(
            OmegaConf.create({k: v for k, v in resolve(parent).items() if k != "expected"}), OmegaConf.create(preset)
        )
        return OmegaConf.to_container(merged)  # type: ignore[return-value]

    return {name: resolve(name) for name in raw}


BESIDE_SETTINGS = ("about", "expected", "selection")  # what a preset says of itself; the rest are settings of a run


def settings_tried(spec: Spec, preset: str) -> dict[str, Any]:
    """How many settings were tried before this preset had its values, as in records: n_configs, n_samples, about.

    n_configs counts the chosen settings as well; n_samples is the number of samples of each by which they were
    compared, 0 if they were compared in another way. Presets with the settings of a paper say nothing; then it is 1.
    """
    said = load_presets(spec.presets).get(preset, {}).get("selection") or {}
    return {"n_configs": 1, "n_samples": 0, **said}


def published_score(spec: Spec, preset: str) -> str:
    """The score that the authors published for this preset, such as "FID 1.86, IS 303.4 (Table 7)"; "" if none."""
    score = dict(load_presets(spec.presets).get(preset, {}).get("expected") or {})
    source = score.pop("source", None)
    text = ", ".join(f"{name.upper() if len(name) < 4 else name} {value}" for name, value in score.items())
    return f"{text} ({source})" if text and source else text


HELP = "`pixlat train method={method} --help all` lists every key."


def resolve(spec: Spec, overrides: Mapping[str, str], advice: str = HELP) -> RunConfig:
    """The full configuration of one run of a method.

    Raises UserError for an unknown preset, an unknown key or a value of a wrong type; it suggests the nearest name.
    advice: the sentence that ends the message about an unknown key.
    """
    presets, advice = load_presets(spec.presets), advice.format(method=spec.name)
    preset_name = overrides.get("preset", RunConfig.preset)
    if preset_name not in presets:
        raise UserError(
            f"method={spec.name} has no preset {preset_name!r}.{close_match(preset_name, presets)} "
            f"Presets: {', '.join(presets)}."
        )
    config = OmegaConf.structured(RunConfig)
    config.model = OmegaConf.structured(spec.config)
    config.sample = OmegaConf.structured(spec.sample)
    settings = {k: v for k, v in presets[preset_name].items() if k not in BESIDE_SETTINGS}
    config = _merge(config, settings, where=f"preset {preset_name} in {spec.presets}", advice=advice)
    config.method = spec.name
    config = _merge(config, _parsed(overrides), where="the command line", advice=advice)
    try:
        run: RunConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{getattr(error, 'full_key', None) or 'a value'} does not fit: {reason}. "
            f"A value ${{key}} is replaced by the value of that key."
        ) from error
    check(run)
    return run


def _parsed(overrides: Mapping[str, str]) -> DictConfig:
    """The overrides as nested settings."""
    try:
        return OmegaConf.from_dotlist([f"{key}={value}" for key, value in overrides.items()])
    except (YAMLError, OmegaConfBaseException, AssertionError) as error:
        # an unclosed bracket, for example, or a key without a name
        if len(overrides) > 1:  # parse each override alone, so that the message names the faulty one
            for key, value in overrides.items():
                _parsed({key: value})
        shown = ", ".join(f"{key}={value}"[:80] for key, value in overrides.items())
        raise UserError(f"{shown} cannot be read: {str(error).partition(chr(10))[0] or 'it is no YAML'}.") from error


def _merge(config: DictConfig, settings: Any, where: str, advice: str) -> DictConfig:
    settings = OmegaConf.create(settings)
    if not settings:
        return config
    known = dict(flatten(OmegaConf.to_container(config)))
    for key, _ in flatten(OmegaConf.to_container(settings)):
        if inside := next((name for name in known if name.startswith(f"{key}.")), None):
            raise UserError(
                f"{where}: {key} is a group of keys; set one of them, for example {inside}={known[inside]}."
            )
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}.{close_match(key, known)} {advice}")
    try:
        return OmegaConf.merge(config, settings)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {misfit(error, config, settings)}") from error


KINDS = {
    "FloatNode": "a number, for example 0.5 or 1e-4",
    "IntegerNode": "a whole number, for example 2", "BooleanNode": "true or false",
    "StringNode": "a word", "ListConfig": "a list in brackets, for example",
    "TupleConfig": "a list in brackets, for example",
}  # fmt: skip
EXAMPLES = {"int": "[0,1]", "float": "[0.1,0.9]"}


def misfit(error: OmegaConfBaseException, config: DictConfig, settings: Any) -> str:
    """The message for a value of a wrong type: "train.lr=fast does not fit: it must be a number, for example 0.5 or
    1e-4." config: the configuration into which `settings` could not be merged.
    """
    key = re.sub(r"\[\d+\]$", "", getattr(error, "full_key", None) or "")
    if not key:
        return f"a value does not fit: {str(error).splitlines()[0]}."
    node: Any = config
    for part in key.split("."):
        node = node._get_node(part)
    value = dict(flatten(OmegaConf.to_container(settings))).get(key)
    wanted = KINDS.get(type(node).__name__, "another value")
    if wanted.endswith("for example"):
        of = next(iter(get_args(node._metadata.ref_type)), None)  # float for list[float] and for tuple[float, float]
        wanted += f" {EXAMPLES.get(getattr(of, '__name__', ''), '[a,b]')}"
    given = "null" if value is None else str(value).replace("'", "")
    return f"{key}={given} does not fit: it must be {wanted}."


def check(run: RunConfig) -> None:
    """Checks values beyond their types. Raises UserError that names the key, its value and the allowed values."""
    train = run.train
    at_least: dict[str, tuple[float, float]] = {
        "train.images": (train.images, 0), "train.batch": (train.batch, 1),
        "train.lr": (train.lr, 0), "train.warmup_images": (train.warmup_images, 0),
        "train.hold_images": (train.hold_images, 0),
        "train.clip_grad": (train.clip_grad, 0), "train.log_images": (train.log_images, 1),
        "train.checkpoint_images": (train.checkpoint_images, 1), "train.keep_checkpoints": (train.keep_checkpoints, 1),
        "train.preview_images": (train.preview_images, 0),
        "eval.num_images": (run.eval.num_images, 0), "eval.batch": (run.eval.batch, 1),
        "eval.grid_columns": (run.eval.grid_columns, 1), "data.workers": (run.data.workers, 0),
        "seed": (run.seed, 0), "cluster.nodes": (run.cluster.nodes, 1),
        "cluster.signal_delay_s": (run.cluster.signal_delay_s, 1),
        "cluster.max_timeouts": (run.cluster.max_timeouts, 0),
        "cluster.array_parallelism": (run.cluster.array_parallelism, 1),
        "eval.every_images": (run.eval.every_images, 0),
    }  # fmt: skip
    for key, (value, lowest) in at_least.items():
        if value < lowest:
            raise UserError(f"{key}={value} is too small; it must be at least {lowest}.")
    if 0 < run.eval.num_images < MIN_EVAL_IMAGES:
        raise UserError(
            f"eval.num_images={run.eval.num_images} is too small; error bars need at least {MIN_EVAL_IMAGES} images, "
            "and 0 skips the evaluation."
        )
    _check_name(run.name)
    for key, budget in (("budget.train_macs", run.budget.train_macs), ("budget.images", run.budget.images)):
        require(budget is None or budget > 0, key, budget, "must be positive")
    seeds = run.eval.seeds
    require(
        len(set(seeds)) == len(seeds) and min(seeds, default=0) >= 0,
        "eval.seeds",
        seeds,
        "must be different numbers from 0 on",
    )
    one_of("train.schedule", train.schedule, ("constant", "cosine", "linear"))
    one_of("train.precision", train.precision, PRECISIONS)
    one_of("eval.precision", run.eval.precision, PRECISIONS)
    one_of("eval.uint8", run.eval.uint8, UINT8_RULES)
    one_of("data.name", run.data.name, ("emoji32", "folder", "tar", "parquet", "arrow", "shards", "synthetic"))
    one_of("data.broken", run.data.broken, ("error", "skip"))
    one_of("data.modes", run.data.modes, ("convert", "strict"))
    require(
        run.cluster.collective_timeout_min > 0,
        "cluster.collective_timeout_min",
        run.cluster.collective_timeout_min,
        "must be positive",
    )
    check_crop(run.data, remember=getattr(run.model, "remember", False))
    one_of("cluster.sharding", run.cluster.sharding, ("ddp", "fsdp2"))
    one_of("eval.protocol", run.eval.protocol, ("embedded",))
    for tracker in train.trackers:
        one_of("train.trackers", tracker, ("tensorboard", "wandb"))
    if train.micro_batch is not None and (train.micro_batch < 1 or train.batch % train.micro_batch):
        raise UserError(f"train.micro_batch={train.micro_batch} does not divide train.batch={train.batch}.")
    if any(not 0 <= decay < 1 for decay in train.ema_decay):
        raise UserError(f"train.ema_decay={train.ema_decay}: every decay must be in [0, 1).")
    averages = ema_names(train)
    if run.eval.ema not in (None, "raw", *averages):
        raise UserError(
            f"eval.ema={run.eval.ema!r} is not an average of this run. Averages: {', '.join(averages) or 'none'}, "
            "and raw for the raw weights."
        )


def _check_name(name: str | None) -> None:
    """Raises UserError unless the run's folder lies below `out` and is not hidden: no table reads hidden folders."""
    parts = Path(name).parts if name is not None else ("run",)
    allowed = parts and not Path(*parts).is_absolute() and not any(part.startswith(".") for part in parts)
    require(
        bool(allowed), "name", name, "must be a folder's name below out=, without `..`, a leading `/` or a leading dot"
    )


def check_crop(data: DataConfig, remember: bool = False) -> None:
    """Raises UserError if the settings of random crops are invalid.

    Random crops also exclude anything that is computed once per image: stored latents and remembered encodings.
    """
    one_of("data.crop", data.crop, ("center", "random"))
    if data.crop == "center":
        require(
            data.resize is None,
            "data.resize",
            data.resize,
            "it applies to random crops only. Set data.crop=random, or data.resize=null",
        )
        return
    if data.resize is not None and data.resize < (data.image_size or 1):
        raise UserError(
            f"data.resize={data.resize} is smaller than data.image_size={data.image_size}, the size of the crops. "
            f"Set data.resize={data.image_size} or more."
        )
    if data.latents is not None:
        raise UserError(
            f"data.crop=random cuts another square each time, but data.latents={data.latents} holds latents "
            "of the centre squares. Leave data.latents out, or set data.crop=center."
        )
    if remember:
        raise UserError(
            "data.crop=random cuts another square each time, but model.remember=true keeps the encoding of the first "
            "square. Set model.remember=false, or data.crop=center."
        )


def one_of(key: str, value: str, options: Sequence[str]) -> None:
    """Raises UserError unless the value is one of the options."""
    if value not in options:
        raise UserError(f"{key}={value!r} is not one of {', '.join(options)}.{close_match(value, options)}")


def require(holds: bool, where: str, value: object, rule: str) -> None:
    """Raises UserError unless the condition holds. The message reads like "model.depth=0: must be at least 1."."""
    if not holds:
        raise UserError(f"{where}={value!r}: {rule}.")


def patches_a_side(image_size: int, patch: int) -> int:
    """Patches of `model.patch` pixels along a side of a square image; UserError if they do not divide it."""
    require(image_size % patch == 0, "model.patch", patch, f"must divide the image size {image_size}")
    return image_size // patch


def checked_interval(where: str, interval: Sequence[float]) -> tuple[float, float]:
    """Returns a guidance interval as a pair. Raises UserError unless 0 <= low < high <= 1."""
    require(len(interval) == 2, where, interval, "must be two numbers, [low, high]")
    low, high = interval
    require(0 <= low < high <= 1, where, (low, high), "must satisfy 0 <= low < high <= 1")
    return low, high


def ema_names(train: TrainConfig) -> list[str]:
    """The names of a run's weight averages: "0.9999" for a decay, then "500000img" for a half-life in images."""
    return [f"{decay:g}" for decay in train.ema_decay] + [
        f"{halflife:.0f}img" for halflife in train.ema_halflife_images
    ]


def evaluated_ema(run: RunConfig) -> str:
    """The name of the average that evaluation samples with, or "raw"."""
    return run.eval.ema or next(iter(ema_names(run.train)), "raw")


def sampling_seeds(run: RunConfig) -> list[int]:
    """The seeds of sampling. Each gives one evaluation."""
    return run.eval.seeds or [run.eval.seed]
