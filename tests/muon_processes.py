"""Steps of Muon in one process, or as one of several: `python tests/muon_processes.py FOLDER RANK SIZE`"""

import os
import subprocess
import sys
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pixlat.common.training.muon import Muon
from pixlat.common.training.sharding import gathered

# a process has no row of (1, 9); the last one consists of 3
SHAPES = [(24, 16), (16, 40), (24, 16), (5, 3), (1, 9), (24, 16), (36, 20)]
CASES = list(product((False, True), (False, True)))  # spread over the processes, bf16
STEPS = 3


def steps(spread: bool, bf16: bool) -> list[torch.Tensor]:
    """The parameters after some steps, whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if spread else None

    def placed(k: int, shape: tuple[int, int]) -> torch.Tensor:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(k))
        return distribute_tensor(tensor, mesh, [Shard(0)]) if mesh else tensor

    params = [nn.Parameter(placed(k, shape)) for k, shape in enumerate(SHAPES)]
    optimizer = Muon(
        [{"params": params[:-1]}, {"params": params[-1:], "split": 3, "weight_decay": 0.1}], lr=0.02, bf16=bf16
    )
    for step in range(STEPS):
        for k, p in enumerate(params):
            p.grad = placed(100 * step + k + 7, SHAPES[k])
        optimizer.step()
    return [gathered(p.detach()) for p in params]


def together(folder: Path, size: int = 2) -> list[dict[str, object]]:
    """What each of several processes has found."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([sys.executable, __file__, str(folder), str(rank), str(size)], env=environment)
        for rank in range(size)
    ]
    assert [child.wait(timeout=120) for child in children] == [0] * size
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def main(folder: Path, rank: int, size: int) -> None:
    """One of the processes: its results, and how many numbers each exchange brought."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=60), size, rank)
    brought: dict[str, list[int]] = {"all_gather_into_tensor": [], "all_to_all_single": []}

    def counted(name: str):
        original = getattr(dist, name)

        def exchange(output, *args, **kwargs):
            brought[name].append(output.numel())
            return original(output, *args, **kwargs)

        return exchange

    for name in brought:
        setattr(dist, name, counted(name))
    found = {}
    for case in CASES:
        found[case] = {"params": steps(*case), "brought": {name: list(counts) for name, counts in brought.items()}}
        for counts in brought.values():
            counts.clear()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
