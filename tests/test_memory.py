"""The memory of a step is predicted from fake tensors: against closed forms, against this machine,
and with blocks recomputed; and the plan built on it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from process_runs import build
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import INFO, TINY_JIT, settings, tiny_jit

from pixlat.common.accounting.memory import LiveBytes, step_memory
from pixlat.common.config.resolve import published_score, resolve
from pixlat.common.datasets.load import summarise
from pixlat.common.seeds import seed_step
from pixlat.common.training.recompute import recompute_blocks
from pixlat.launch import hardware, plan
from pixlat.methods import get_class, get_spec, registered
from pixlat.methods.base import DataInfo
from pixlat.methods.jit.method import JiTMethod

ROOT = Path(__file__).resolve().parent.parent


def test_live_bytes_follow_tensors_from_their_making_to_their_end() -> None:
    with FakeTensorMode(), LiveBytes() as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        assert memory.live == 4000
        c = b.double()
        assert memory.live == 12_000
        del c
        d = torch.ones(250)
        assert memory.live == 5000 and memory.peak == 12_000
        del a, d
        assert memory.live == 4000  # b is the same storage
        del b
        assert memory.live == 0


def test_the_parts_of_a_step_are_those_of_its_parameters() -> None:
    config = settings(ema_decay=[0.9, 0.99])
    memory = step_memory(JiTMethod, TINY_JIT, config, INFO, micro_batch=4)
    method = tiny_jit()
    trained = 4 * sum(p.numel() for p in method.parameters() if p.requires_grad)
    stored = 4 * sum(tensor.numel() for tensor in (*method.parameters(), *method.buffers()))
    steps = 4 * len([p for p in method.parameters() if p.requires_grad])  # Adam's counters
    assert memory.trained == trained and memory.averages == 2 * trained
    assert stored <= memory.weights < 1.1 * stored
    assert memory.optimizer == pytest.approx(2 * trained + steps, rel=0.01)
    assert memory.outside_blocks + 4 * memory.largest_block == trained
    fixed = memory.weights + memory.optimizer + memory.averages
    assert memory.peak > fixed + trained and memory.peak_of_others > fixed + memory.activations


def test_activations_grow_with_the_micro_batch_and_gradients_wait_for_the_last() -> None:
    small, large = (step_memory(JiTMethod, TINY_JIT, settings(), INFO, micro_batch=size) for size in (4, 64))
    assert large.activations == pytest.approx(16 * small.activations, rel=0.1)
    assert (large.weights, large.optimizer, large.averages) == (small.weights, small.optimizer, small.averages)
    waiting = step_memory(JiTMethod, TINY_JIT, settings(), INFO, micro_batch=64, accumulated=True)
    assert waiting.peak == pytest.approx(large.peak_of_others + large.trained, rel=0.02)


def losses_and_gradients(name: str, recompute: bool) -> dict[str, torch.Tensor]:
    method = build(name).train()
    if recompute:
        recompute_blocks(method)
    image, label = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32), torch.tensor([1, 2])
    found = {}
    for phase in method.phases:
        seed_step(0, 1, 2)
        loss = method(phase, {"image": image, "label": label, "index": label}, 0)["loss"]
        loss.backward()
        found |= {f"{phase}/{key}": p.grad for key, p in method.named_parameters() if p.grad is not None} | {
            phase: loss.detach()
        }
        method.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", [name for name in sorted(registered()) if name != "vae"])  # which has no blocks
def test_recomputed_blocks_give_the_same_losses_and_gradients_bit_for_bit(name: str) -> None:
    plain, recomputed = losses_and_gradients(name, False), losses_and_gradients(name, True)
    assert len(plain) > 20 and plain.keys() == recomputed.keys()
    assert [key for key in plain if not torch.equal(plain[key], recomputed[key])] == []


def test_recomputed_blocks_take_less_memory() -> None:
    less, more = (
        step_memory(JiTMethod, TINY_JIT, settings(recompute_blocks=value), INFO, micro_batch=64).activations
        for value in (True, False)
    )
    assert less < 0.4 * more


# pMF's perceptual networks see every sample: the most that a step may take, which is what is predicted
ALL_COMPARED = "model.perceptual_max_t=1"
RECOMPUTED = "train.recompute_blocks=true"


@pytest.mark.parametrize(
    "changes",
    [
        ("method=jit,sit,rae_decoder",),
        ("method=jit", RECOMPUTED),
        ("method=pmf", ALL_COMPARED),
        ("method=pmf", ALL_COMPARED, RECOMPUTED),
    ],
)
def test_predictions_are_within_15_percent_of_what_this_machine_takes(changes: tuple[str, ...]) -> None:
    command = [sys.executable, "evaluation/speed.py", "memory", *changes, "speed.batch=48"]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    measured = json.loads(f"[{ended.stdout.replace('}', '},').rstrip().removesuffix(',')}]")
    assert [each["method"] for each in measured] == changes[0].removeprefix("method=").split(",")
    for each in measured:
        assert each["predicted_bytes"] == pytest.approx(each["step_bytes"], rel=0.15), each
        assert each["step_bytes"] > 5e7


def test_muon_has_one_moment_for_a_matrix_and_adam_two() -> None:
    planned = [
        plan.Plan(plan.Keys(gpus=1), resolve(get_spec("pmf"), {"preset": "demo", "model.optimizer": kind})).step(
            2, False
        )
        for kind in ("muon", "adam")
    ]
    assert planned[0].trained == planned[1].trained
    assert planned[0].optimizer < 0.7 * planned[1].optimizer


# -- the plan ----------------------------------------------------------------------------------------------------------

SMALL = ("method=jit", "model.depth=2")


def test_a_plan_says_memory_speed_days_and_what_is_assumed() -> None:
    told = plan.work([*SMALL, "hardware=a100", "gpus=2", "nodes=1", "train.batch=64", "train.images=1000000"])
    for text in (
        "> ddp",
        "fsdp2",
        "recomputed",
        "32 x 1",
        "35% [assumed]",
        "images/s",
        "GPU-hours",
        "50,000 images of 19",
        "GB/s of shards",
    ):
        assert text in told, text
    given = plan.work([*SMALL, "hardware=a100", "gpus=2", "efficiency=0.5", "train.batch=64"])
    assert "50% [given]" in given and "35%" not in given


def limits_of(*arguments: str) -> dict[str, tuple[float, bool]]:
    """(images/s, whether it binds) by the name of the limit."""
    found = {}
    for line in plan.work(arguments).splitlines():
        words = line.removeprefix("limits").split()
        if len(words) > 2 and words[2] == "images/s" and words[0] in ("compute", "decoding", "network", "noise"):
            found.setdefault(words[0], (float(words[1].replace(",", "")), words[3:5] == ["<", "binds"]))
    return found


def test_a_plan_names_the_limit_that_binds() -> None:
    vae = limits_of("method=sit", "preset=imagenet256-b", "model.depth=1", "gpus=8")
    # SD-VAE's encoder alone takes 136 GMACs an image
    assert vae["compute"][1] and vae["compute"][0] < 8 * 0.23 * 495e12 / 2 / 135e9
    assert vae["decoding"] == (8 * 12 * 250, False)
    few = limits_of(
        "method=jit", "preset=imagenet256-b", "model.depth=1", "model.context_start=0", "gpus=8", "data.workers=1"
    )
    assert few["decoding"] == (8 * 250, True) and not few["compute"][1]
    assert "network" in limits_of(*SMALL, "gpus=1", "nodes=2", "train.batch=8") and "decoding" not in limits_of(
        *SMALL, "gpus=1", "train.batch=8"
    )


def test_the_noise_of_one_step_sampling_may_bind() -> None:
    planned = plan.Plan(plan.Keys(gpus=8), resolve(get_spec("pmf"), {"preset": "demo"}))
    lines = planned.sampling()
    assert (
        any("noise" in line and "3,072 random numbers" in line for line in lines)
        and sum("< binds" in line for line in lines) == 1
    )


def test_what_is_counted_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    plan.work([*SMALL, "hardware=a100", "gpus=1", "train.batch=4"])
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("planning: jit demo on 1 x 1 a100") and "loading PyTorch" in told[0]
    for text in (
        "multiply-accumulates of a training step",
        "memory of a step of 4 images, blocks kept",
        "blocks recomputed",
        "of a sample",
    ):
        assert any(text in line for line in told), text


@pytest.mark.parametrize(("name", "changes"), [("jit", {}), ("pmf", {"model.jvp": "func"}), ("pmf", {})])
def test_blocks_that_are_alike_are_looked_up_and_give_the_same_memory(
    name: str, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thirds of a plan's time went into working out the same shapes for every block;
    within forward derivatives nothing is looked up.
    """
    run = resolve(get_spec(name), {"preset": "demo", **changes})
    info = DataInfo.of(summarise(run.data))
    before = FakeTensorMode.cache_info().hits
    found = step_memory(get_class(name), run.model, run.train, info, 4)
    assert FakeTensorMode.cache_info().hits > before + 500
    monkeypatch.setattr(LiveBytes, "cache_enabled", property(lambda self: False, lambda self, wanted: None))
    assert step_memory(get_class(name), run.model, run.train, info, 4) == found


def test_a_plan_counts_the_stages_before_and_names_what_it_does_not_count() -> None:
    run = resolve(get_spec("repa"), {"preset": "demo"})
    counted, others = plan.Plan(plan.Keys(gpus=1), run).stages()
    assert counted == "cost       0.01999 PMACs in all [counted]: this run 0.01034, earlier ones: tokenizer 0.009651"
    assert others == "           not counted, because others trained them: EfficientNet-Lite0 on ImageNet (teacher)"
    released = plan.Plan(plan.Keys(gpus=1), resolve(get_spec("sit"), {"preset": "imagenet256-b"})).stages()
    assert released == ["cost       not counted, because others trained them: sd-ft-ema (tokenizer)"]
    assert plan.Plan(plan.Keys(gpus=1), resolve(get_spec("jit"), {"preset": "demo"})).stages() == []


def test_rates_and_memory_follow_from_what_is_counted() -> None:
    keys = plan.Keys(hardware="h100", nodes=2, gpus=8, scaling=0.9)
    planned = plan.Plan(keys, resolve(get_spec("jit"), {"train.batch": "128"}))
    assert planned.rate(1e9, 0.5) == pytest.approx(16 * 0.9 * 0.5 * 989e12 / 2e9)
    step = planned.step(8, False)
    assert planned.bytes_a_gpu(step, "ddp", 8) == step.peak + step.trained
    gathered, spread = 2 * step.largest_block + step.outside_blocks, step.trained + step.optimizer + step.averages
    sharded = step.peak_of_others - spread * 15 / 16 + gathered + step.trained / 16
    assert planned.bytes_a_gpu(step, "fsdp2", 8) == pytest.approx(sharded, abs=2)
    # gradients stay whole while they are accumulated
    assert planned.bytes_a_gpu(planned.step(4, False), "fsdp2", 4) > sharded
    assert planned.largest_micro_batch("ddp", False) == (8, step.peak + step.trained)  # all of a GPU's share fits


def test_the_largest_micro_batch_is_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan.Plan(plan.Keys(gpus=1), resolve(get_spec("jit"), {"train.batch": "48"}))
    bytes_of = {size: planned.step(size, False).peak for size in (6, 8)}
    planned.hardware = hardware.Hardware(bytes_of[6] / hardware.USABLE / 1e9 + 1e-6, 989, 495, 67)
    assert planned.largest_micro_batch("none", False) == (6, bytes_of[6])
    assert bytes_of[8] > bytes_of[6]


def test_a_plan_offers_only_micro_batches_that_the_method_can_train_on() -> None:
    """pMF's flow-matching half of 3 images is no whole number of samples."""
    planned = plan.Plan(plan.Keys(gpus=1), resolve(get_spec("pmf"), {"preset": "demo", "train.batch": "12"}))
    planned.step = lambda micro_batch, recompute: SimpleNamespace(peak=micro_batch)  # type: ignore[assignment, return-value]
    planned.hardware = hardware.Hardware(3 / hardware.USABLE / 1e9, 989, 495, 67)
    assert planned.largest_micro_batch("none", False) == (2, 2)
    alone = plan.Plan(plan.Keys(gpus=4), resolve(get_spec("pmf"), {"preset": "demo", "train.batch": "4"}))
    with pytest.raises(plan.UserError, match=r"train\.micro_batch=1"):
        alone.largest_micro_batch("ddp", False)


def test_recomputed_blocks_cost_their_forward_pass_once_more() -> None:
    run = resolve(get_spec("jit"), {"preset": "demo"})
    planned = plan.Plan(plan.Keys(gpus=1), run)
    kept, recomputed = (plan.training_macs(planned.method_class, run, planned.info, value) for value in (False, True))
    assert 1.25 * kept < recomputed < 4 / 3 * kept


def test_a_published_row_needs_no_data() -> None:
    planned = plan.Plan(plan.Keys(nodes=4), resolve(get_spec("jit"), {"preset": "imagenet256-h"}))
    assert planned.info.num_classes == 1000
    assert published_score(get_spec("jit"), planned.run.preset).startswith("FID 1.86, IS 303.4 (Table 7")
    # the paper's 182 Gflops
    assert plan.training_macs(planned.method_class, planned.run, planned.info, False) == pytest.approx(
        3 * 182e9, rel=0.01
    )


def test_a_gpu_that_is_too_small_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hardware.HARDWARE, "h100", hardware.Hardware(0.01, 989, 495, 67))
    with pytest.raises(plan.UserError, match="Not even one image fits"):
        plan.work([*SMALL, "gpus=1", "train.batch=16"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hardware=h1000"], "Did you mean 'h100'"),
        (["gpus=0"], "must be at least 1"),
        (["efficiency=2"], "is a share"),
        (["gpus=7"], "multiple of the 7"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str) -> None:
    with pytest.raises(plan.UserError, match=message):
        plan.work([*SMALL, *arguments])
