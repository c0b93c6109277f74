"""The run configuration: dataclasses, presets and `key=value` overrides, strict and torch-free.

Order of precedence: the defaults below, the method's own defaults, the preset, the command line.
The comment behind a field is its help text (`python launch/run.py method=jit --help`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.errors import UserError, close_match


@dataclass
class DataConfig:
    """What is trained on."""

    name: str = "emoji32"  # emoji32 (embedded), folder (your images, one sub-folder a class), tar, parquet, arrow, shards (cropped before) or synthetic
    path: str | None = None  # folder of the images, or of the files that hold them
    image_size: int | None = None  # pixels; emoji32 has 32, a folder needs it
    num_classes: int | None = None  # expected number of classes; another number in the data is an error
    flip: bool = False  # mirror half of the training images
    crop: str = "center"  # the square of a training image: center (ADM's), or random (drawn anew each time; held-out images keep the centre)
    resize: int | None = None  # pixels of the shorter side of which random crops are cut; none: image_size
    balanced: bool | None = None  # draw classes uniformly; none: yes for emoji32, no otherwise
    holdout: float = 0.05  # held-out share of a folder that has no val/ of its own
    latents: str | None = None  # folder of stored latents of the training images: of `launch/prepare.py latents`, or in REPA's released layout
    workers: int = 0  # loader processes; 0 loads in the training process
    broken: str = "error"  # images that cannot be read: error, or skip (named and counted; the next of its class stands in for it)
    modes: str = "convert"  # CMYK, palette, 16-bit and transparent images: convert (to RGB, as ADM's code does) or strict (they are broken)


@dataclass
class TrainConfig:
    """How long, with what optimizer, and what is kept; everything is counted in images."""

    images: int = 50_000  # training images shown in total; 0 evaluates the untrained network
    batch: int = 64  # global batch: images a step over all processes
    micro_batch: int | None = None  # images a process takes at once; none: batch / processes of the first start, which a resumed run keeps
    lr: float = 1e-3  # peak learning rate
    warmup_images: int = 0  # linear warm-up from 0
    hold_images: int = 0  # images at the peak after the warm-up, before cosine or linear begin
    schedule: str = "constant"  # constant, cosine or linear, from the end of warm-up and hold to the last image
    min_lr: float = 0.0  # where cosine and linear end
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # of AdamW, and of Nesterov Adam where a method asks for it
    eps: float = 1e-8  # of both
    weight_decay: float = 0.0  # of AdamW and Muon, unless a parameter group says otherwise
    clip_grad: float = 0.0  # global gradient norm; 0 does not clip
    ema_decay: list[float] = field(default_factory=list)  # one average a decay per step, e.g. [0.9999,0.9996]; a short run has shorter ones (common/ema.py)
    ema_halflife_images: list[float] = field(default_factory=list)  # one average a half-life in images, e.g. [5e5]
    ema_rampup: float = 0.0  # a half-life is at most this share of the images seen so far; 0 is off
    precision: str = "auto"  # auto, bf16, tf32 or fp32 (common/precision.py); auto: bf16 autocast on GPUs that multiply it, fp32 elsewhere
    compile: bool = False  # torch.compile for each block of the network
    recompute_blocks: bool = False  # keep only the inputs of each block and compute it again in the backward pass: less memory, a third more work
    threads: int | None = None  # CPU threads; none: torch's choice
    log_images: int = 3200  # a line of metrics.jsonl every so many images
    checkpoint_images: int = 16_000  # a checkpoint every so many images
    keep_checkpoints: int = 2  # newest checkpoints that stay
    preview_images: int = 16_000  # a sample grid every so many images; 0 is off
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb (pip install 'pixlat[trackers]')


@dataclass
class BudgetConfig:
    """How long, in the place of train.images, so that runs can be compared at equal cost; schedules follow. The first budget to be reached ends the run."""

    train_macs: float | None = None  # MACs of training, earlier stages included; the images that they allow are counted before the run starts
    images: int | None = None  # training images


@dataclass
class EvalConfig:
    """What is sampled and scored after the training, and with every_images during it."""

    protocol: str = "embedded"  # how the score is computed; see evaluation/README.md
    num_images: int = 1000  # generated images; 0 skips the evaluation
    batch: int = 50  # images sampled at once
    seed: int = 0  # of the noise and of the label order
    seeds: list[int] = field(default_factory=list)  # several of them, e.g. [0,1,2]: num_images with each, mean and spread are recorded; none: seed alone
    every_images: int = 0  # a line of curve.jsonl, the scores so far, every so many training images; 0 is off
    precision: str = "fp32"  # sampling in auto, bf16, tf32 or fp32 (common/precision.py); part of the score's protocol
    uint8: str = "round"  # sampled pixels become uint8 by round (half to even) or truncate, as RAE, REPA and REG do; part of the score's protocol
    ema: str | None = None  # which average to sample with, e.g. 0.999; none: the first one, or the raw weights if there is none; raw: the raw weights
    grid_columns: int = 10  # images a class in the sample grid


@dataclass
class ClusterConfig:
    """Where the run works, on how many processes. Nothing here changes a result; launch/README.md tells how a job lives."""

    name: str = "here"  # here (this process), local (several processes of this machine), slurm, or a site's file (launch/clusters/README.md)
    nodes: int = 1  # machines
    gpus_per_node: int | None = None  # GPUs of each machine, one process for each; 0 computes on CPUs; slurm needs it
    gpu_type: str | None = None  # kind of GPU where a cluster has several, e.g. a100 (with gpus_per_node=8: --gpus-per-node=a100:8)
    tasks_per_node: int | None = None  # processes a machine; none: one for each GPU, or one
    sharding: str = "ddp"  # ddp (every process holds everything) or fsdp2 (parameters, gradients and optimizer state are spread over the processes)
    collective_timeout_min: float = 360.0  # minutes that a process waits for the others, e.g. while the first one writes a large checkpoint
    cpus_per_task: int | None = None  # CPU cores a process, loader processes included; none: the cluster's default
    mem_gb: float | None = None  # memory a machine; 0 is all of it, none the cluster's default
    timeout_min: int | None = None  # minutes until the job is requeued or ended; slurm needs it
    max_timeouts: int = 30  # how often a job may run into its time limit and go on
    signal_delay_s: int = 120  # seconds between the warning and the end; more than the longest ten steps and one checkpoint take
    partition: str | None = None  # slurm needs it; `sinfo -s` lists them
    account: str | None = None  # who pays
    qos: str | None = None  # quality of service
    constraint: str | None = None  # features of the machines
    nodelist: str | None = None  # only these machines
    exclude: str | None = None  # not these machines
    exclusive: bool = False  # share no machine with other jobs
    reservation: str | None = None  # reserved machines
    dependency: str | None = None  # e.g. afterok:1234; earlier stages are added by themselves
    array_parallelism: int = 16  # runs of a sweep that work at the same time
    comment: str | None = None  # shown by the scheduler
    mail_user: str | None = None  # who is told
    mail_type: str | None = None  # of what, e.g. END,FAIL
    setup: list[str] = field(default_factory=list)  # shell lines before the run, e.g. ["module load cuda", "export NCCL_DEBUG=WARN"]
    srun_args: list[str] | None = None  # arguments of srun; none: --kill-on-bad-exit=1 --cpus-per-task=N
    python: str | None = None  # the command that is Python in the job, e.g. "singularity exec --nv image.sif python"; none: this Python
    sbatch: list[str] = field(default_factory=list)  # other options of sbatch, e.g. ["nice", "gres=gpu:a100:8"], which replaces --gpus-per-node
    snapshot: bool = True  # run a copy of the code as it is now, whatever becomes of the checkout

    def tasks_a_node(self) -> int:
        """Processes on each machine."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def processes(self) -> int:
        """Processes in all."""
        return self.nodes * self.tasks_a_node()


@dataclass
class RunConfig:
    """One run."""

    method: str = "jit"  # what to train; see the list of methods
    preset: str = "demo"  # named settings of the method; see the list of presets
    name: str | None = None  # run folder under `out`; none: from method, data, preset, seed and settings
    out: str = "runs"  # where run folders are made
    seed: int = 0  # of weights, data order, noise and dropout
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    model: Any = None  # the method's own settings
    sample: Any = None  # the method's sampler
    eval: EvalConfig = field(default_factory=EvalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    dry_run: bool = False  # print what would run and what it costs; write nothing


PRECISIONS = ("auto", "bf16", "tf32", "fp32")  # common/precision.py says what they are
UINT8_RULES = ("round", "truncate")
MIN_EVAL_IMAGES = 20  # one for each group that the evaluator's jackknife leaves out

# Settings that change neither a weight nor a score: two runs that differ only here are the same run.
INERT_KEYS = (
    "name", "out", "dry_run", "data.workers", "data.broken", "train.recompute_blocks", "train.threads", "train.trackers", "train.keep_checkpoints",
    "eval.batch", "eval.grid_columns", "eval.every_images",
)  # fmt: skip
INERT_GROUPS = ("cluster.", "budget.")  # a budget only says how `train.images` was found

# Keys that came after runs had been made, with the value that those runs had: a run does not become another one because a key was added.
LATER_KEYS: dict[str, Any] = {
    "data.modes": "convert",
    "data.latents": None,
    "data.crop": "center",
    "data.resize": None,
    "train.hold_images": 0,
    "eval.seeds": [],
    "eval.precision": "fp32",
    "eval.uint8": "round",
}

# `data=folder` is short for `data.name=folder`.
GROUPS_WITH_NAME = ("data", "cluster")


def split_overrides(arguments: Sequence[str]) -> dict[str, list[str]]:
    """`["seed=0,1", "train.lr=1e-3"]` to `{"seed": ["0", "1"], "train.lr": ["1e-3"]}`; commas inside brackets and quotes do not split."""
    overrides: dict[str, list[str]] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.strip().lstrip("-")
        if not equals or not key:
            example = f"{key}=jit" if key == "method" else "train.lr=1e-4"
            raise UserError(f"{argument!r} is not of the form key=value, for example {example}. `method=jit --help` lists every key.")
        if key in overrides:
            raise UserError(f"{key} is given twice: {'='.join((key, ','.join(overrides[key])))} and {argument}. Keep one, or sweep with a comma list.")
        key = f"{key}.name" if key in GROUPS_WITH_NAME else key
        overrides[key] = re.split(r""",(?![^\[{]*[\]}])(?=(?:[^"']|"[^"]*"|'[^']*')*$)""", value)
    return overrides


def sweep(overrides: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """Every combination of the comma lists, the last key varying fastest."""
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
        merged = OmegaConf.merge(OmegaConf.create({k: v for k, v in resolve(parent).items() if k != "expected"}), OmegaConf.create(preset))
        return OmegaConf.to_container(merged)  # type: ignore[return-value]

    return {name: resolve(name) for name in raw}


def published_score(spec: Spec, preset: str) -> str:
    """ "FID 1.86, IS 303.4 (Table 7)": what the preset's row was published with; empty where nothing was."""
    score = dict(load_presets(spec.presets).get(preset, {}).get("expected") or {})
    source = score.pop("source", None)
    told = ", ".join(f"{name.upper() if len(name) < 4 else name} {value}" for name, value in score.items())
    return f"{told} ({source})" if told and source else told


class Spec(Protocol):
    """What the configuration needs to know of a method (`methods.MethodSpec`)."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> type: ...
    @property
    def sample(self) -> type: ...
    @property
    def presets(self) -> str: ...


HELP = "`python launch/run.py method=jit --help` lists every key."


def resolve(spec: Spec, overrides: Mapping[str, str], advice: str = HELP) -> RunConfig:
    """The full configuration of one run of a method. Unknown presets and keys and wrong types are UserErrors with the nearest valid word."""
    presets = load_presets(spec.presets)
    preset_name = overrides.get("preset", RunConfig.preset)
    if preset_name not in presets:
        raise UserError(f"method={spec.name} has no preset {preset_name!r}.{close_match(preset_name, presets)} Presets: {', '.join(presets)}.")
    config = OmegaConf.structured(RunConfig)
    config.model = OmegaConf.structured(spec.config)
    config.sample = OmegaConf.structured(spec.sample)
    settings = {k: v for k, v in presets[preset_name].items() if k not in ("about", "expected")}
    config = _merge(config, settings, where=f"preset {preset_name} in {spec.presets}")
    config.method = spec.name
    config = _merge(config, _parsed(overrides), where="the command line", advice=advice)
    try:
        run: RunConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{getattr(error, 'full_key', None) or 'a value'} does not fit: {reason}. A value with ${{...}} stands for another key's.") from error
    check(run)
    return run


def _parsed(overrides: Mapping[str, str]) -> DictConfig:
    """The overrides as nested settings."""
    try:
        return OmegaConf.from_dotlist([f"{key}={value}" for key, value in overrides.items()])
    except (YAMLError, OmegaConfBaseException, AssertionError) as error:  # a bracket that is not closed, a key without a name
        if len(overrides) > 1:  # the one that is at fault
            for key, value in overrides.items():
                _parsed({key: value})
        shown = ", ".join(f"{key}={value}"[:80] for key, value in overrides.items())
        raise UserError(f"{shown} cannot be read: {str(error).partition(chr(10))[0] or 'it is no YAML'}.") from error


def _merge(config: DictConfig, settings: Any, where: str, advice: str = HELP) -> DictConfig:
    settings = OmegaConf.create(settings)
    known = dict(flatten(OmegaConf.to_container(config)))
    for key, _ in flatten(OmegaConf.to_container(settings)):
        if inside := next((name for name in known if name.startswith(f"{key}.")), None):
            raise UserError(f"{where}: {key} is a group of keys; set one of them, for example {inside}={known[inside]}.")
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}.{close_match(key, known)} {advice}")
    try:
        return OmegaConf.merge(config, settings)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {misfit(error, config, settings)}") from error


KINDS = {
    "FloatNode": "a number, for example 0.5 or 1e-4", "IntegerNode": "a whole number, for example 2", "BooleanNode": "true or false",
    "StringNode": "a word", "ListConfig": "a list in brackets, for example", "TupleConfig": "a list in brackets, for example",
}  # fmt: skip
EXAMPLES = {"int": "[0,1]", "float": "[0.1,0.9]"}


def misfit(error: OmegaConfBaseException, config: DictConfig, settings: Any) -> str:
    """ "train.lr=fast does not fit: it must be a number, for example 0.5 or 1e-4." for a value of the wrong type; config: what it was merged into."""
    key = re.sub(r"\[\d+\]$", "", getattr(error, "full_key", None) or "")
    if not key:
        return f"a value does not fit: {str(error).splitlines()[0]}."
    node: Any = config
    for part in key.split("."):
        node = node._get_node(part)
    value = dict(flatten(OmegaConf.to_container(settings))).get(key)
    wanted = KINDS.get(type(node).__name__, "another value")
    if wanted.endswith("for example"):
        wanted += f" {EXAMPLES.get(getattr(getattr(node._metadata, 'element_type', None), '__name__', ''), '[a,b]')}"
    given = "null" if value is None else str(value).replace("'", "")
    return f"{key}={given} does not fit: it must be {wanted}."


def check(run: RunConfig) -> None:
    """Values that no type can check. Every message names the key, its value and what is allowed."""
    train = run.train
    at_least: dict[str, tuple[float, float]] = {
        "train.images": (train.images, 0), "train.batch": (train.batch, 1), "train.lr": (train.lr, 0), "train.warmup_images": (train.warmup_images, 0),
        "train.hold_images": (train.hold_images, 0), "train.clip_grad": (train.clip_grad, 0), "train.log_images": (train.log_images, 1),
        "train.checkpoint_images": (train.checkpoint_images, 1), "train.keep_checkpoints": (train.keep_checkpoints, 1),
        "train.preview_images": (train.preview_images, 0), "eval.num_images": (run.eval.num_images, 0), "eval.batch": (run.eval.batch, 1),
        "eval.grid_columns": (run.eval.grid_columns, 1), "data.workers": (run.data.workers, 0), "seed": (run.seed, 0), "cluster.nodes": (run.cluster.nodes, 1),
        "cluster.signal_delay_s": (run.cluster.signal_delay_s, 1), "cluster.max_timeouts": (run.cluster.max_timeouts, 0),
        "cluster.array_parallelism": (run.cluster.array_parallelism, 1), "eval.every_images": (run.eval.every_images, 0),
    }  # fmt: skip
    for key, (value, lowest) in at_least.items():
        if value < lowest:
            raise UserError(f"{key}={value} is too small; it must be at least {lowest}.")
    if 0 < run.eval.num_images < MIN_EVAL_IMAGES:
        raise UserError(f"eval.num_images={run.eval.num_images} is too small; error bars need at least {MIN_EVAL_IMAGES} images, and 0 skips the evaluation.")
    _check_name(run.name)
    for key, budget in (("budget.train_macs", run.budget.train_macs), ("budget.images", run.budget.images)):
        require(budget is None or budget > 0, key, budget, "must be positive")
    seeds = run.eval.seeds
    require(len(set(seeds)) == len(seeds) and min(seeds, default=0) >= 0, "eval.seeds", seeds, "must be different numbers from 0 on")
    one_of("train.schedule", train.schedule, ("constant", "cosine", "linear"))
    one_of("train.precision", train.precision, PRECISIONS)
    one_of("eval.precision", run.eval.precision, PRECISIONS)
    one_of("eval.uint8", run.eval.uint8, UINT8_RULES)
    one_of("data.name", run.data.name, ("emoji32", "folder", "tar", "parquet", "arrow", "shards", "synthetic"))
    one_of("data.broken", run.data.broken, ("error", "skip"))
    one_of("data.modes", run.data.modes, ("convert", "strict"))
    require(run.cluster.collective_timeout_min > 0, "cluster.collective_timeout_min", run.cluster.collective_timeout_min, "must be positive")
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
        raise UserError(f"eval.ema={run.eval.ema!r} is not an average of this run. Averages: {', '.join(averages) or 'none'}, and raw for the raw weights.")


def _check_name(name: str | None) -> None:
    """A run's folder lies below `out`: `..`, an absolute path and a hidden folder (which no table reads) are refused."""
    parts = Path(name).parts if name is not None else ("run",)
    allowed = parts and not Path(*parts).is_absolute() and not any(part.startswith(".") for part in parts)
    require(bool(allowed), "name", name, "must be a folder's name below out=, without `..`, a leading `/` or a leading dot")


def check_crop(data: DataConfig, remember: bool = False) -> None:
    """UserError where random crops cannot be made, or where something was computed once for an image that now looks different each time."""
    one_of("data.crop", data.crop, ("center", "random"))
    if data.crop == "center":
        require(data.resize is None, "data.resize", data.resize, "only random crops are cut of a resized image. Set data.crop=random, or data.resize=null")
        return
    if data.resize is not None and data.resize < (data.image_size or 1):
        raise UserError(f"data.resize={data.resize} is smaller than the squares that are cut of it. Set at least data.image_size={data.image_size}.")
    if data.latents is not None:
        raise UserError(
            f"data.crop=random cuts another square each time, and data.latents={data.latents} holds latents of the centres. "
            "Leave data.latents out, or set data.crop=center."
        )
    if remember:
        raise UserError(
            "data.crop=random cuts another square each time, and model.remember=true keeps the encoding of the first one. "
            "Set model.remember=false, or data.crop=center."
        )


def one_of(key: str, value: str, options: Sequence[str]) -> None:
    """Raises a UserError unless the value is one of the options."""
    if value not in options:
        raise UserError(f"{key}={value!r} is not one of {', '.join(options)}.{close_match(value, options)}")


def require(holds: bool, where: str, value: object, rule: str) -> None:
    """Raises UserError "model.depth=0: must be at least 1." unless the condition holds."""
    if not holds:
        raise UserError(f"{where}={value!r}: {rule}.")


def checked_interval(where: str, interval: Sequence[float]) -> tuple[float, float]:
    """A guidance interval as a pair with 0 <= low < high <= 1; anything else is a UserError."""
    require(len(interval) == 2, where, interval, "must be two numbers, [low, high]")
    low, high = interval
    require(0 <= low < high <= 1, where, (low, high), "must satisfy 0 <= low < high <= 1")
    return low, high


def ema_names(train: TrainConfig) -> list[str]:
    """The names of a run's weight averages, in order: "0.9999" for a decay, "500000img" for a half-life in images."""
    return [f"{decay:g}" for decay in train.ema_decay] + [f"{halflife:.0f}img" for halflife in train.ema_halflife_images]


def evaluated_ema(run: RunConfig) -> str:
    """The name of the average that is sampled with, or "raw"."""
    return run.eval.ema or next(iter(ema_names(run.train)), "raw")


def sampling_seeds(run: RunConfig) -> list[int]:
    """The seeds that the run is sampled with, one evaluation each."""
    return run.eval.seeds or [run.eval.seed]


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted key, leaf) pairs, in order."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def to_dict(run: RunConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries of what YAML and JSON can hold; tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(run)))
    return plain


def inert(key: str) -> bool:
    """Whether a setting changes neither a weight nor a score."""
    return key in INERT_KEYS or key.startswith(INERT_GROUPS)


def identity(run: RunConfig) -> str:
    """12 hex digits over everything that can change a weight or a score."""
    return identity_of(to_dict(run))


def identity_of(saved: Mapping[str, Any]) -> str:
    """The same of a configuration as it was saved, which may be older than some keys."""
    settings = {key: value for key, value in flatten(saved) if not inert(key) and LATER_KEYS.get(key, ...) != value}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def run_folder(run: RunConfig) -> Path:
    """Where the run lives. The same command always gets the same folder, and another configuration another one."""
    return Path(run.out) / (run.name or f"{run.method}-{run.data.name}-{run.preset}-seed{run.seed}-{identity(run)[:6]}")


def to_yaml(run: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(run)))


def chosen_settings(run: RunConfig, spec: Spec) -> dict[str, Any]:
    """The settings of a run that are not the defaults of every run and of the method, by key."""
    defaults = dict(flatten(to_dict(RunConfig(method=spec.name, model=spec.config(), sample=spec.sample()))))
    return {key: value for key, value in flatten(to_dict(run)) if value != defaults.get(key, ...)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`"train.lr: 0.001 -> 0.002"` for every key that matters and differs."""
    before, after = LATER_KEYS | dict(flatten(old)), LATER_KEYS | dict(flatten(new))
    keys = [key for key in {**before, **after} if not inert(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def describe(config: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, help) of every field of a config dataclass, nested ones expanded; the help is the field's trailing comment."""
    bases = [base for base in reversed(config.__mro__) if dataclasses.is_dataclass(base)]
    comments = dict(pair for base in bases for pair in re.findall(r"^    (\w+)\s*:[^#\n]*#\s*(.+)$", inspect.getsource(base), flags=re.MULTILINE))
    for item in dataclasses.fields(config):
        key = f"{prefix}.{item.name}" if prefix else item.name
        default = item.default_factory() if callable(item.default_factory) else item.default
        if dataclasses.is_dataclass(default):
            yield from describe(type(default), key)
        elif item.name not in ("model", "sample"):
            yield key, str(item.type), "none" if default is None else str(default), comments.get(item.name, "")
