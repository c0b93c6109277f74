"""The machine's GPUs: what torch can use of them, in which precision, and why it cannot use the others.

Two views are compared. The system's (PCI devices, the NVIDIA driver, `nvidia-smi`) says what is there; torch's says
what pixlat can use. Nothing here was run on a GPU yet: the tests replace torch's and the system's answers.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixlat.common.origin import driver_version
from pixlat.common.precision import resolve_precision
from pixlat.launch.checkup.finding import Finding, first_line, note, ok, problem, tool_output

if TYPE_CHECKING:
    import torch

PCI = Path("/sys/bus/pci/devices")
DEVICES = Path("/dev")
VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
DISPLAY_CLASS = "0x03"  # PCI class of graphics and compute devices
# The oldest driver that runs any CUDA of a major version (NVIDIA, "CUDA compatibility", minor version compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
VISIBLE = "CUDA_VISIBLE_DEVICES"
GIGA = 1e9
BUSY_SHARE = 0.1  # of a GPU's memory in other hands, from which it is worth a note
CUDA_INDEX = "--index-url https://download.pytorch.org/whl/"  # its folders are called cpu, cu126 and so on


@dataclass(frozen=True)
class InstalledGpu:
    """A GPU as the driver shows it, whether torch can use it or not."""

    name: str
    memory_gb: float
    capability: str  # such as "8.0"; empty where the driver does not tell it


def findings() -> Iterator[Finding]:
    """All findings about GPUs."""
    import torch

    installed, driver = installed_gpus(), driver_version()
    yield build(torch.version.cuda, torch.version.hip, driver)
    if torch.cuda.is_available():
        yield from usable(installed)
    elif torch.backends.mps.is_available():
        yield ok("An Apple GPU is here, and torch can use it. pixlat computes on it in fp32.")
    else:
        yield from without_gpus(installed, driver)


def build(cuda: str | None, hip: str | None, driver: str | None) -> Finding:
    """What torch was compiled for, with the versions of what a GPU needs."""
    import torch

    platform = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPUs only"
    facts = {"torch": torch.__version__, "cuda": cuda, "rocm": hip, "driver": driver, "nccl": nccl_version()}
    parts = [f"torch {torch.__version__} is built for {platform}."]
    parts += [f"The NVIDIA driver is {driver}."] if driver else []
    parts += [f"NCCL {facts['nccl']} connects several GPUs."] if facts["nccl"] else []
    return ok(" ".join(parts), **facts)


def nccl_version() -> str | None:
    """The version of NCCL in torch; None if torch has none."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


# -- what the system shows ---------------------------------------------------------------------------------------------


def installed_gpus() -> list[InstalledGpu]:
    """The GPUs that `nvidia-smi` lists, those that CUDA_VISIBLE_DEVICES hides included; none without it."""
    fields = tool_output(["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"])
    rows = [[cell.strip() for cell in row] for row in csv.reader((fields or "").splitlines())]
    return [InstalledGpu(row[0], _number(row[1]) * 2**20 / GIGA, row[2]) for row in rows if len(row) == 3]


def _number(text: str) -> float:
    return float(text) if re.fullmatch(r"[\d.]+", text) else 0.0  # "[N/A]" of some GPUs with shared memory


def pci_gpus() -> list[str]:
    """The makers of the graphics devices on the PCI bus, driver or not: "NVIDIA" or "AMD" for each."""
    folders = sorted(PCI.iterdir()) if PCI.is_dir() else []
    devices = [(folder / "vendor", folder / "class") for folder in folders]
    found = [
        vendor.read_text().strip()
        for vendor, kind in devices
        if kind.exists() and kind.read_text().startswith(DISPLAY_CLASS)
    ]
    return [VENDORS[vendor] for vendor in found if vendor in VENDORS]


# -- GPUs that torch cannot use ----------------------------------------------------------------------------------------


def without_gpus(installed: Sequence[InstalledGpu], driver: str | None) -> Iterator[Finding]:
    """Why torch uses no GPU: there is none, this process was given none, or something is in its way."""
    import torch

    makers = pci_gpus() or ["NVIDIA"] * max(len(installed), int(driver is not None))
    if not makers:
        yield ok("No GPU is here. pixlat computes on the CPU, which is enough for the demos and for tests.", gpus=0)
    elif "NVIDIA" not in makers:  # often the graphics of an AMD processor, which torch never uses
        text = "An AMD GPU is here. This torch is not built for ROCm, so pixlat computes on the CPU."
        yield note(text, f"pip install torch torchvision {CUDA_INDEX}rocmX.Y  # pytorch.org names X.Y")
    elif driver is not None and not (installed or openable_devices()):
        text = f"The NVIDIA driver {driver} is here, but this process was given no GPU. pixlat computes on the CPU."
        yield note(text, "ask the scheduler for GPUs. In a container: docker run --gpus all, singularity --nv")
    else:
        shown = ", ".join(f"{gpu.name} ({gpu.memory_gb:.0f} GB)" for gpu in installed) or f"{len(makers)} from NVIDIA"
        why, mend = reason(driver)
        yield problem(f"GPUs are here that torch cannot use: {shown}. {why}", mend, torch=torch.__version__)


def openable_devices() -> list[str]:
    """The names of the GPUs' device files that this process may open; containers and Slurm hide or lock the others."""
    return [path.name for path in DEVICES.glob("nvidia[0-9]*") if os.access(path, os.R_OK | os.W_OK)]


def reason(driver: str | None) -> tuple[str, str]:
    """(why torch uses none of the NVIDIA GPUs, what mends it)."""
    import torch

    if driver is None:
        return "The NVIDIA driver is not loaded.", "install the driver, or load it: modprobe nvidia"
    if torch.version.cuda is None:
        return "This torch is a build for CPUs.", torch_for(driver)
    if too_old(driver, torch.version.cuda):
        needed = OLDEST_DRIVER[int(torch.version.cuda.partition(".")[0])]
        sentence = f"torch's CUDA {torch.version.cuda} needs a driver of version {needed} or newer; {driver} is loaded."
        return sentence, torch_for(driver)
    if os.environ.get(VISIBLE) is not None:
        return f"{VISIBLE}={os.environ[VISIBLE]!r} hides them.", f"unset {VISIBLE}"
    mend = 'python -c "import torch; torch.zeros(1).cuda()"  # restart the machine if the driver was updated'
    return f"torch says: {initialisation_error()}", mend


def too_old(driver: str, cuda: str) -> bool:
    """Whether the driver cannot run this CUDA; an unknown CUDA counts as one that it can run."""
    return int(driver.partition(".")[0]) < OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0)


def torch_for(driver: str) -> str:
    """How to get a torch that the driver can run: PyPI's, or a build for CUDA 12, or only with a newer driver."""
    install = "pip install --force-reinstall torch torchvision"
    if not too_old(driver, f"{max(OLDEST_DRIVER)}.0"):
        return install
    if not too_old(driver, "12.0"):
        return f"{install} {CUDA_INDEX}cu126  # or update the driver"
    return f"update the driver to version {OLDEST_DRIVER[12]} or newer"  # pixlat's torch has no builds for CUDA 11


def initialisation_error() -> str:
    """What torch says when it is made to use CUDA."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "nothing, and finds no device."


# -- GPUs that torch can use -------------------------------------------------------------------------------------------


def usable(installed: Sequence[InstalledGpu]) -> Iterator[Finding]:
    """A finding for each GPU that torch shows, and one for those that it does not."""
    import torch

    count = torch.cuda.device_count()
    for index in range(count):
        yield one_gpu(index)
    given = os.environ.get(VISIBLE)
    if len(installed) > count and given is not None:
        yield note(
            f"{VISIBLE}={given!r} shows {count} of {len(installed)} GPUs to pixlat.",
            f"unset {VISIBLE}",
            visible=count,
            installed=len(installed),
        )
    elif len(installed) > count:
        yield note(
            f"torch shows {count} of the {len(installed)} GPUs that nvidia-smi lists.",
            "nvidia-smi  # look for GPUs in an error state",
        )
    if count > 1:
        yield ok(f"One run uses all {count} GPUs with cluster=local cluster.gpus_per_node={count}.")
    if count > 1 and not nccl_version():
        yield problem(
            "Several GPUs are here, and this torch has no NCCL to connect them.",
            "pip install --force-reinstall torch torchvision",
        )


def one_gpu(index: int) -> Finding:
    """Name, memory, capability and precisions of a GPU, after a small product was computed on it."""
    import torch

    facts = gpu_facts(index)
    name = f"GPU {index}: {facts['name']}, {facts['memory_gb']:.0f} GB, compute capability {facts['capability']}."
    if not runs_here(facts["capability"], torch.cuda.get_arch_list()):
        code = f"sm_{facts['capability'].replace('.', '')}"
        advice = f"pip install --force-reinstall torch torchvision {CUDA_INDEX}cu126  # or another build with {code}"
        return problem(
            f"{name} This torch has no code for it: it has {' '.join(torch.cuda.get_arch_list())}.", advice, **facts
        )
    try:
        facts["free_gb"] = computed_free_bytes(torch.device("cuda", index)) / GIGA
    except RuntimeError as error:
        return problem(
            f"{name} A small product on it fails: {first_line(error)}",
            "nvidia-smi  # shows errors, and processes that use the GPU alone",
            **facts,
        )
    busy = facts["memory_gb"] - facts["free_gb"]
    if busy > BUSY_SHARE * facts["memory_gb"]:
        return note(
            f"{name} {facts['precision']} {busy:.0f} GB of its memory are in use already.",
            "nvidia-smi  # shows by whom",
            **facts,
        )
    return ok(f"{name} {facts['precision']}", **facts)


def gpu_facts(index: int) -> dict[str, Any]:
    """The numbers of a GPU as torch tells them."""
    import torch

    device, seen = torch.device("cuda", index), torch.cuda.get_device_properties(index)
    with torch.cuda.device(device):  # torch answers both questions for the current GPU
        bf16, tf32 = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.is_tf32_supported()
        auto = resolve_precision("auto", device)
    able = [name for name, native in (("bf16", bf16), ("TF32", tf32)) if native]
    words = (
        f"{' and '.join(able)} {'are' if len(able) > 1 else 'is'} native" if able else "Neither bf16 nor TF32 is native"
    )
    return {
        "name": seen.name,
        "memory_gb": seen.total_memory / GIGA,
        "capability": f"{seen.major}.{seen.minor}",
        "bf16": bf16,
        "tf32": tf32,
        "auto": auto,
        "precision": f"{words}; train.precision=auto takes {auto}.",
    }


def runs_here(capability: str, architectures: Sequence[str]) -> bool:
    """Whether a torch with code for these architectures runs on a GPU.

    Code for sm_86 runs on GPUs of capability 8.6 and on later ones of generation 8, its PTX (compute_86) on later
    generations as well. ROCm's names (gfx942) are not compared.
    """
    major, minor = map(int, capability.split("."))
    for kind, digits in re.findall(r"(sm|compute)_(\d+)", " ".join(architectures)):
        other = divmod(int(digits), 10)
        if (kind == "sm" and other[0] == major and other[1] <= minor) or (
            kind == "compute" and other <= (major, minor)
        ):
            return True
    return not any(name.startswith(("sm_", "compute_")) for name in architectures)


def computed_free_bytes(device: torch.device) -> int:
    """Memory that is free on a GPU, asked before a small product is computed there; RuntimeError if either fails."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    ones = torch.ones(64, 64, device=device)
    if (ones @ ones).sum().item() != 64.0**3:
        raise RuntimeError("the product of two matrices of ones is wrong.")
    return free
