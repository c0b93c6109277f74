"""`pixlat doctor`: what it says of this machine and of imitated ones. No GPU was here when the tests were written."""

import contextlib
import itertools
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from pixlat.common.errors import UserError
from pixlat.common.plugins import Plugin
from pixlat.launch import doctor
from pixlat.launch.checkup import gpus, machine, measured, packages, scheduler
from pixlat.launch.checkup.finding import NOTE, OK, PROBLEM, Finding, note, ok, problem, run_tool

ROOT = Path(__file__).resolve().parent.parent
A100 = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", total_memory=80e9, major=8, minor=0)
V100 = SimpleNamespace(name="Tesla V100-PCIE-32GB", total_memory=32e9, major=7, minor=0)
INDEX = "--index-url https://download.pytorch.org/whl"
SMI = "NVIDIA A100-SXM4-80GB, 81920, 8.0\nNVIDIA A100-SXM4-80GB, 81920, 8.0\n"


def levels(findings):
    return [each.level for each in findings]


def only(findings) -> Finding:
    (found,) = findings
    return found


def answer(monkeypatch, *findings):
    """The doctor's checks are these findings."""
    monkeypatch.setattr(doctor, "checks", lambda keys: {"software": lambda: iter(findings)})


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_exit_code_and_the_last_line_tell_whether_pixlat_works(monkeypatch, capsys):
    answer(monkeypatch, ok("torch is here."), note("wandb is missing.", "pip install wandb"))
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert "  note     wandb is missing.\n           -> pip install wandb\n" in shown
    assert shown.endswith(": no problem, 1 note.\n")
    answer(monkeypatch, problem("The disk is full.", "rm"), problem("No locks.", "out=..."))
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.endswith(": 2 problems, 0 notes.\n")


def test_json_holds_every_finding_with_its_numbers(monkeypatch, capsys):
    answer(
        monkeypatch, ok("5.0 GB are free.", free_gb=5.0), problem("The driver is too old.", "update it", driver="470.1")
    )
    assert doctor.main(["as=json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["works"], report["problems"], report["notes"]) == (False, 1, 0)
    assert report["findings"] == [
        {"topic": "software", "level": "ok", "text": "5.0 GB are free.", "mend": "", "facts": {"free_gb": 5.0}},
        {
            "topic": "software",
            "level": "problem",
            "text": "The driver is too old.",
            "mend": "update it",
            "facts": {"driver": "470.1"},
        },
    ]


@pytest.mark.parametrize(
    ("argument", "told"),
    [("quik=true", "Did you mean 'quick'?"), ("as=yaml", "text, json"), ("quick=maybe", "true or false")],
)
def test_a_mistake_in_the_command_is_one_sentence(argument, told, capsys):
    assert doctor.main([argument]) == 2
    assert told in capsys.readouterr().err


def test_help_tells_the_keys_and_needs_no_torch():
    code = "import sys; from launch import doctor; doctor.main(['--help']); sys.exit('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "out (str, runs)" in shown and "quick (bool" in shown and "as (str, text)" in shown


def test_quick_measures_nothing():
    assert list(doctor.checks(doctor.Keys(quick=True))) == ["software", "gpus", "machine", "slurm"]
    assert list(doctor.checks(doctor.Keys())) == ["software", "gpus", "machine", "slurm", "measured"]


def test_a_command_that_mends_stays_on_one_line():
    long = (
        "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cu126  # or newer"
    )
    lines = doctor.paragraph(problem("word " * 60, long)).splitlines()
    assert lines[-1].endswith(f"-> {long}") and len(lines) > 3 and max(map(len, lines[:-1])) <= doctor.WIDTH


def test_a_python_without_torch_still_gets_its_report(tmp_path):
    code = f"""
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None  # their import fails
from pixlat.launch import doctor
sys.exit(doctor.main(["quick=true", "as=json", "out={tmp_path}"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = json.loads(done.stdout)["findings"]
    told = [each["text"] for each in found if each["level"] == PROBLEM]
    assert done.returncode == 1 and any(text.startswith("torch is installed but cannot be imported") for text in told)
    assert {each["topic"] for each in found} == {"software", "machine", "slurm"}


def test_this_machine_is_looked_at_for_real(tmp_path, capsys):
    doctor.main([f"out={tmp_path / 'runs'}", "quick=true", "as=json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {each["topic"] for each in found} == {"software", "gpus", "machine", "slurm"}
    assert next(each for each in found if "python" in each["facts"])["level"] == OK
    assert next(each for each in found if "digests" in each["text"])["level"] == OK
    assert list(tmp_path.iterdir()) == []


# -- software ----------------------------------------------------------------------------------------------------------


def versions(monkeypatch, **found):
    """Only these packages are installed."""

    def version(name):
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(packages, "version", version)


def test_packages_that_are_missing_or_out_of_range_have_their_command(monkeypatch):
    versions(monkeypatch, torch="2.5.0", numpy="2.1")
    found = list(
        packages.required(
            [Requirement(line) for line in ("torch>=2.7", "numpy>=1.26", "timm>=1", 'wandb>=1; extra == "trackers"')]
        )
    )
    assert [(each.level, each.text, each.mend) for each in found] == [
        (PROBLEM, "torch 2.5.0 is here, and pixlat needs torch>=2.7.", "pip install 'torch>=2.7'"),
        (PROBLEM, "timm is missing.", "pip install 'timm>=1'"),
    ]
    assert levels(packages.required([Requirement("numpy>=1.26")])) == [OK]


def test_a_local_version_counts_as_the_version(monkeypatch):
    versions(monkeypatch, torch="2.7.0+cpu")
    assert packages.fault(Requirement("torch>=2.7")) == ""


def test_an_extra_tells_what_it_would_add(monkeypatch):
    versions(monkeypatch, torch="2.7", tensorboard="2.20")
    requirements = [
        Requirement(line)
        for line in ("torch>=2.7", 'tensorboard>=2.16; extra == "trackers"', 'wandb>=0.18; extra == "trackers"')
    ]
    found = packages.extra_packages("trackers", "logs", requirements)
    assert (found.level, found.text) == (NOTE, "The extra `trackers` would add logs. wandb is missing.")
    assert found.mend == "pip install 'pixlat[trackers]'"
    assert packages.extra_packages("trackers", "logs", requirements[:2]).level == OK


def test_every_extra_for_users_is_explained():
    extras = set(packages.metadata("pixlat").get_all("Provides-Extra")) - {"test", "dev"}
    assert extras == set(packages.EXTRAS)


def test_an_old_python_is_a_problem(monkeypatch):
    monkeypatch.setattr(packages.platform, "python_version", lambda: "3.10.4")
    found = packages.python_version(">=3.11")
    assert (found.level, found.text) == (PROBLEM, "Python 3.10.4 is here, and pixlat needs >=3.11.")


def test_a_torchvision_of_another_torch_is_told(monkeypatch):
    def fails(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(packages.importlib, "import_module", fails)
    found = only(packages.imports())
    assert found.level == PROBLEM and found.text.endswith("torchvision::nms does not exist")


def test_a_damaged_file_of_the_package_is_told(monkeypatch, tmp_path):
    card = tmp_path / "weights.json"
    card.write_text(json.dumps({"sha256": "0" * 64}))
    card.with_suffix(".safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(packages, "AUTOENCODERS", {"damaged": str(card)})
    found = only(packages.shipped_files())
    assert found.level == PROBLEM and "weights.safetensors is damaged: its SHA-256 is" in found.text
    card.with_suffix(".safetensors").unlink()
    assert only(packages.shipped_files()).level == PROBLEM


def test_plugins_that_cannot_be_loaded_or_clash_are_named(monkeypatch):
    points = {
        "pixlat.methods": [
            Plugin("gone", "no_such_module:SPEC", "a package"),
            Plugin("jit", "json:loads", "a package"),
        ],
        "pixlat.spaces": [Plugin("fine", "json:loads", "a package")],
    }
    monkeypatch.setattr(packages, "registered_in", lambda group: points.get(group, []))
    gone, clash, fine = packages.plugins()
    assert gone.level == PROBLEM and "ModuleNotFoundError: No module named 'no_such_module'" in gone.text
    assert clash.level == PROBLEM and "built-in method" in clash.text
    assert (fine.level, fine.text) == (OK, "The space 'fine' comes from a package.")


# -- GPUs --------------------------------------------------------------------------------------------------------------


def system(monkeypatch, *, cuda="12.6", driver="560.35", smi="", pci=(), available=False, count=0):
    """A machine with this driver, these GPUs, and a torch for this CUDA."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(gpus, "driver_version", lambda: driver)
    monkeypatch.setattr(gpus, "tool_output", lambda command: smi)
    monkeypatch.setattr(gpus, "pci_gpus", lambda: list(pci))
    monkeypatch.setattr(gpus, "nccl_version", lambda: "2.27.3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def card(monkeypatch, properties, *, architectures=("sm_80", "sm_90"), bf16=True, free=None):
    """Every GPU of torch is this one."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: bf16)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(gpus, "computed_free_bytes", lambda device: properties.total_memory if free is None else free)


def test_a_machine_without_gpus_is_no_problem(monkeypatch):
    system(monkeypatch, cuda=None, driver=None)
    assert levels(gpus.findings()) == [OK, OK]


@pytest.mark.parametrize(
    ("machine_settings", "why", "mend"),
    [
        ({"cuda": None, "smi": SMI}, "This torch is a build for CPUs.", f"{INDEX}/cu126"),
        ({"cuda": None, "smi": SMI, "driver": "580.65"}, "This torch is a build for CPUs.", "torch torchvision"),
        ({"cuda": "13.2", "smi": SMI}, "CUDA 13.2 needs a driver of version 580 or newer; 560.35 is loaded.", "cu126"),
        (
            {"smi": SMI, "driver": "470.1"},
            "CUDA 12.6 needs a driver of version 525 or newer",
            "to version 525 or newer",
        ),
        ({"driver": None, "pci": ["NVIDIA"]}, "1 from NVIDIA. The NVIDIA driver is not loaded.", "modprobe nvidia"),
    ],
)
def test_gpus_that_torch_cannot_use_have_a_reason(monkeypatch, machine_settings, why, mend):
    system(monkeypatch, **machine_settings)
    _, found = gpus.findings()
    assert found.level == PROBLEM and why in found.text and mend in found.mend


def test_gpus_of_others_are_no_problem(monkeypatch, tmp_path):
    system(monkeypatch, driver=None, pci=["AMD"])
    assert list(gpus.findings())[1].level == NOTE
    system(monkeypatch, pci=["NVIDIA"])  # a login node, or a container that was given none
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    found = list(gpus.findings())[1]
    assert found.level == NOTE and "this process was given no GPU" in found.text
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert gpus.openable_devices() == ["nvidia0"] and list(gpus.findings())[1].level == PROBLEM


def test_gpus_that_the_environment_hides(monkeypatch):
    system(monkeypatch, smi=SMI)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _, found = gpus.findings()
    assert "NVIDIA A100-SXM4-80GB (86 GB)" in found.text and "CUDA_VISIBLE_DEVICES='' hides them." in found.text
    assert found.mend == "unset CUDA_VISIBLE_DEVICES"


def test_what_torch_says_is_passed_on(monkeypatch):
    system(monkeypatch, smi=SMI)

    def fails():
        raise RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment\nmore")

    monkeypatch.setattr(torch.cuda, "init", fails)
    assert "torch says: CUDA unknown error" in list(gpus.findings())[1].text


def test_gpus_are_described_with_their_precisions(monkeypatch):
    system(monkeypatch, smi=SMI, available=True, count=2)
    card(monkeypatch, A100)
    _, first, second, both = gpus.findings()
    told = "GPU 0: NVIDIA A100-SXM4-80GB, 80 GB, compute capability 8.0. bf16 and TF32 are native;"
    assert first.text == f"{told} train.precision=auto takes bf16."
    assert second.text.startswith("GPU 1") and levels([first, second, both]) == [OK] * 3
    assert "cluster.gpus_per_node=2" in both.text and first.facts["auto"] == "bf16"


def test_an_older_gpu_computes_in_fp32(monkeypatch):
    system(monkeypatch, available=True, count=1)
    card(monkeypatch, V100, architectures=("sm_70", "sm_80"), bf16=False)
    _, found = gpus.findings()
    assert found.level == OK and "Neither bf16 nor TF32 is native; train.precision=auto takes fp32." in found.text


def test_a_gpu_for_which_torch_has_no_code(monkeypatch):
    system(monkeypatch, available=True, count=1)
    card(monkeypatch, V100, architectures=("sm_75", "sm_90", "compute_90"), bf16=False)
    _, found = gpus.findings()
    assert (
        found.level == PROBLEM
        and "This torch has no code for it: it has sm_75 sm_90 compute_90." in found.text
        and "sm_70" in found.mend
    )


def test_a_gpu_that_others_use_and_one_that_fails(monkeypatch):
    system(monkeypatch, available=True, count=1)
    card(monkeypatch, A100, free=20e9)
    assert list(gpus.findings())[1].text.endswith("60 GB of its memory are in use already.")

    def fails(device):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with ...")

    monkeypatch.setattr(gpus, "computed_free_bytes", fails)
    found = list(gpus.findings())[1]
    assert found.level == PROBLEM and found.text.endswith("devices are busy or unavailable")


def test_some_of_the_gpus_are_hidden(monkeypatch):
    system(monkeypatch, smi=SMI, available=True, count=1)
    card(monkeypatch, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    *_, found = gpus.findings()
    assert (found.level, found.text) == (NOTE, "CUDA_VISIBLE_DEVICES='1' shows 1 of 2 GPUs to pixlat.")


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ("8.6", ["sm_80"], True),  # the same generation, an earlier member
        ("8.0", ["sm_86"], False),
        ("9.0", ["sm_80"], False),
        ("12.0", ["sm_90", "compute_90"], True),  # compiled by the driver
        ("10.0", ["sm_100"], True),
        ("9.0", ["sm_90a"], True),
        ("9.4", ["gfx942"], True),  # ROCm
    ],
)
def test_code_for_a_gpu(capability, architectures, runs):
    assert gpus.runs_here(capability, architectures) is runs


def test_what_the_system_shows_is_read(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\nGCC version: 11\n")
    monkeypatch.setattr("pixlat.common.origin.DRIVER", driver)
    assert gpus.driver_version() == "570.86.15"
    for name, vendor, kind in (
        ("0000:00:02.0", "0x8086", "0x030000"),
        ("0000:01:00.0", "0x10de", "0x030200"),
        ("0000:01:00.1", "0x10de", "0x040300"),
    ):
        folder = tmp_path / "pci" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")
    monkeypatch.setattr(gpus, "PCI", tmp_path / "pci")
    assert gpus.pci_gpus() == ["NVIDIA"]
    monkeypatch.setattr(gpus, "tool_output", lambda command: "NVIDIA GB10, [N/A], 12.1\n")
    assert gpus.installed_gpus() == [gpus.InstalledGpu("NVIDIA GB10", 0.0, "12.1")]


# -- machine -----------------------------------------------------------------------------------------------------------


def test_threads_against_cpus(monkeypatch):
    monkeypatch.setattr(machine, "usable_cpus", lambda: 4)
    monkeypatch.setattr(machine, "cpu_flags", set)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    found = only(machine.cpus())
    assert (found.level, found.mend) == (
        NOTE,
        "export OMP_NUM_THREADS=4",
    ) and "OMP_NUM_THREADS=16 asks for them" in found.text
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert only(machine.cpus()).mend == "unset OMP_NUM_THREADS  # or train.threads=4"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert only(machine.cpus()).level == OK
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(machine, "torch_threads", lambda: 64)
    assert "torch does not know the limit of the container or job" in only(machine.cpus()).text
    monkeypatch.setattr(machine, "torch_threads", lambda: 4)
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx2", "amx_bf16"})
    assert "bf16 matrix units (AMX)" in list(machine.cpus())[1].text


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
    ],
)
def test_the_limit_of_a_container(monkeypatch, tmp_path, files, limit):
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.cpu_limit() == limit
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.usable_cpus() == int(limit or 8)


def test_memory_is_the_smaller_of_system_and_container(monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:   62500000 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", meminfo)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.memory().facts["free_gb"] == 64.0
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    assert (machine.memory().level, machine.memory().facts["free_gb"]) == (NOTE, 3.0)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory().level == OK


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    def refuses(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuses)
    found = only(machine.writable("out", tmp_path / "a" / "b"))
    assert (found.level, found.text) == (PROBLEM, f"Nothing can be written to {tmp_path} for out: Permission denied.")
    assert only(machine.writable("the cache", tmp_path)).level == NOTE


def test_a_folder_that_will_be_made_is_not_made_by_the_doctor(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=50e9))
    assert (
        only(machine.writable("out", tmp_path / "a" / "b")).text
        == f"50.0 GB are free for out ({tmp_path / 'a' / 'b'})."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(monkeypatch, tmp_path):
    def refuses(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(machine.fcntl, "flock", refuses)
    found = next(iter(machine.writable("out", tmp_path)))
    assert found.level == PROBLEM and "has no locks" in found.text


@pytest.mark.parametrize(("free_gb", "level"), [(0.1, PROBLEM), (2.0, NOTE), (100.0, OK)])
def test_free_space(tmp_path, free_gb, level):
    assert machine.space("out", tmp_path, free_gb, "out=...").level == level


def test_the_shared_memory_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(total=64 * 2**20, free=0))
    found = only(machine.shared_memory())
    assert found.level == NOTE and "has 0.07 GB" in found.text and "--shm-size" in found.mend
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    assert list(machine.shared_memory()) == []


# -- Slurm -------------------------------------------------------------------------------------------------------------

SINFO = """\
debug*|up|30:00|2|(null)|64
gpu|up|2-00:00:00|12|gpu:a100:8(S:0-1),nvme:1|128
gpu|up|2-00:00:00|4|gpu:h100:4|96+
old|drain|infinite|3|gpu:4|32
"""


def slurm(monkeypatch, listing, why="", programs=scheduler.PROGRAMS):
    """A machine with these programs of Slurm, whose sinfo answers this."""
    monkeypatch.setattr(scheduler.shutil, "which", lambda name: f"/usr/bin/{name}" if name in programs else None)
    monkeypatch.setattr(scheduler, "run_tool", lambda command: (listing, why))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_partitions_and_the_settings_of_a_job(monkeypatch):
    slurm(monkeypatch, SINFO)
    debug, a100, h100, old, job = scheduler.findings()
    assert a100.text == "Partition gpu: 12 machines with 8 a100 GPUs and 128 CPUs each, at most 2-00:00:00."
    assert debug.text.startswith("Partition debug: 2 machines with no GPU") and h100.facts["gpus"] == 4
    assert old.level == NOTE and "4 GPUs" in old.text
    gpu_settings = "cluster.gpus_per_node=8 cluster.gpu_type=a100 cluster.cpus_per_task=16"
    expected = f"cluster=slurm cluster.partition=gpu {gpu_settings} cluster.timeout_min=1440"
    assert job.facts["settings"] == expected


def test_the_settings_are_ones_that_a_run_accepts(monkeypatch):
    from pixlat.common.config.resolve import resolve
    from pixlat.launch.cluster.submit import check
    from pixlat.methods import get_spec

    slurm(monkeypatch, SINFO)
    *_, job = scheduler.findings()
    settings = dict(part.split("=", 1) for part in job.facts["settings"].split())
    run = resolve(get_spec("jit"), {"cluster.name": settings.pop("cluster"), **settings, "train.batch": "64"})
    check(run)
    assert run.cluster.gpus_per_node == 8 and run.cluster.gpu_type == "a100"


def test_slurm_that_is_missing_or_does_not_answer(monkeypatch):
    slurm(monkeypatch, None, programs=())
    assert only(scheduler.findings()).level == OK
    slurm(monkeypatch, None, programs=("sbatch", "squeue"))
    assert only(scheduler.findings()).text == "Slurm is here without scontrol, srun, which jobs need."
    slurm(monkeypatch, None, "Unable to contact slurm controller")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    found = only(scheduler.findings())
    assert found.level == PROBLEM and "(Unable to contact slurm controller)" in found.text
    monkeypatch.delenv("SLURM_CONF")
    monkeypatch.setattr(scheduler, "CONFIGURATIONS", ())
    assert only(scheduler.findings()).level == NOTE
    slurm(monkeypatch, "")
    assert "no partition" in only(scheduler.findings()).text


def test_generic_resources_and_time_limits():
    assert (
        scheduler.gpus_in("gpu:4") == [("", 4)]
        and scheduler.gpus_in("(null)") == []
        and scheduler.gpus_in("mps:400") == []
    )
    assert scheduler.gpus_in("gpu:a100:2(S:0),gpu:v100:1") == [("a100", 2), ("v100", 1)]
    cases = {"30:00": 30, "1-12:00:00": 2160, "45": 45, "02:00:00": 120, "infinite": None}
    assert {limit: scheduler.minutes(limit) for limit in cases} == cases


def test_a_program_that_fails_says_why():
    assert run_tool(["sh", "-c", "echo no >&2; exit 3"]) == (None, "no")
    assert run_tool(["sh", "-c", "exit 3"]) == (None, "sh ended with exit code 3")
    assert run_tool(["sleep", "9"], seconds=0.1) == (None, "sleep did not answer within 0.1 s")
    assert run_tool(["no-such-program"])[0] is None


# -- what is measured --------------------------------------------------------------------------------------------------


def test_the_rate_of_products(monkeypatch):
    monkeypatch.setattr(measured, "SECONDS", 0.001)
    monkeypatch.setitem(measured.SIDES, "cpu", 64)
    assert 0 < measured.tflops(torch.device("cpu"), "fp32") < 100
    seconds = itertools.chain([9.0, 0.05, 0.01], itertools.repeat(0.02))  # loading, a disturbed product, a free one
    monkeypatch.setattr(measured, "timed", lambda left, right, number: next(seconds))
    assert measured.tflops(torch.device("cpu"), "fp32") == pytest.approx(2 * 64**3 / 0.01 / 1e12)


def test_the_demo_takes_the_time_that_its_products_take(monkeypatch):
    monkeypatch.setattr(measured, "tflops", lambda device, precision: {"fp32": 0.176, "bf16": 0.4}[precision])
    monkeypatch.setattr(measured.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    demo, faster = measured.speed(torch.device("cpu"))
    assert demo.text.endswith("will take about 7 minutes.") and "fp32 0.176, bf16 0.4 TFLOP/s" in demo.text
    assert (faster.text, faster.mend) == ("On this CPU bf16 is 2.3 times as fast as fp32.", "train.precision=bf16")
    monkeypatch.setattr(measured.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    assert "the load is 99.0" in next(iter(measured.speed(torch.device("cpu")))).text


def test_the_demo_is_the_one_of_the_record():
    record = json.loads((ROOT / "evaluation" / "results" / "jit-emoji32-demo-seed0.json").read_text())
    assert record["train"]["macs_total"] == measured.DEMO_MACS


def test_rates_beside_the_data_sheet():
    rates = {"fp32": 18.0, "bf16": 250.0}
    found = measured.beside_data_sheet("text", "NVIDIA A100-SXM4-80GB", rates)
    assert (
        found.level == OK
        and "bf16 reaches 80% of the data sheet's rate" in found.text
        and "hardware=a100" in found.text
    )
    assert measured.beside_data_sheet("text", "NVIDIA A100-SXM4-80GB", {"fp32": 5.0, "bf16": 60.0}).level == NOTE
    assert measured.beside_data_sheet("text", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", rates).text == "text"


def test_two_processes_meet_and_those_that_cannot_are_ended(monkeypatch):
    assert only(measured.meeting("gloo", seconds=120)).level == OK
    monkeypatch.setattr(measured, "MEMBER", "import time; time.sleep(60)")
    found = only(measured.meeting("gloo", seconds=0.5))
    assert found.level == PROBLEM and "they did not end within 0.5 s." in found.text
    monkeypatch.setattr(measured, "MEMBER", "raise SystemExit('RuntimeError: no interface')")
    assert "RuntimeError: no interface." in only(measured.meeting("nccl")).text


def test_user_errors_of_the_checks_are_findings_and_not_the_end(monkeypatch):
    def fails():
        raise UserError("common/data/emoji32.webp is damaged")

    monkeypatch.setattr("pixlat.common.images.emoji32.load_emoji32", fails)
    assert only(packages.shipped_files()).text == "common/data/emoji32.webp is damaged"
