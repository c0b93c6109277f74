"""The trainer: phases, accumulation, averages, schedules, exact resume, clean stops,
and failures that keep the last good checkpoint.
"""

import errno
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from toys import INFO, Killed, TinyGan, batches_until, fit, settings, state_of, tiny_jit, toy_images

from pixlat.common.datasets.batches import TrainingPlan, training_batches
from pixlat.common.errors import UserError
from pixlat.common.frozen.remember import FeatureTable
from pixlat.common.seeds import Noise
from pixlat.common.training.ema import Ema, decays_by_name, effective_decay, effective_halflife
from pixlat.common.training.loop import Stopped, train
from pixlat.common.training.meters import read_rows, truncate_rows
from pixlat.common.training.optim import build_optimizers, learning_rate
from pixlat.common.training.setup import make_accelerator, replicate
from pixlat.common.training.steps import split_batch
from pixlat.common.weights import checkpoint
from pixlat.methods.base import Method, ParamGroup
from pixlat.methods.jit.config import JiTSample

METHODS = {"jit": tiny_jit, "gan": TinyGan}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [
        (row["step"], [value for name, value in row.items() if name.endswith("loss")])
        for row in read_rows(folder / "metrics.jsonl")
    ]


def assert_equal_states(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        assert torch.equal(a[name], b[name]), name


GOLDEN = {  # step -> losses of the logging window that ends there
    "jit": {3: [0.7171456813812256], 20: [1.2052545547485352]},
    "gan": {3: [1.9091769456863403, 0.1962217539548874], 20: [0.7697211503982544, 5.774008750915527]},
}


@pytest.mark.parametrize("name", METHODS)
def test_golden_losses(tmp_path, name):
    """A change in common/ leaves these equal, or says why in its message.

    Other processors round differently, hence 1e-4.
    """
    fit(METHODS[name](), tmp_path)
    found = {step: values for step, values in losses(tmp_path) if step in (3, 20)}
    assert found == {
        step: [pytest.approx(value, rel=1e-4) for value in values] for step, values in GOLDEN[name].items()
    }


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("killed_at", [3, 5, 11, 19])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, make, killed_at):
    whole = fit(make(), tmp_path / "whole")
    with pytest.raises(Killed):
        fit(make(), tmp_path / "cut", stop_after=killed_at)
    resumed = fit(make(), tmp_path / "cut")
    assert_equal_states(state_of(whole), state_of(resumed))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert [step for step, _ in losses(tmp_path / "cut")] == [3, 6, 9, 12, 15, 18, 20]


def test_a_finished_run_does_nothing_more(tmp_path):
    first = state_of(fit(tiny_jit(), tmp_path))
    before = (tmp_path / "metrics.jsonl").read_text()
    assert_equal_states(first, state_of(fit(tiny_jit(), tmp_path, stop_after=0)))
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_damaged_or_unfinished_checkpoint_is_passed_over(tmp_path, caplog):
    whole = state_of(fit(tiny_jit(), tmp_path / "whole"))
    with pytest.raises(Killed):
        fit(tiny_jit(), tmp_path / "cut", settings(keep_checkpoints=3), stop_after=18)
    newest, second, oldest = sorted((tmp_path / "cut/checkpoints").glob("step-*"), reverse=True)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (second / "manifest.json").unlink()
    assert checkpoint.latest(tmp_path / "cut/checkpoints") == oldest
    assert "sha256" in caplog.text and "unfinished" in caplog.text
    assert_equal_states(whole, state_of(fit(tiny_jit(), tmp_path / "cut")))


def test_only_the_newest_checkpoints_stay_and_leftovers_go(tmp_path):
    (tmp_path / "checkpoints/.writing-step-00000001-1").mkdir(parents=True)
    fit(tiny_jit(), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000015", "step-00000020"]


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_accumulation_equals_one_batch(tmp_path, make):
    whole, parts = fit(plain(make()), tmp_path / "a"), fit(plain(make()), tmp_path / "b", settings(micro_batch=2))
    for name, value in state_of(whole).items():
        if name == "mean":  # of the first three micro-batches, whatever their size
            continue
        torch.testing.assert_close(value, state_of(parts)[name], rtol=1e-4, atol=1e-6, msg=name)


def plain(method: Method) -> Method:
    """The method without draws of its own: the loss depends on the batch only."""
    if isinstance(method, TinyGan):
        forward = method.forward

        def quiet(phase, batch, step):
            randn, torch.randn = torch.randn, torch.zeros
            try:
                return forward(phase, batch, step)
            finally:
                torch.randn = randn

        method.forward = quiet
    else:
        method.eval()
        method.train = lambda mode=True: method  # type: ignore[method-assign]

        def draw(batch):
            x = batch["image"]
            return batch["label"], 0.2 + 0.5 * batch["index"] / INFO.num_train, torch.sin(37 * x)

        method.draw = draw
    return method


def test_phases_train_their_own_parameters_and_start_when_active(tmp_path):
    gan = TinyGan()
    before = {name: p.detach().clone() for name, p in gan.named_parameters()}
    fit(gan, tmp_path / "short", settings(images=16))
    assert torch.equal(gan.discriminator.weight, before["discriminator.weight"])
    assert not torch.equal(gan.generator.weight, before["generator.weight"])
    gan = TinyGan()
    result = fit(gan, tmp_path / "long")
    assert not torch.equal(gan.discriminator.weight, before["discriminator.weight"])
    assert list(result.emas[0].average) == ["generator.weight"]
    assert float(gan.mean) != 0 and not torch.equal(gan.teacher, before["generator.weight"])
    assert {"generator/loss", "discriminator/loss", "discriminator/real"} <= read_rows(tmp_path / "long/metrics.jsonl")[
        -1
    ].keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_stop_signal_saves_and_the_next_start_goes_on(tmp_path, number):
    whole = state_of(fit(tiny_jit(), tmp_path / "whole"))
    method = tiny_jit()
    method.after_step = lambda step: os.kill(os.getpid(), number) if step == 6 else None  # type: ignore[method-assign]
    with pytest.raises(Stopped, match=number.name) as stopped:
        fit(method, tmp_path / "cut")
    assert "step-00000007" in str(stopped.value)
    assert_equal_states(whole, state_of(fit(tiny_jit(), tmp_path / "cut")))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


class Watched(TinyGan):
    """Notes what the trainer tells and asks, in order; its moments are measured when the training is over."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, object]] = []

    def begin_step(self, images_seen):
        self.calls.append(("begin", images_seen))

    def forward(self, phase, batch, step):
        self.calls.append((phase, step))
        return super().forward(phase, batch, step)

    def after_training(self, batches):
        self.calls.append(("after", self.training))
        return {"mean": self.generator.weight.detach().mean() + 0 * next(batches)["image"].mean()}


def test_a_step_begins_once_and_the_end_measures_the_evaluated_average(tmp_path):
    method, config = Watched(), settings(micro_batch=4)
    accelerator = make_accelerator(config, tmp_path)
    images = toy_images()
    plan = TrainingPlan(images.labels, config.batch, 3, balanced=True)
    batches = partial(batches_until, images, plan, config, 0, 1, None)
    state = train(method, config, batches, tmp_path, 3, "toy", accelerator, evaluated="0.9")
    steps = [
        [("begin", 8 * step), *[("generator", step)] * 2, *[("discriminator", step)] * (2 if 8 * step >= 16 else 0)]
        for step in range(20)
    ]
    assert method.calls == [*(call for step in steps for call in step), ("after", False)]
    saved = checkpoint.load(checkpoint.latest(tmp_path / "checkpoints")).tensors
    torch.testing.assert_close(saved["model"]["mean"], saved["ema-0.9"]["generator.weight"].mean())
    assert not torch.equal(saved["model"]["generator.weight"], saved["ema-0.9"]["generator.weight"])
    assert method.training and state.saved is not None


def test_a_non_finite_loss_stops_before_anything_is_saved(tmp_path):
    method = tiny_jit()
    forward = method.forward
    method.forward = lambda phase, batch, step: {
        k: v * (float("nan") if step >= 11 else 1) for k, v in forward(phase, batch, step).items()
    }
    with pytest.raises(UserError, match=r"loss became non-finite .* last good checkpoint is .*step-00000010"):
        fit(method, tmp_path)
    good = checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))
    assert all(value.isfinite().all() for value in good.tensors["model"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss of step 10 is finite, its gradient is not: the checkpoint after it would have been called the last
    good one, and resumed for ever.
    """
    method = tiny_jit()
    forward = method.forward

    def blown_up(phase, batch, step):
        out = forward(phase, batch, step)
        if step == 9:
            out["loss"].register_hook(lambda gradient: gradient * float("nan"))
        return out

    method.forward = blown_up  # type: ignore[method-assign]
    with pytest.raises(
        UserError,
        match=(
            r"weights became non-finite at or before step 10, though the losses .* last good "
            r"checkpoint is .*step-00000005"
        ),
    ):
        fit(method, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    real = checkpoint.save_file

    def full(tensors, path, metadata=None):
        if "step-00000010" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"No space left .*last good checkpoint is .*step-00000005"):
        fit(tiny_jit(), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_real_write_failure_of_the_tensor_library_is_understood(tmp_path):
    """The kernel refuses files over 2 kB: safetensors itself fails, as it does on a full disk."""
    code = f"""
import resource, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]
from pathlib import Path
from toys import fit, tiny_jit
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
from pixlat.common.errors import UserError
try:
    fit(tiny_jit(), Path({str(tmp_path)!r}) / "run")
except UserError as error:
    sys.exit(f"REFUSED {{error}}")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "REFUSED cannot write the checkpoint" in result.stderr and "There is no earlier checkpoint" in result.stderr
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    fit(tiny_jit(), tmp_path)
    facts = tmp_path / "checkpoints/step-00000020/trainer.json"
    changed = facts.read_text().replace('"toy"', '"other"')
    facts.write_text(changed)
    manifest = facts.with_name("manifest.json")
    entries = json.loads(manifest.read_text())
    entries[facts.name] = {"bytes": facts.stat().st_size, "sha256": checkpoint.sha256_of(facts)}
    manifest.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="belongs to another configuration"):
        fit(tiny_jit(), tmp_path)


def test_previews_and_evaluation_cannot_disturb_training(tmp_path):
    config = settings()
    plan = TrainingPlan(toy_images().labels, config.batch, 3, balanced=True)

    def preview(state):
        torch.manual_seed(0)
        with state.weights("0.9") as method, torch.no_grad():
            method.sample(torch.arange(3), Noise([1, 2, 3]), JiTSample(steps=2))

    batches = partial(batches_until, toy_images(), plan, config, 0, 1, None)
    (tmp_path / "seen").mkdir()
    seen = train(tiny_jit(), config, batches, tmp_path / "seen", 3, "toy", make_accelerator(config), [(24, preview)])
    assert_equal_states(state_of(fit(tiny_jit(), tmp_path / "plain")), state_of(seen))


@pytest.mark.parametrize(("name", "loaders"), [("jit", 1), ("gan", 2)])
def test_loader_processes_are_those_of_the_training_alone(tmp_path, name, loaders):
    """Reading for `before_training` starts when it asks, and ends with it; its processes used to stay,
    prefetching, for the whole run.
    """
    config = settings(images=24)
    plan, made, alive = TrainingPlan(toy_images().labels, config.batch, 3, balanced=True), [], []

    def batches(start_step, accumulation):
        made.append(start_step)
        return training_batches(toy_images(), plan, start_step, config.batch, accumulation, workers=2)

    def count(state):
        alive.append(len(multiprocessing.active_children()))

    before = len(multiprocessing.active_children())
    train(METHODS[name](), config, batches, tmp_path, 3, "toy", make_accelerator(config), [(8, count)])
    assert [number - before for number in alive] == [2, 2, 2] and made == [0] * loaders
    assert len(multiprocessing.active_children()) == before


def test_features_seen_before_the_training_are_those_of_the_training(tmp_path):
    """In bf16 a remembered row was a float32 computation if `before_training` asked first,
    and another one after a resume. What is remembered is now float32 whoever asks,
    and what is not is computed under the training's autocast in both places.
    """

    class Remembering(TinyGan):
        phases = ("generator",)

        def __init__(self):
            super().__init__()
            self.features_of = FeatureTable(lambda images: (self.discriminator(images.flatten(1)),), INFO.num_train)

        def before_training(self, batches):
            self.first = [self.features_of(batch)[0].dtype for batch in islice(batches, 2)]
            self.asked = self.features_of.compute(next(batches)["image"])[0].dtype

        def forward(self, phase, batch, step):
            fresh = FeatureTable(self.features_of.compute, INFO.num_train)
            assert torch.equal(self.features_of(batch)[0], fresh(batch)[0])
            assert self.features_of.compute(batch["image"])[0].dtype == self.asked
            return super().forward(phase, batch, step)

    method = Remembering()
    method.discriminator.requires_grad_(False)
    fit(method, tmp_path, settings(precision="bf16", images=24))
    assert method.first == [torch.float32] * 2 and method.asked == torch.bfloat16


def two_processes(script: str, *arguments: object) -> list[str]:
    """Runs a script in two processes, with `folder` and the toys at hand; what each printed. Both must end well."""
    start = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]
import torch; torch.set_num_threads(1)
from pathlib import Path
from toys import *
folder = Path(sys.argv[1])
"""
    port = 20000 + os.getpid() % 20000
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command, pipes = (
        [sys.executable, "-c", start + script, *map(str, arguments)],
        {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    children = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(2)
    ]
    printed = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], [errors for _, errors in printed]
    return [out for out, _ in printed]


def test_two_processes_equal_two_micro_batches(tmp_path):
    """Same global batch, same draws for each micro-batch; gloo sums in another order, hence 1e-6."""
    one = fit(tiny_jit(), tmp_path / "one", settings(micro_batch=4, images=40))
    (tmp_path / "two").mkdir()
    two_processes("fit(tiny_jit(), folder, settings(images=40))", tmp_path / "two")
    two = checkpoint.load(checkpoint.latest(tmp_path / "two/checkpoints")).tensors
    for name, value in one.method.state_dict().items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-6, atol=1e-6, msg=name)
    assert losses(tmp_path / "two")[-1][1] == pytest.approx(losses(tmp_path / "one")[-1][1], rel=1e-6)


RESUMED_BY_TWO = """
import shutil
from pixlat.common.weights import checkpoint
from pixlat.common.training import resume
short = lambda **changes: settings(images=80, **changes)
whole = state_of(fit(tiny_jit(), folder / "whole", short()))
try:
    fit(tiny_jit(), folder / "cut", short(), stop_after=7)
except Killed:
    pass
torch.distributed.barrier()
if torch.distributed.get_rank():
    def unseen(*_, **__):
        raise AssertionError("another machine may not see the files, and need not read them")
    resume.safe_open = checkpoint.latest = checkpoint.load_facts = unseen
else:
    shutil.copytree(folder / "cut", folder / "one")
resumed = state_of(fit(tiny_jit(), folder / "cut", short()))
assert whole.keys() == resumed.keys() and all(torch.equal(value, resumed[name]) for name, value in whole.items())
method = tiny_jit()
forward = method.forward
spoilt = lambda step: float("nan") if step >= 6 else 1
method.forward = lambda phase, batch, step: {k: v * spoilt(step) for k, v in forward(phase, batch, step).items()}
try:
    fit(method, folder / "spoilt", short())
except UserError as error:
    print(error)
"""


def test_several_processes_go_on_and_fail_alike(tmp_path):
    """Only the main process reads a checkpoint.

    A failure names the last good one in every process: the first to write failure.json may be any of them.
    The run keeps its micro-batches where one process goes on, and with them its draws.
    """
    errors = two_processes("from pixlat.common.errors import UserError\n" + RESUMED_BY_TWO, tmp_path)
    assert all(
        re.search(r"loss became non-finite .* last good checkpoint is .*spoilt/checkpoints/step-00000005", error)
        for error in errors
    ), errors
    one = fit(tiny_jit(), tmp_path / "one", settings(images=80))
    two = checkpoint.load(checkpoint.latest(tmp_path / "whole/checkpoints")).tensors["model"]
    for name, value in one.method.state_dict().items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_run_keeps_its_micro_batches():
    assert split_batch(settings(batch=64), processes=4) == (16, 1)
    assert split_batch(settings(batch=64), processes=2, began_with=16) == (16, 2)
    assert split_batch(settings(batch=64, micro_batch=8), processes=2, began_with=16) == (8, 4)
    with pytest.raises(
        UserError,
        match=r"micro-batches of 16 images, and 8 processes cannot divide .* a number of processes that divides 4",
    ):
        split_batch(settings(batch=64), processes=8, began_with=16)


def test_every_start_of_a_run_goes_on_in_one_wandb_run(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda self, project, init_kwargs: asked.append(init_kwargs["wandb"])
    )
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [])
    for folder in ("a", "a", "b"):
        fit(tiny_jit(), tmp_path / folder, settings(images=16, trackers=["wandb"]))
    assert asked[0] == asked[1] and asked[0]["resume"] == "allow" and asked[0]["id"] != asked[2]["id"]
    assert re.fullmatch(r"[\w-]{8,64}", asked[0]["id"])


def test_tensorboard_gets_the_losses(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tiny_jit(), tmp_path, settings(trackers=["tensorboard"]))
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent)).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert logged == [(step, pytest.approx(value[0])) for step, value in losses(tmp_path)]


def test_a_missing_tracker_package_is_an_error_with_the_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'pixlat\[trackers\]'"):
        make_accelerator(settings(trackers=["wandb"]))


def test_compiled_blocks_train_to_the_same_weights(tmp_path):
    eager = state_of(fit(plain(tiny_jit()), tmp_path / "eager", settings(images=24)))
    compiled = state_of(fit(plain(tiny_jit()), tmp_path / "compiled", settings(images=24, compile=True)))
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_recomputed_blocks_train_to_the_same_weights_bit_for_bit(tmp_path):
    """With dropout and accumulation; compiled blocks are recomputed as well."""
    kept = state_of(fit(tiny_jit(), tmp_path / "kept", settings(micro_batch=4)))
    assert_equal_states(
        kept, state_of(fit(tiny_jit(), tmp_path / "recomputed", settings(micro_batch=4, recompute_blocks=True)))
    )
    eager = state_of(fit(plain(tiny_jit()), tmp_path / "eager", settings(images=16)))
    both = state_of(fit(plain(tiny_jit()), tmp_path / "both", settings(images=16, compile=True, recompute_blocks=True)))
    for name, value in eager.items():
        torch.testing.assert_close(both[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_learning_rate_schedules():
    config = settings(images=1000, warmup_images=100, lr=2.0, schedule="constant")
    assert [learning_rate(config, n) for n in (0, 50, 100, 1000)] == [0.0, 1.0, 2.0, 2.0]
    config.schedule, config.min_lr = "cosine", 1.0
    assert [learning_rate(config, n) for n in (100, 550, 1000, 2000)] == pytest.approx([2.0, 1.5, 1.0, 1.0])
    config.schedule = "linear"
    assert [learning_rate(config, n) for n in (100, 325, 1000)] == pytest.approx([2.0, 1.75, 1.0])
    config.hold_images = 400
    assert [learning_rate(config, n) for n in (50, 100, 500, 750, 1000)] == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0])
    config.hold_images = 2000
    assert [learning_rate(config, n) for n in (100, 1000)] == [2.0, 2.0]


def test_ema_decay_and_halflife():
    p = nn.Parameter(torch.zeros(1))
    ema = Ema("0.9", {"p": torch.zeros(1)}, decay=0.9)
    p.data += 1
    for _ in range(3):
        ema.update({"p": p}, 1, 1)
    assert float(ema.average["p"]) == pytest.approx(1 - 0.9**3, abs=1e-6)
    half = Ema("h", {}, halflife_images=500e3, rampup=0.05)
    assert half.beta(1024, 1024) == pytest.approx(9.5367e-07, rel=1e-4)  # spec/pmf.md section 16
    assert half.beta(10000 * 1024, 1024) == pytest.approx(0.99858144, abs=1e-8)
    with ema.applied({"p": p}):
        assert p.item() == pytest.approx(1 - 0.9**3, abs=1e-6)
    assert p.item() == 1.0


def test_a_run_too_short_for_its_average_has_a_shorter_one():
    """decay^steps <= 0.1 is kept; otherwise 1 - 5 / steps, which leaves e^-5 of the initial weights and spans
    the last fifth of the run.
    """
    assert effective_decay(0.999, 2302) == 0.999 and 0.999**2302 < 0.1
    assert effective_decay(0.999, 2301) == 1 - 5 / 2301 and 0.999**2301 > 0.1
    assert [effective_decay(0.999, steps) for steps in (0, 3, 5, 400)] == [0.999, 0.0, 0.0, 0.9875]
    assert effective_decay(0.9875, 400) == 0.9875, "a shorter average is not made shorter again"
    assert effective_halflife(100.0, 0.0, steps=100, batch=4) == 100.0
    shorter = effective_halflife(200.0, 0.0, steps=100, batch=4)
    assert shorter == pytest.approx(400 * math.log(2) / 5) and 0.5 ** (400 / shorter) == pytest.approx(math.exp(-5))
    assert effective_halflife(5e5, 0.05, steps=100, batch=4) == 5e5, "a ramp forgets the start at once"
    assert effective_halflife(5e5, 0.9, steps=2, batch=4) < 10


def test_an_average_tells_how_much_of_it_is_its_start():
    """As measured on an average of a parameter that is 1 at first and 0 afterwards."""
    for asked in ({"decay": 0.9}, {"halflife_images": 30.0}, {"halflife_images": 30.0, "rampup": 0.5}):
        ema = Ema("a", {"p": torch.ones(1, dtype=torch.float64)}, **asked)
        for step in range(1, 8):
            ema.update({"p": nn.Parameter(torch.zeros(1, dtype=torch.float64))}, 4 * step, 4)
        assert ema.start_share(7, 4) == pytest.approx(float(ema.average["p"]), rel=1e-9)


@pytest.mark.parametrize("kind", ["decay", "half-life"])
def test_the_average_of_a_short_run_has_forgotten_its_start(tmp_path, capsys, kind):
    """0.999^20 = 98 %: samples were noise at the end of the run.

    The average keeps its name, and the run says what it does.
    """
    asked = {"ema_decay": [0.999]} if kind == "decay" else {"ema_decay": [], "ema_halflife_images": [1e5]}
    result = fit(tiny_jit(), tmp_path, settings(**asked))
    (ema,) = result.emas
    used = 0.75 if kind == "decay" else 160 * math.log(2) / 5
    assert (ema.decay, ema.halflife_images) == ((used, None) if kind == "decay" else (None, pytest.approx(used)))
    assert ema.name == ("0.999" if kind == "decay" else "100000img") and ema.start_share(20, 8) < 0.01
    told = capsys.readouterr().err
    assert (
        told.count(
            "is too long an average for a run of 20 steps: samples would show mostly initial noise. "
            f"The run uses {used:.6g} instead."
        )
        == 1
    )
    assert decays_by_name(result.settings) == {ema.name: ema.decay}
    fit(tiny_jit(), tmp_path, settings(**asked))
    assert "too long an average" not in capsys.readouterr().err, (
        "it is said at the start of the run, and not when it goes on"
    )


def test_previews_show_raw_weights_while_the_average_is_its_beginning(tmp_path, capsys):
    config = settings(images=240, ema_decay=[0.9])  # 0.9^30 = 4 % at the end, 0.9^21 = 11 %, 0.9^22 = 9.8 %
    shown = {}

    def preview(state):
        with state.preview_weights("0.9") as method:
            weight = method.network.final.linear.weight.detach().clone()
        raw, average = state.method.network.final.linear.weight, state.emas[0].average["network.final.linear.weight"]
        shown[state.step] = (
            "raw" if torch.equal(weight, raw) else "average" if torch.equal(weight, average) else "neither"
        )

    plan = TrainingPlan(toy_images().labels, config.batch, 3, balanced=True)
    batches = partial(batches_until, toy_images(), plan, config, 0, 1, None)
    train(tiny_jit(), config, batches, tmp_path, 3, "toy", make_accelerator(config), [(8, preview)])
    assert shown == {step: "raw" if step <= 21 else "average" for step in range(1, 31)}
    assert (
        capsys.readouterr().err.count(
            "after 8 images the average 0.9 still consists of initial weights to 90%. Until that is 10%, previews show "
            "the raw weights"
        )
        == 1
    )


def test_runs_of_one_process_may_have_different_precisions(tmp_path):
    """As in a sweep `train.precision=bf16,fp32`: accelerate refused the second one."""
    first = fit(tiny_jit(), tmp_path / "first", settings(images=16))
    mixed = fit(tiny_jit(), tmp_path / "mixed", settings(images=16, precision="bf16"))
    again = fit(tiny_jit(), tmp_path / "again", settings(images=16))
    assert_equal_states(state_of(first), state_of(again))
    assert not torch.equal(mixed.method.network.final.linear.weight, first.method.network.final.linear.weight)


def test_only_methods_with_several_phases_look_for_unused_parameters():
    """The phases of this network count, and not those that its class may have;
    gradients live in the buckets that are exchanged.
    """
    accelerator = make_accelerator(settings())
    for method, several in ((tiny_jit(), False), (TinyGan(), True)):
        replicate(method, accelerator)
        asked = accelerator.ddp_handler.to_kwargs()
        assert asked == {"gradient_as_bucket_view": True} | ({"find_unused_parameters": True} if several else {})


def test_unknown_optimizer_kind_is_refused():
    with pytest.raises(UserError, match=r"\['sgd'\] are not known"):
        build_optimizers([ParamGroup([nn.Parameter(torch.zeros(1))], kind="sgd")], settings())


def test_metrics_lines_after_the_checkpoint_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [f'{{"step": {step}, "images": {8 * step}}}\n' for step in (1, 2, 3)]
    file.write_text("".join(rows) + '{"ste')
    truncate_rows(file, 2)
    assert file.read_text() == "".join(rows[:2])
