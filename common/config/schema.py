"""The keys of a run with their defaults: dataclasses whose comments are the keys' help. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass
class DataConfig:
    """What is trained on."""

    #: emoji32 (embedded), folder (your images, one sub-folder a class), tar, parquet, arrow,
    #: shards (cropped before) or synthetic
    name: str = "emoji32"
    path: str | None = None  # folder of the images, or of the files that hold them
    image_size: int | None = None  # pixels; emoji32 has 32, a folder needs it
    num_classes: int | None = None  # expected number of classes; another number in the data is an error
    flip: bool = False  # mirror half of the training images
    #: the square of a training image: center (ADM's), or random (drawn anew each time; held-out images keep the centre)
    crop: str = "center"
    resize: int | None = None  # pixels of the shorter side of which random crops are cut; none: image_size
    balanced: bool | None = None  # draw classes uniformly; none: yes for emoji32, no otherwise
    holdout: float = 0.05  # held-out share of a folder that has no val/ of its own
    #: folder of stored latents of the training images: of `pixlat prepare latents`, or in REPA's released layout
    latents: str | None = None
    workers: int = 0  # loader processes; 0 loads in the training process
    #: images that cannot be read: error, or skip (named and counted; the next of its class stands in for it)
    broken: str = "error"
    #: CMYK, palette, 16-bit and transparent images: convert (to RGB, as ADM's code does) or strict (they are broken)
    modes: str = "convert"


@dataclass
class TrainConfig:
    """How long, with what optimizer, and what is kept; everything is counted in images."""

    images: int = 50_000  # training images shown in total; 0 evaluates the untrained network
    batch: int = 64  # global batch: images a step over all processes
    #: images a process takes at once; none: batch / processes of the first start, which a resumed run keeps
    micro_batch: int | None = None
    lr: float = 1e-3  # peak learning rate
    warmup_images: int = 0  # linear warm-up from 0
    hold_images: int = 0  # images at the peak after the warm-up, before cosine or linear begin
    schedule: str = "constant"  # constant, cosine or linear, from the end of warm-up and hold to the last image
    min_lr: float = 0.0  # where cosine and linear end
    #: of AdamW, and of Nesterov Adam where a method asks for it
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8  # of both
    weight_decay: float = 0.0  # of AdamW and Muon, unless a parameter group says otherwise
    clip_grad: float = 0.0  # global gradient norm; 0 does not clip
    #: one average a decay per step, e.g. [0.9999,0.9996]; a short run has shorter ones (common/training/ema.py)
    ema_decay: list[float] = field(default_factory=list)
    ema_halflife_images: list[float] = field(default_factory=list)  # one average a half-life in images, e.g. [5e5]
    ema_rampup: float = 0.0  # a half-life is at most this share of the images seen so far; 0 is off
    #: auto, bf16, tf32 or fp32 (common/precision.py); auto: bf16 autocast on GPUs that multiply it, fp32 elsewhere
    precision: str = "auto"
    compile: bool = False  # torch.compile for each block of the network
    #: keep only the inputs of each block and compute it again in the backward pass: less memory, a third more work
    recompute_blocks: bool = False
    threads: int | None = None  # CPU threads; none: torch's choice
    log_images: int = 3200  # a line of metrics.jsonl every so many images
    checkpoint_images: int = 16_000  # a checkpoint every so many images
    keep_checkpoints: int = 2  # newest checkpoints that stay
    preview_images: int = 16_000  # a sample grid every so many images; 0 is off
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb (pip install 'pixlat[trackers]')


@dataclass
class BudgetConfig:
    """How long, in the place of train.images, so that runs can be compared at equal cost; schedules follow.

    The first budget to be reached ends the run.
    """

    #: MACs of training, earlier stages included; the images that they allow are counted before the run starts
    train_macs: float | None = None
    images: int | None = None  # training images


@dataclass
class EvalConfig:
    """What is sampled and scored after the training, and with every_images during it."""

    protocol: str = "embedded"  # how the score is computed; see evaluation/README.md
    num_images: int = 1000  # generated images; 0 skips the evaluation
    batch: int = 50  # images sampled at once
    seed: int = 0  # of the noise and of the label order
    #: several of them, e.g. [0,1,2]: num_images with each, mean and spread are recorded; none: seed alone
    seeds: list[int] = field(default_factory=list)
    every_images: int = 0  # a line of curve.jsonl, the scores so far, every so many training images; 0 is off
    precision: str = "fp32"  # sampling in auto, bf16, tf32 or fp32 (common/precision.py); part of the score's protocol
    #: sampled pixels become uint8 by round (half to even) or truncate, as RAE, REPA and REG do;
    #: part of the score's protocol
    uint8: str = "round"
    #: which average to sample with, e.g. 0.999; none: the first one, or the raw weights if there is none;
    #: raw: the raw weights
    ema: str | None = None
    grid_columns: int = 10  # images a class in the sample grid


@dataclass
class ClusterConfig:
    """Where the run works, on how many processes.

    Nothing here changes a result; launch/README.md tells how a job lives.
    """

    #: here (this process), local (several processes of this machine), slurm,
    #: or a site's file (launch/clusters/README.md)
    name: str = "here"
    nodes: int = 1  # machines
    gpus_per_node: int | None = None  # GPUs of each machine, one process for each; 0 computes on CPUs; slurm needs it
    #: kind of GPU where a cluster has several, e.g. a100 (with gpus_per_node=8: --gpus-per-node=a100:8)
    gpu_type: str | None = None
    tasks_per_node: int | None = None  # processes a machine; none: one for each GPU, or one
    #: ddp (every process holds everything) or fsdp2 (parameters, gradients and optimizer state
    #: are spread over the processes)
    sharding: str = "ddp"
    #: minutes that a process waits for the others, e.g. while the first one writes a large checkpoint
    collective_timeout_min: float = 360.0
    cpus_per_task: int | None = None  # CPU cores a process, loader processes included; none: the cluster's default
    mem_gb: float | None = None  # memory a machine; 0 is all of it, none the cluster's default
    timeout_min: int | None = None  # minutes until the job is requeued or ended; slurm needs it
    max_timeouts: int = 30  # how often a job may run into its time limit and go on
    #: seconds between the warning and the end; more than the longest ten steps and one checkpoint take
    signal_delay_s: int = 120
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
    #: shell lines before the run, e.g. ["module load cuda", "export NCCL_DEBUG=WARN"]
    setup: list[str] = field(default_factory=list)
    srun_args: list[str] | None = None  # arguments of srun; none: --kill-on-bad-exit=1 --cpus-per-task=N
    #: the command that is Python in the job, e.g. "singularity exec --nv image.sif python"; none: this Python
    python: str | None = None
    #: other options of sbatch, e.g. ["nice", "gres=gpu:a100:8"], which replaces --gpus-per-node
    sbatch: list[str] = field(default_factory=list)
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


def to_dict(run: RunConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries of what YAML and JSON can hold; tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(run)))
    return plain


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted key, leaf) pairs, in order."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
