"""Short training runs of every registered method,
in one process or as one of several: `python tests/process_runs.py FOLDER METHOD...`
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch._dynamo.utils import counters
from torch.nn.utils.spectral_norm import SpectralNorm
from toys import TinyGan

from pixlat.common.config.resolve import resolve
from pixlat.common.config.schema import TrainConfig
from pixlat.common.datasets.batches import TrainingPlan, training_batches
from pixlat.common.images.image_set import ArrayImages
from pixlat.common.seeds import Noise
from pixlat.common.training import compiled
from pixlat.common.training.loop import train
from pixlat.common.training.setup import make_accelerator
from pixlat.common.training.state import TrainState
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo, Method
from pixlat.methods.jit.config import JiTSample
from pixlat.methods.jit.method import JiTMethod

STEPS, BATCH, MICRO_BATCH, PROCESSES = 2, 8, 2, 2  # two micro-batches a process and step
EMA = 0.3  # of few steps: with a longer memory the run would take a shorter one
STATISTICS = {"stat_images"}  # settings that say how many images are looked at before the training
GAN = "two phases"  # the toy with a discriminator that starts late, and a teacher
RECOMPUTED = "jit with recomputed blocks"  # by several processes; the one beside which they stand keeps everything
COMPILED = "jit with compiled blocks"  # likewise
GRAPHS_OF_JIT = 2  # its blocks with and without context tokens
VARIANTS = {
    "dsd with a discriminator": (
        "dsd",
        {"model.gan_weight": "0.1", "model.gan_start": str(BATCH), "model.discriminator_widths": "[8,8]"},
    ),
    RECOMPUTED: ("jit", {}),
    COMPILED: ("jit", {}),
}  # name -> method, settings
INFO = DataInfo("synthetic", num_classes=10, image_size=32, num_train=40)


class Gan(TinyGan):
    """Its discriminator starts at the second step."""

    def phase_active(self, phase: str, images_seen: int) -> bool:
        return phase == "generator" or images_seen >= BATCH


def build(name: str) -> Method:
    """The demo's network, the same each time: frozen networks without their files' weights,
    and nothing hidden behind layers of zeros.
    """
    if name == GAN:
        return Gan()
    method_name, changes = VARIANTS.get(name, (name, {}))
    run = resolve(get_spec(method_name), {"data.name": "synthetic", "data.image_size": "32", **changes})
    for key in STATISTICS & vars(run.model).keys():
        setattr(run.model, key, 2 * BATCH)
    torch.manual_seed(0)
    method = get_class(method_name)(run.model, INFO)
    for module in method.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update(
                {key: made_up(key, tensor) for key, tensor in tensors.items() if tensor is not None and tensor.is_meta}
            )
    for module in method.modules():
        settle(module)
    with torch.no_grad():
        for p in method.parameters():
            if p.requires_grad and not p.any():
                p.normal_(std=0.02)
    return method


def settle(module: torch.nn.Module) -> None:
    """Ends the power iterations of a spectral norm: they go on with every forward,
    of which one process has more than each of several.
    """
    for hook in module._forward_pre_hooks.values():
        for _ in range(1000 if isinstance(hook, SpectralNorm) else 0):
            hook.compute_weight(module, do_power_iteration=True)


def made_up(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Numbers in the place of weights that come from a file; matrices and kernels keep the scale of what passes,
    so that outputs differ between images.
    """
    if not tensor.is_floating_point() or name == "running_var":
        return torch.ones_like(tensor, device="cpu")
    values = torch.randn(tensor.shape) * ((2 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.05)
    return torch.nn.Parameter(values, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else values


def fit(name: str, folder: Path, sharding: str = "ddp") -> TrainState:
    """STEPS steps of a method, a checkpoint after each; goes on if there are checkpoints."""
    settings = TrainConfig(
        images=STEPS * BATCH, batch=BATCH, micro_batch=MICRO_BATCH, lr=1e-3, clip_grad=1.0, ema_decay=[EMA]
    )
    # far above rounding: Adam divides by the size of a gradient and would magnify the rounding
    # of one that is nearly zero
    settings.eps = 1e-3
    settings.log_images, settings.checkpoint_images, settings.keep_checkpoints = BATCH, BATCH, STEPS
    settings.recompute_blocks = name == RECOMPUTED and "RANK" in os.environ
    settings.compile = name == COMPILED and "RANK" in os.environ
    method = build(name)
    size, classes = method.data.image_size, method.data.num_classes
    rng = np.random.Generator(np.random.PCG64(0))
    images = ArrayImages(
        rng.integers(0, 256, (INFO.num_train, 3, size, size), dtype=np.uint8),
        rng.integers(0, classes, INFO.num_train),
        "noise",
    )
    accelerator = make_accelerator(settings, folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = TrainingPlan(images.labels, BATCH, seed=0, balanced=True)
    batches = partial(feed, images, plan, accelerator.process_index, accelerator.num_processes)
    return train(method, settings, batches, folder, 0, name, accelerator, sharding=sharding)


def feed(
    images: ArrayImages, plan: TrainingPlan, rank: int, world: int, start_step: int, accumulation: int
) -> Iterator[list]:
    """This process's training batches."""
    return training_batches(images, plan, start_step, MICRO_BATCH, accumulation, rank, world)


def draw(state: TrainState) -> torch.Tensor:
    """Two images from the averaged weights, whatever holds them."""
    with state.weights(str(EMA)) as method, torch.no_grad():
        return method.sample(torch.tensor([1, 2]), Noise([1, 2]), JiTSample(steps=2))


def together(folder: Path, names: Sequence[str]) -> None:
    """Two processes that train each method with DDP and with FSDP2, and go on with FSDP2 where a folder
    `<method>-start` has checkpoints.
    """
    port = str(20_000 + os.getpid() % 10_000)
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
    }
    environment |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    }
    command = [sys.executable, str(Path(__file__).resolve()), str(folder), *names]
    children = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    printed = [child.communicate(timeout=900)[0] for child in children]
    # a negative code is the signal that a process died of, which prints nothing
    if any(child.returncode for child in children):
        raise AssertionError(
            "\n".join(
                f"exit code {child.returncode} after\n{text}" for child, text in zip(children, printed, strict=True)
            )
        )


def check_graphs(name: str) -> None:
    """The wrapper for several processes cuts no block into pieces, and makes no kind of block of its own."""
    graphs = counters["stats"]["unique_graphs"]
    counters.clear()
    assert graphs == (GRAPHS_OF_JIT if name == COMPILED else 0), f"{graphs} graphs"


def main(folder: Path, names: Sequence[str]) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    compiled.BACKEND = "aot_eager"  # dynamo and autograd as for a user, without the minutes of a C++ compiler
    for name in names:
        fit(name, folder / f"{name}-ddp")
        check_graphs(name)
        state = fit(name, folder / f"{name}-fsdp2", "fsdp2")
        check_graphs(name)
        if isinstance(state.method, JiTMethod):
            images = draw(state)
            if state.accelerator.is_main_process:
                torch.save(images, folder / "images.pt")
    for start in sorted(folder.glob("*-start")):
        fit(start.name.removesuffix("-start"), start, "fsdp2")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
