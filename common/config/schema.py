"""The keys of a run and their defaults. The comments in the dataclasses are the keys' help. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass
class DataConfig:
    """The training data."""

    #: emoji32 (embedded), folder (your images, one sub-folder a class), tar, parquet, arrow,
    #: shards (cropped before) or synthetic
    name: str = "emoji32"
    path: str | None = None  # folder of the images, or of the files that hold them
    image_size: int | None = None  # pixels; emoji32 has 32, a folder needs it
    num_classes: int | None = None  # expected number of classes; an error if the data have another number
    flip: bool = False  # mirror half of the training images
    #: which square of a training image is used: center (as ADM cuts it), or random (another one each time);
    #: held-out images always use the centre
    crop: str = "center"
    resize: int | None = None  # pixels of an image's shorter side before random crops are cut; none: image_size
    balanced: bool | None = None  # draw classes uniformly; none: yes for emoji32, no otherwise
    holdout: float = 0.05  # held-out share of the images if the data have no val/ folder
    #: folder with latents of the training images, made by `pixlat prepare latents` or in REPA's released layout
    latents: str | None = None
    workers: int = 0  # loader processes; 0 loads in the training process
    #: images that cannot be read: error, or skip (pixlat warns, and uses the next image of the same class instead)
    broken: str = "error"
    #: CMYK, palette, 16-bit and transparent images: convert (to RGB, as ADM's code does) or strict (treat as broken)
    modes: str = "convert"


@dataclass
class TrainConfig:
    """Length of the training, optimizer, weight averages, log and checkpoints. All lengths are numbers of images."""

    images: int = 50_000  # training images shown in total; 0 evaluates the untrained network
    batch: int = 64  # global batch: images per step over all processes
    #: images per process and backward pass; none: batch / processes at the first start, which a resumed run keeps
    micro_batch: int | None = None
    lr: float = 1e-3  # peak learning rate
    warmup_images: int = 0  # linear warm-up from 0
    hold_images: int = 0  # images at the peak after the warm-up, before a cosine or linear schedule begins
    schedule: str = "constant"  # constant, cosine or linear, from the end of warm-up and hold to the last image
    min_lr: float = 0.0  # final learning rate of the cosine and linear schedules
    #: betas of AdamW, and of Nesterov Adam in methods that use it
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8  # eps of AdamW and Nesterov Adam
    weight_decay: float = 0.0  # of AdamW and Muon, unless the method sets another one for a parameter group
    clip_grad: float = 0.0  # largest global gradient norm; 0 does not clip
    #: decays per step, one weight average for each, e.g. [0.9999,0.9996]; short runs use shorter averages
    ema_decay: list[float] = field(default_factory=list)
    ema_halflife_images: list[float] = field(default_factory=list)  # half-lives in images, one average each, e.g. [5e5]
    ema_rampup: float = 0.0  # limits a half-life to this share of the images seen so far; 0: no limit
    #: auto, bf16, tf32 or fp32 (common/precision.py); auto: bf16 autocast on GPUs that support it, fp32 elsewhere
    precision: str = "auto"
    compile: bool = False  # torch.compile for each block of the network
    #: keep only the inputs of each block and compute it again in the backward pass: less memory, a third more work
    recompute_blocks: bool = False
    threads: int | None = None  # CPU threads; none: torch's choice
    log_images: int = 3200  # images between two lines of metrics.jsonl
    checkpoint_images: int = 16_000  # images between two checkpoints
    keep_checkpoints: int = 2  # how many of the newest checkpoints to keep
    preview_images: int = 16_000  # images between two sample grids; 0: none
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb (pip install 'pixlat[trackers]')


@dataclass
class BudgetConfig:
    """Sets train.images from a budget, so that runs can be compared at equal cost. Schedules adapt to it.

    The smaller of the two budgets counts.
    """

    #: MACs of training, including earlier stages; pixlat computes train.images from it before the run starts
    train_macs: float | None = None
    images: int | None = None  # training images


@dataclass
class EvalConfig:
    """Sampling and scoring after the training, and with every_images also during it."""

    protocol: str = "embedded"  # how the score is computed; see evaluation/README.md
    num_images: int = 1000  # generated images; 0 skips the evaluation
    batch: int = 50  # images sampled at once
    seed: int = 0  # seed of the noise and of the order of labels
    #: several seeds, e.g. [0,1,2]: samples num_images with each, and records mean and spread; empty: only seed
    seeds: list[int] = field(default_factory=list)
    #: judges of the embedded protocol, e.g. [embedded]; empty: those of the data set (evaluation/judges/panel.py)
    judges: list[str] = field(default_factory=list)
    every_images: int = 0  # training images between two lines of curve.jsonl, which hold scores; 0: none
    precision: str = "fp32"  # sampling in auto, bf16, tf32 or fp32 (common/precision.py); part of the score's protocol
    #: how sampled pixels are converted to uint8: round (half to even), or truncate (as RAE, REPA and REG do);
    #: part of the score's protocol
    uint8: str = "round"
    #: which average to sample with, e.g. 0.999; none: the first one, or the raw weights if the run has no average;
    #: raw: the raw weights
    ema: str | None = None
    grid_columns: int = 10  # images per class in the sample grid


@dataclass
class ClusterConfig:
    """Where the run computes, and on how many processes. These keys change no result; see launch/README.md."""

    #: here (this process), local (several processes on this machine), slurm,
    #: or a site's file (launch/clusters/README.md)
    name: str = "here"
    nodes: int = 1  # number of machines
    gpus_per_node: int | None = None  # GPUs per machine, one process for each; 0 computes on CPUs; slurm needs it
    #: kind of GPU, if the cluster has several, e.g. a100 (with gpus_per_node=8: --gpus-per-node=a100:8)
    gpu_type: str | None = None
    tasks_per_node: int | None = None  # processes per machine; none: one for each GPU, or one
    #: ddp (every process holds all parameters, gradients and optimizer state) or fsdp2 (every process holds a part)
    sharding: str = "ddp"
    #: minutes that a process waits for the others, e.g. while the first one writes a large checkpoint
    collective_timeout_min: float = 360.0
    #: CPU cores per process, shared with its loader processes; none: the cluster's default
    cpus_per_task: int | None = None
    mem_gb: float | None = None  # memory per machine in GB; 0: all of it; none: the cluster's default
    timeout_min: int | None = None  # minutes until the job is requeued or ended; slurm needs it
    max_timeouts: int = 30  # how often a job that reached its time limit is requeued
    #: seconds between slurm's warning and the end of the job; must exceed the time of ten steps and one checkpoint
    signal_delay_s: int = 120
    partition: str | None = None  # slurm needs it; `sinfo -s` lists the partitions
    account: str | None = None  # account that pays for the job
    qos: str | None = None  # quality of service
    constraint: str | None = None  # features that the machines must have
    nodelist: str | None = None  # use only these machines
    exclude: str | None = None  # do not use these machines
    exclusive: bool = False  # share no machine with other jobs
    reservation: str | None = None  # slurm reservation to use
    dependency: str | None = None  # e.g. afterok:1234; pixlat adds the jobs of earlier stages
    array_parallelism: int = 16  # largest number of a sweep's runs at the same time
    comment: str | None = None  # text that the scheduler shows
    mail_user: str | None = None  # who receives mail about the job
    mail_type: str | None = None  # which events send mail, e.g. END,FAIL
    #: shell lines before the run, e.g. ["module load cuda", "export NCCL_DEBUG=WARN"]
    setup: list[str] = field(default_factory=list)
    srun_args: list[str] | None = None  # arguments of srun; none: --kill-on-bad-exit=1 --cpus-per-task=N
    #: command that starts Python in the job, e.g. "singularity exec --nv image.sif python"; none: this Python
    python: str | None = None
    #: other options of sbatch, e.g. ["nice", "gres=gpu:a100:8"]; a gres option replaces --gpus-per-node
    sbatch: list[str] = field(default_factory=list)
    snapshot: bool = True  # run a copy of the code as it is now, so that later changes of the checkout do not matter

    def tasks_a_node(self) -> int:
        """Number of processes per machine."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def processes(self) -> int:
        """Number of processes of the whole run."""
        return self.nodes * self.tasks_a_node()


@dataclass
class RunConfig:
    """The configuration of one run."""

    method: str = "jit"  # what to train; see the list of methods
    preset: str = "demo"  # named settings of the method; see the list of presets
    name: str | None = None  # run folder under `out`; none: made of method, data, preset, seed and identity
    out: str = "runs"  # folder of all run folders
    seed: int = 0  # seed of initial weights, data order, noise and dropout
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    model: Any = None  # settings of the method
    sample: Any = None  # settings of the method's sampler
    eval: EvalConfig = field(default_factory=EvalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    dry_run: bool = False  # print what would run and what it would cost; write nothing


class Spec(Protocol):
    """The part of `methods.MethodSpec` that the configuration reads."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> type: ...
    @property
    def sample(self) -> type: ...
    @property
    def presets(self) -> str: ...


def to_dict(run: RunConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries for YAML and JSON; tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(run)))
    return plain


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for each leaf of nested mappings, in order."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
