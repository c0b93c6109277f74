"""How fast this machine multiplies matrices, and whether two processes can meet and add up their numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pixlat.common.hardware import device_name, synchronize
from pixlat.common.precision import computing_in, resolve_precision
from pixlat.launch.checkup.finding import Finding, note, ok, problem
from pixlat.launch.hardware import HARDWARE

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "tf32", "bf16")
SECONDS = 0.4  # of measuring, a precision
SIDES = {"cuda": 4096, "cpu": 1024}  # of the square matrices
PRODUCTS = {
    "cuda": 10,
    "cpu": 1,
}  # timed together; the fastest time counts
SLOW_SHARE = 0.4  # of a data sheet's rate; large products reach 60 to 90 % of it
MEETING_SECONDS = 60  # for two processes to start, meet and end; about 3 s where nothing else runs
BUSY_LOAD = 1.3  # processes that want to work, for each CPU, from which the figures are too low
# The README's first command, `pixlat train method=jit`: the MACs of its training (evaluation/results), and the share of
# the rate of large products that it reaches. Measured on two threads of an AMD EPYC: 68 of 176 GFLOP/s.
DEMO_MACS = 14_097_088_512_000
DEMO_SHARE = 0.38
# What each of the two processes does. Their sum is 1 + 2.
MEMBER = """\
import datetime, sys, torch, torch.distributed as dist
backend, file, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
limit = datetime.timedelta(seconds=30)
dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=2, timeout=limit)
number = torch.full((1,), rank + 1.0, device=device)
dist.all_reduce(number)
dist.destroy_process_group()
sys.exit(0 if number.item() == 3 else "the sum of 1 and 2 was " + str(number.item()))
"""


def findings() -> Iterator[Finding]:
    """All that is measured."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield from speed(device)
    yield from meeting("gloo")
    if torch.cuda.device_count() > 1:
        yield from meeting("nccl")


# -- products a second -------------------------------------------------------------------------------------------------


def speed(device: torch.device) -> Iterator[Finding]:
    """The rate of large matrix products in each precision that the device has, and what it means."""
    rates = {name: tflops(device, name) for name in PRECISIONS if resolve_precision(name, device) == name}
    shown = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
    text = f"{device_name(device)}: large matrix products at {shown} TFLOP/s."
    if device.type == "cpu":
        yield from busy()
        minutes = 2 * DEMO_MACS / (DEMO_SHARE * rates["fp32"] * 1e12) / 60
        yield ok(
            f"{text} Training the README's demo (`pixlat train method=jit`) will take about {minutes:.0f} minutes.",
            tflops=rates,
            demo_minutes=minutes,
        )
        if rates["bf16"] > 1.5 * rates["fp32"]:
            yield note(
                f"On this CPU bf16 is {rates['bf16'] / rates['fp32']:.1f} times as fast as fp32.",
                "train.precision=bf16",
                tflops=rates,
            )
        return
    yield beside_data_sheet(text, device_name(device), rates)


def busy() -> Iterator[Finding]:
    """A note if other programs take their share of the CPUs."""
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY_LOAD * cpus:
        yield note(
            f"Other programs are working: the load is {load:.1f} on {cpus} CPUs, so the figures below may be too low.",
            "uptime",
            load=load,
        )


def tflops(device: torch.device, precision: str) -> float:
    """10^12 floating-point operations a second (2 for each multiply-accumulate) of square matrix products."""
    import torch

    side, number = SIDES[device.type], PRODUCTS[device.type]
    left, right = torch.randn(2, side, side, device=device)
    with torch.no_grad(), computing_in(precision, device):
        timed(left, right, 1)  # the first product loads libraries
        end, seconds = time.monotonic() + SECONDS, timed(left, right, number)
        while time.monotonic() < end:
            seconds = min(seconds, timed(left, right, number))
    return 2 * side**3 * number / seconds / 1e12


def timed(left: torch.Tensor, right: torch.Tensor, number: int) -> float:
    """Seconds of a number of products."""
    import torch

    synchronize(left.device)
    start = time.perf_counter()
    for _ in range(number):
        torch.mm(left, right)
    synchronize(left.device)
    return time.perf_counter() - start


def beside_data_sheet(text: str, name: str, rates: dict[str, float]) -> Finding:
    """A GPU's rates beside those of its data sheet, where launch/hardware.py has it."""
    words = name.lower().replace(" ", "")
    sheet = next((key for key in HARDWARE if key in words and "mig" not in words), None)
    if sheet is None:
        return ok(text, tflops=rates)
    shares = {precision: rate / HARDWARE[sheet].tflops(precision) for precision, rate in rates.items()}
    best = max(shares, key=lambda precision: rates[precision])
    text = f"{text} {best} reaches {shares[best]:.0%} of the data sheet's rate."
    if shares[best] < SLOW_SHARE:
        return note(
            f"{text} That is little: it is shared, too hot, or its power is limited.",
            "nvidia-smi -q -d PERFORMANCE,POWER",
            tflops=rates,
        )
    return ok(f"{text} `pixlat plan hardware={sheet}` tells what a run will take.", tflops=rates, data_sheet=sheet)


# -- two processes -----------------------------------------------------------------------------------------------------


def meeting(backend: str, seconds: float = MEETING_SECONDS) -> Iterator[Finding]:
    """Two processes of this machine add up two numbers, as every training on several does. backend: gloo or nccl."""
    where = "GPUs" if backend == "nccl" else "CPUs"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        faults = members(backend, Path(folder), seconds)
    if not faults:
        yield ok(
            f"Two processes on {where} met through {backend} and added numbers in {time.perf_counter() - start:.0f} s.",
            backend=backend,
        )
        return
    advice = (
        "NCCL_DEBUG=INFO pixlat doctor  # then: export NCCL_P2P_DISABLE=1, or NCCL_SOCKET_IFNAME=lo"
        if backend == "nccl"
        else "export GLOO_SOCKET_IFNAME=lo"
    )
    text = f"Two processes on {where} cannot work together through {backend}: {faults[0]} Runs of one process work."
    yield problem(text, f"{advice}  # the computer's own name must be in /etc/hosts", backend=backend)


def members(backend: str, folder: Path, seconds: float) -> list[str]:
    """Starts the two processes and waits for them; a sentence for each that failed. The time limit ends both."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    } | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMBER, backend, str(folder / "meeting")]
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as stream:
            processes.append(subprocess.Popen([*command, str(rank)], env=environment, stdout=stream, stderr=stream))
    end = time.monotonic() + seconds
    try:
        return [
            fault
            for process, log in zip(processes, logs, strict=True)
            if (fault := wait_for(process, log, end - time.monotonic(), seconds))
        ]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(process: subprocess.Popen[bytes], log: Path, seconds: float, limit: float) -> str:
    """An empty string, or why a process did not end well."""
    try:
        code = process.wait(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return f"they did not end within {limit:g} s."
    lines = log.read_text(errors="replace").strip().splitlines()
    return "" if code == 0 else f"{lines[-1] if lines else f'exit code {code}'}."
