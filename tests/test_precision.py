"""What products are computed in, as far as a CPU can show it: which precision is chosen, which switches are set,
and that they come back.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import PartialState
from toys import settings

from pixlat.common.config.resolve import load_presets, resolve
from pixlat.common.precision import computing_in, executed_precision, resolve_precision, set_float32_products
from pixlat.common.training.setup import make_accelerator
from pixlat.evaluation.features.extractor import exact_float32
from pixlat.methods import get_spec, registered

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def switches() -> tuple[bool, bool]:
    """TF32 in matrix products, in cuDNN's convolutions."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def _switches_as_before() -> Iterator[None]:
    before = switches()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=["emulates", "native"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine with a GPU that emulates bfloat16 (V100, T4), or one that multiplies it."""
    native = request.param == "native"
    PartialState()  # which has found this machine's CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: native)
    return str(request.param)


def test_the_device_that_computes_decides(gpu: str) -> None:
    on_gpu = {setting: resolve_precision(setting, GPU) for setting in ("auto", "bf16", "tf32", "fp32")}
    on_cpu = {setting: resolve_precision(setting, CPU) for setting in ("auto", "bf16", "tf32", "fp32")}
    assert on_cpu == {"auto": "fp32", "bf16": "bf16", "tf32": "fp32", "fp32": "fp32"}
    native = {"auto": "bf16", "bf16": "bf16", "tf32": "tf32", "fp32": "fp32"}
    assert on_gpu == (native if gpu == "native" else native | {"auto": "fp32", "tf32": "fp32"})
    assert executed_precision("tf32", GPU) == ("tf32" if gpu == "native" else "float32")


def test_a_run_on_the_cpu_of_a_gpu_machine_stays_float32(gpu: str) -> None:
    assert make_accelerator(settings()).device.type == "cpu"
    assert make_accelerator(settings()).mixed_precision == "no"


@pytest.mark.parametrize(
    ("precision", "expected"), [("fp32", (False, False)), ("tf32", (True, True)), ("bf16", (False, True))]
)
def test_matrix_products_and_convolutions_agree(precision: str, expected: tuple[bool, bool]) -> None:
    set_float32_products(precision)
    assert switches() == expected
    # torch's readers do not see mixed interfaces
    assert torch.get_float32_matmul_precision() == ("high" if expected[0] else "highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=expected[1]):
        assert switches() == expected


def test_a_float32_run_switches_off_the_convolutions_tf32_that_torch_has_by_default() -> None:
    torch.backends.cudnn.allow_tf32 = True
    make_accelerator(settings(precision="fp32"))
    assert switches() == (False, False)


def test_sampling_leaves_the_switches_and_autocast_of_training_as_they_were(gpu: str) -> None:
    set_float32_products("tf32")
    with torch.autocast("cpu", torch.bfloat16):
        with computing_in("fp32", CPU) as executed:
            assert executed == "float32" and switches() == (False, False)
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert switches() == (True, True)
    with computing_in("bf16", CPU) as executed:
        assert executed == "bfloat16" and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="stop"), computing_in("fp32", CPU):
        raise RuntimeError("stop")
    assert switches() == (True, True)


def test_the_evaluators_features_stay_exact_and_no_cpu_begins_to_round() -> None:
    on_cpu = getattr(torch.backends.mkldnn, "matmul", None)
    before = None if on_cpu is None else on_cpu.fp32_precision
    set_float32_products("tf32")
    with exact_float32():
        assert switches() == (False, False)
    assert switches() == (True, True)
    assert on_cpu is None or on_cpu.fp32_precision == before


# What the authors had (RAE and SiT float32 with TF32; pMF float32 whose products TPUs and the torch branch round;
# JiT bfloat16), else bf16 where it is fast.
TRAINED = {
    "jit": "auto",
    "pmf": "tf32",
    "rae": "tf32",
    "rae_decoder": "auto",
    "sit": "tf32",
    "dit": "tf32",
    "repa": "auto",
    "reg": "auto",
    "dsd": "auto",
}


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_presets_train_in_their_authors_precision(name: str) -> None:
    spec = get_spec(name)
    for preset in load_presets(spec.presets):
        if preset.startswith("imagenet"):
            assert resolve(spec, {"preset": preset}).train.precision == TRAINED[name], preset
    assert resolve(spec, {"preset": "demo"}).train.precision == "auto"  # the demos
    assert set(TRAINED) <= set(registered())


# the others: float32 with TF32, as in their authors' scripts
SAMPLED = {"jit": "bf16", "dsd": "fp32", "rae_decoder": "fp32"}
TRUNCATED = ("rae", "repa", "reg")


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_presets_sample_and_round_as_their_authors(name: str) -> None:
    spec = get_spec(name)
    for preset in load_presets(spec.presets):
        if preset.startswith("imagenet"):
            found = resolve(spec, {"preset": preset}).eval
            assert (found.precision, found.uint8) == (
                SAMPLED.get(name, "tf32"),
                "truncate" if name in TRUNCATED else "round",
            ), preset
    demo = resolve(spec, {"preset": "demo"}).eval
    assert (demo.precision, demo.uint8) == ("fp32", "round")  # one hash on CPUs and GPUs
