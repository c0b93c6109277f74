"""Runs that end early: full disks and memory, interrupts, refusals, and starts that meet other starts."""

import contextlib
import errno
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluated_run import image_folder, run_folder
from safetensors import SafetensorError

from pixlat.common import progress
from pixlat.common.config.resolve import resolve
from pixlat.common.errors import UserError
from pixlat.common.progress import progress_bar, say_last
from pixlat.launch.job import execute as jobs
from pixlat.launch.job.failures import explain
from pixlat.launch.job.folder import JOBS, LOCK, RESULT, locked, removed_if_refused
from pixlat.launch.run import configurations, main
from pixlat.methods import get_spec


def runs(out: Path, count: int) -> list:
    seeds = ",".join(str(seed) for seed in range(count))
    return configurations(
        ["method=jit", "data=synthetic", "data.image_size=8", "model.patch=4", f"out={out}", f"seed={seeds}"]
    )


def impossible_allocation() -> RuntimeError:
    """What torch really raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    return caught.value


FULL = OSError(errno.ENOSPC, "No space left on device", "/runs/x/previews/a.png")


@pytest.mark.parametrize(
    ("error", "what", "step"),
    [
        (FULL, "the disk is full ([Errno 28] No space left on device: '/runs/x/previews/a.png')", "Make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up", "Make room"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full",
            "Make room",
        ),
        (MemoryError(), "there is not enough memory (MemoryError)", "train.recompute_blocks=true"),
        (impossible_allocation(), "there is not enough memory", "train.recompute_blocks=true"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "there is not enough memory (CUDA out of memory",
            "eval.batch",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "there is not enough memory", "eval.batch"),
    ],
)
def test_a_full_machine_is_told_with_what_is_kept_and_the_next_step(tmp_path, error, what, step):
    sentence = explain(error, tmp_path)
    assert (
        sentence.startswith(f"{tmp_path}: {what}")
        and "No checkpoint had been written yet." in sentence
        and step in sentence
    )
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000004/manifest.json").touch()
    (tmp_path / "checkpoints/step-00000008").mkdir()  # was being written
    assert f"The newest checkpoint is {tmp_path / 'checkpoints/step-00000004'}." in explain(error, tmp_path)


@pytest.mark.parametrize(
    "bug",
    [
        RuntimeError("shapes do not match"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        KeyError("x"),
        SafetensorError("bad header"),
    ],
)
def test_a_fault_of_the_code_keeps_its_traceback(tmp_path, monkeypatch, bug):
    assert explain(bug, tmp_path) is None
    monkeypatch.setattr(jobs, "run_one", lambda run: raise_(bug))
    with pytest.raises(type(bug)):
        jobs.run_all(runs(tmp_path, 2))


def raise_(error: BaseException) -> None:
    raise error


def test_a_sweep_goes_on_after_a_full_disk_and_without_memory(tmp_path, monkeypatch, capsys):
    outcomes = iter([FULL, impossible_allocation(), MemoryError(), None])
    begun = []

    def run_one(run):
        begun.append(run.seed)
        if error := next(outcomes):
            raise error
        return "done"

    monkeypatch.setattr(jobs, "run_one", run_one)
    assert jobs.run_all(runs(tmp_path, 4)) == 1
    printed = capsys.readouterr()
    assert begun == [0, 1, 2, 3] and "done" in printed.out and printed.err.count("\nerror: ") == 3
    assert "Traceback" not in printed.err and printed.err.count(str(tmp_path / "jit-synthetic")) == 7


def test_one_of_several_processes_ends_instead_since_the_others_wait_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "run_one", lambda run: raise_(MemoryError()) if run.seed == 0 else pytest.fail("went on"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert jobs.run_all(runs(tmp_path, 2)) == 1


# -- what is printed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_has_a_line_of_its_own_below_an_open_bar(monkeypatch, terminal, keep):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr("sys.stderr", stream)
    bar = progress_bar("evaluating", 100, keep=keep)
    bar.update(30)
    say_last("error: boom")
    text = stream.getvalue()
    assert (
        "evaluating" in text
        and text.endswith("error: boom\n")
        and text.replace("\r", "\n").splitlines()[-1] == "error: boom"
    )
    if not terminal:
        assert text.splitlines()[-1] == "error: boom"  # in a file, where a carriage return takes nothing back
    bar.update(1)
    assert stream.getvalue() == text


def test_an_interrupt_while_the_command_starts_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "method=jit"])
    monkeypatch.setattr("pixlat.launch.run.within_budget", lambda run: raise_(KeyboardInterrupt()))
    assert main() == 130
    assert capsys.readouterr().err == "interrupted. Finished files are kept.\n"


# -- refusals ----------------------------------------------------------------------------------------------------------


def a_run(out: Path, data: Path):
    return resolve(
        get_spec("jit"),
        {
            "data.name": "folder",
            "data.path": str(data),
            "data.image_size": "8",
            "model.patch": "4",
            "out": str(out),
            "name": "run",
        },
    )


@pytest.fixture
def data(tmp_path) -> Path:
    return image_folder(tmp_path / "images")


def test_a_run_refused_before_its_first_step_leaves_no_folder(tmp_path, data, monkeypatch):
    monkeypatch.setattr(jobs, "train_job", lambda job: raise_(UserError("0.png is damaged")))
    with pytest.raises(UserError, match="is damaged"):
        jobs.run_one(a_run(tmp_path, data))
    assert not (tmp_path / "run").exists()


def test_what_held_anything_before_or_since_is_kept(tmp_path, data, monkeypatch):
    def train(job):
        (job.folder / "metrics.jsonl").touch()
        raise UserError("diverged")

    monkeypatch.setattr(jobs, "train_job", train)
    with pytest.raises(UserError, match="diverged"):
        jobs.run_one(a_run(tmp_path, data))
    assert (tmp_path / "run/config.yaml").exists()
    (tmp_path / "run/metrics.jsonl").unlink()
    monkeypatch.setattr(jobs, "train_job", lambda job: raise_(UserError("0.png is damaged")))
    with pytest.raises(UserError, match="is damaged"):
        jobs.run_one(a_run(tmp_path, data))
    assert (tmp_path / "run/config.yaml").exists()  # an earlier start made it
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / JOBS).touch()
    with pytest.raises(KeyError), removed_if_refused(tmp_path / "job", enabled=True):
        raise KeyError
    assert (tmp_path / "job" / JOBS).exists()


def test_a_start_that_waited_for_a_refused_one_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="failed before it trained, and removed it"), contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(
            "pixlat.launch.job.folder.is_locked", lambda lock: bool((tmp_path / "run" / LOCK).unlink(missing_ok=True))
        )
        stack.enter_context(locked(tmp_path / "run"))


# -- other starts ------------------------------------------------------------------------------------------------------


def test_a_start_that_waited_for_the_lock_does_not_evaluate_again(tmp_path, data, monkeypatch):
    run = run_folder(tmp_path / "run", data, record=False)
    run_folder(tmp_path / "other", data)
    run.out, run.name = str(tmp_path), "run"

    @contextlib.contextmanager
    def waited(folder, enabled=True):
        os.link(tmp_path / "other" / RESULT, folder / RESULT)  # meanwhile the other start finished
        yield

    monkeypatch.setattr(jobs, "locked", waited)
    monkeypatch.setattr(jobs, "train_job", lambda job: pytest.fail("began again"))
    before = (tmp_path / "other" / RESULT).read_bytes()
    assert "this run" in jobs.run_one(run) and (tmp_path / "run" / RESULT).read_bytes() == before


@pytest.mark.parametrize("sees", [True, False])
def test_the_main_process_decides_for_all_whether_a_run_is_finished(tmp_path, data, monkeypatch, sees):
    """On a network file system another machine may see the record later, or still see one that was removed."""
    run = run_folder(tmp_path / "run", data, record=sees)
    run.out, run.name = str(tmp_path), "run"
    here = SimpleNamespace(
        is_main_process=False,
        num_processes=1,
        process_index=1,
        device=torch.device("cpu"),
        main_process_first=contextlib.nullcontext,
    )
    monkeypatch.setattr(jobs, "make_accelerator", lambda *_: here)
    # the main process sees the opposite
    monkeypatch.setattr("pixlat.launch.job.job.broadcast_object_list", lambda answers: [not answers[0]])
    monkeypatch.setattr(jobs, "train_job", lambda job: raise_(Trained()))
    if sees:
        with pytest.raises(Trained):
            jobs.run_one(run)
    else:
        assert jobs.run_one(run) == ""  # and the main process alone prints the leaderboard


class Trained(Exception):
    """Training began."""
