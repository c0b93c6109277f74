"""From runs to jobs, without a scheduler: what would be submitted, what a process of a job does at a signal,
and how runs are reported.
"""

import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from records import record

from pixlat.common.config.explain import describe
from pixlat.common.config.identity import identity, run_folder
from pixlat.common.config.resolve import resolve
from pixlat.common.config.schema import ClusterConfig
from pixlat.common.errors import UserError
from pixlat.common.files import append_row
from pixlat.common.training.loop import Stopped
from pixlat.common.training.signals import StopRequest
from pixlat.evaluation.records.record import write_record
from pixlat.launch import status
from pixlat.launch.cluster import local as gpus_here
from pixlat.launch.cluster import local_job as local
from pixlat.launch.cluster import request, slurm, submit, worker
from pixlat.launch.cluster.planned import Planned, as_overrides
from pixlat.launch.cluster.request import batch_options, sbatch_text
from pixlat.launch.cluster.slurm import JobState
from pixlat.launch.cluster.snapshot import code_files, take_snapshot
from pixlat.launch.cluster.submit import check, groups, plan
from pixlat.launch.cluster.worker import Notice, Worker, export_processes, meeting_port
from pixlat.launch.job.folder import FAILURE, JOBS, LOCK, locked, open_folder
from pixlat.launch.run import configurations
from pixlat.methods import get_spec, registered

ROOT = Path(__file__).resolve().parent.parent
SLURM = ("cluster=slurm", "cluster.partition=p", "cluster.timeout_min=60", "cluster.gpus_per_node=8")


def one(*arguments: str):
    (run,) = configurations(("method=jit", *arguments))
    return run


def text(*arguments: str) -> str:
    return sbatch_text([Planned(one(*SLURM, *arguments))], Path("/code"))


# -- configuration -----------------------------------------------------------------------------------------------------


def test_where_a_run_works_does_not_change_which_run_it_is():
    assert identity(one()) == identity(one(*SLURM, "cluster.sharding=fsdp2")) and run_folder(one()) == run_folder(
        one(*SLURM)
    )


@pytest.mark.parametrize("missing", ["partition", "timeout_min", "gpus_per_node"])
def test_a_site_s_values_are_required_and_never_somebody_s(missing):
    run = one(*[argument for argument in SLURM if missing not in argument])
    with pytest.raises(UserError, match=rf"cluster=slurm needs cluster\.{missing}: .*clusters/README.md"):
        check(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cluster=local", "cluster.nodes=2"), "cluster.nodes=2"),
        (("cluster=slurmm",), "Did you mean 'slurm'"),
        (
            ("cluster=example",),
            "partition has no value yet. Write yours into a copy of the file and give cluster=path/to/example.yaml",
        ),
        (("cluster=slurm,here",), "cannot be swept"),
        (("cluster=local", "cluster.tasks_per_node=3"), "multiple of train.micro_batch=5 times 3 processes"),
        (("cluster.sharding=zero",), "ddp, fsdp2"),
        (("cluster.nodes=0",), "cluster.nodes=0"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(arguments, message):
    with pytest.raises(UserError, match=message):
        for run in configurations(("method=jit", "data.name=synthetic", *arguments)):
            check(run)


def test_a_site_s_file_is_under_the_command_line(tmp_path):
    site = tmp_path / "mine.yaml"
    site.write_text("partition: gpu\naccount: ???\ngpus_per_node: 4\nsetup: ['module load a, b']\n")
    run = one(f"cluster={site}", "cluster.account=me", "cluster.gpus_per_node=2").cluster
    assert (run.name, run.partition, run.account, run.gpus_per_node, run.setup) == (
        "slurm",
        "gpu",
        "me",
        2,
        ["module load a, b"],
    )
    site.write_text("partitionn: gpu\n")
    with pytest.raises(UserError, match=r"mine\.yaml: unknown key 'partitionn'\. Did you mean 'partition'"):
        one(f"cluster={site}")


def test_every_key_has_its_help():
    rows = list(describe(ClusterConfig, "cluster"))
    assert len(rows) == len(dataclasses.fields(ClusterConfig)) and all(meaning for *_, meaning in rows)


@pytest.mark.parametrize("name", sorted(registered()))
def test_a_run_survives_the_way_into_the_job(name):
    run = resolve(get_spec(name), {"seed": "3", "data.path": "/a b=c,[d] é", "cluster.setup": '["a, b", "c=\\"d\\""]'})
    assert resolve(get_spec(name), as_overrides(run)) == run


# -- what is submitted -------------------------------------------------------------------------------------------------


def test_only_what_was_asked_for_is_passed_on():
    plain = text()
    for line in (
        "--partition=p",
        "--time=60",
        "--gpus-per-node=8",
        "--ntasks-per-node=8",
        "--signal=USR2@120",
        "--requeue",
        "--nodes=1",
    ):
        assert f"#SBATCH {line}\n" in plain
    for option in (
        "account",
        "qos",
        "constraint",
        "exclude",
        "exclusive",
        "mail",
        "mem",
        "comment",
        "dependency",
        "wckey",
        "cpus-per-task",
        "array",
    ):
        assert f"#SBATCH --{option}" not in plain, option


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("cluster.account=me", "#SBATCH --account=me"),
        ("cluster.qos=high", "#SBATCH --qos=high"),
        ("cluster.constraint=a100", "#SBATCH --constraint=a100"),
        ("cluster.nodelist=n1", "#SBATCH --nodelist=n1"),
        ("cluster.exclude=n2", "#SBATCH --exclude=n2"),
        ("cluster.exclusive=true", "#SBATCH --exclusive"),
        ("cluster.reservation=r", "#SBATCH --reservation=r"),
        ("cluster.dependency=afterok:7", "#SBATCH --dependency=afterok:7"),
        ("cluster.comment='for the paper'", "#SBATCH --comment='for the paper'"),
        ("cluster.mail_user=a@b.c", "#SBATCH --mail-user=a@b.c"),
        ("cluster.mail_type=END", "#SBATCH --mail-type=END"),
        ("cluster.mem_gb=0", "#SBATCH --mem=0"),
        ("cluster.mem_gb=1.5", "#SBATCH --mem=1536M"),
        ("cluster.cpus_per_task=6", "#SBATCH --cpus-per-task=6"),
        ("cluster.cpus_per_task=6", "--kill-on-bad-exit=1 --cpus-per-task=6 "),  # srun does not inherit it everywhere
        ("cluster.cpus_per_task=6", "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-6}"),
        ("cluster.srun_args=[--mpi=pmix]", "%t_log.out --mpi=pmix sh -c"),
        ("cluster.nodes=4", "#SBATCH --nodes=4"),
        ("cluster.tasks_per_node=2", "#SBATCH --ntasks-per-node=2"),
        ("cluster.signal_delay_s=300", "#SBATCH --signal=USR2@300"),
        ("cluster.setup=[module load cuda]", "\nmodule load cuda\n"),
        (
            "cluster.python='singularity exec i.sif python'",
            """sh -c 'trap "" USR2; exec "$0" "$@"' singularity exec i.sif python -u""",
        ),
        ("cluster.sbatch=[gres=gpu:a100:8]", "#SBATCH --gres=gpu:a100:8"),
        ("cluster.gpu_type=a100", "#SBATCH --gpus-per-node=a100:8\n"),
        ("cluster.sbatch=[--hold]", "#SBATCH --hold\n"),
    ],
)
def test_each_option_reaches_the_batch_file(argument, line):
    assert line in text(argument)


@pytest.mark.parametrize(
    "option", ["gres=gpu:a100:8", "--gres=tmpfs:20G,gpu:8", "gpus-per-node=a100:8", "gpus=16", "gpus-per-task=1"]
)
def test_a_request_for_gpus_among_the_other_options_stands_alone_and_a_process_is_started_for_each(option):
    run = one(*SLURM, f'cluster.sbatch=["{option}"]')
    check(run)
    lines = [line for line in sbatch_text([Planned(run)], Path("/code")).splitlines() if line.startswith("#SBATCH --g")]
    assert len(lines) == 1 and lines[0].startswith(f"#SBATCH --{option.removeprefix('--')}")
    assert (
        request.gpus_of("gres=gpu:a100:8(S:0-1)") == request.gpus_of("gpus-per-node=8") == 8
        and request.gpus_of("gpus=16") is None
    )
    assert "#SBATCH --ntasks-per-node=8\n" in text(f'cluster.sbatch=["{option}"]')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("cluster.gpus_per_node=0", "cluster.sbatch=[gres=gpu:a100:8]"),
            "gpus_per_node=0 computes on CPUs, but cluster.sbatch asks for gres=gpu:a100:8",
        ),
        (
            ("cluster.gpus_per_node=4", "cluster.sbatch=[gres=gpu:a100:8]"),
            "asks for 8 GPUs a machine with gres=gpu:a100:8, but cluster.gpus_per_node=4",
        ),
        (("cluster.gpus_per_node=4", "cluster.sbatch=[gres=gpu]"), "asks for 1 GPUs"),
        (("cluster.gpus_per_node=0", "cluster.gpu_type=a100"), "gpu_type=a100 .*gpus_per_node=0 asks for no GPU"),
        (
            ("cluster.gpus_per_node=8", "cluster.gpu_type=a100", "cluster.sbatch=[gres=gpu:8]"),
            "gpu_type=a100 .*asks with gres=gpu:8 as well",
        ),
    ],
)
def test_gpus_and_processes_that_do_not_match_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        check(one(*SLURM[:3], *arguments))


# -- several processes of this machine ---------------------------------------------------------------------------------


def local_job(folder: Path, command: str, tasks: int = 2, seconds: int = 60) -> subprocess.Popen:
    """Runs the parent of a local job, whose processes are the shell command."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        local.RUN_FOLDER: str(folder),
        "SUBMITIT_STDERR_TO_STDOUT": "1",
        "SUBMITIT_LOCAL_WITH_SHELL": "",
    }
    environment |= {"SUBMITIT_LOCAL_NTASKS": str(tasks), "SUBMITIT_LOCAL_COMMAND": shlex.join(["sh", "-c", command])}
    environment |= {"SUBMITIT_LOCAL_TIMEOUT_S": str(seconds), "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "59"}
    return subprocess.Popen(
        [sys.executable, "-m", "pixlat.launch.cluster.local_job", str(folder / "job")], env=environment
    )


@pytest.mark.parametrize(
    ("dies", "reason"),
    [
        (
            "kill -KILL $$",
            (
                "SIGKILL, which the system sends when memory runs out, ended process 1 of 2, "
                "and the other processes were ended."
            ),
        ),
        ("kill -TERM $$", "SIGTERM ended process 1 of 2, and the other processes were ended."),
        (
            "exit 3",
            "The exit code 3, whose reason is in the log, ended process 1 of 2, and the other processes were ended.",
        ),
    ],
)
def test_a_process_that_dies_at_the_start_ends_its_peers_and_is_named(tmp_path, dies, reason):
    """The other one would wait for ten minutes."""
    command = f'test "$SUBMITIT_LOCAL_GLOBALID" = 1 && {dies}; echo $$ > {tmp_path}/waits; exec sleep 600'
    assert local_job(tmp_path, command).wait(timeout=30) == 0
    facts = json.loads((tmp_path / FAILURE).read_text())
    assert (
        (facts["reason"], facts["process"]) == (reason, 1)
        and facts["log"].endswith("_1_log.out")
        and Path(facts["log"]).exists()
    )
    if (tmp_path / "waits").exists():  # else it was ended before it could say so
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "waits").read_text()), 0)
    made = open_folder(one(f"out={tmp_path}", "name=run"))
    shutil.copy(tmp_path / FAILURE, made / FAILURE)
    assert status.status(made, {}).state == "failed" and status.status(made, {}).reason.startswith(reason)


def test_the_reason_that_a_process_gives_itself_stays(tmp_path):
    own = json.dumps({"reason": "data.path=/x is gone.", "log": "/l"})
    assert local_job(tmp_path, f"echo '{own}' > {tmp_path / FAILURE}; exit 1").wait(timeout=30) == 0
    assert failure(SimpleNamespace(folder=tmp_path)) == "data.path=/x is gone."


def test_after_a_kill_the_lost_connection_of_the_others_is_not_the_reason(tmp_path):
    (tmp_path / FAILURE).write_text(json.dumps({"reason": "RuntimeError: Connection closed by peer", "log": "/l"}))
    assert (
        local_job(tmp_path, 'test "$SUBMITIT_LOCAL_GLOBALID" = 1 && kill -KILL $$; exec sleep 600').wait(timeout=30)
        == 0
    )
    assert failure(SimpleNamespace(folder=tmp_path)).startswith("SIGKILL")


def test_processes_that_end_well_or_are_queued_again_end_nobody(tmp_path):
    """The first process asks to be started again (144) while the other one still works;
    both end well the second time.
    """
    command = f"""
        mkdir -p {tmp_path}/starts; touch {tmp_path}/starts/$SUBMITIT_LOCAL_GLOBALID-$$
        if [ "$(ls {tmp_path}/starts | grep -c "^$SUBMITIT_LOCAL_GLOBALID-")" = 1 ]; then
            if [ "$SUBMITIT_LOCAL_GLOBALID" = 0 ]; then exit 144; else sleep 0.3; touch {tmp_path}/saved; fi
        fi"""
    assert local_job(tmp_path, command).wait(timeout=30) == 0
    assert (
        len(list((tmp_path / "starts").iterdir())) == 4
        and (tmp_path / "saved").exists()
        and not (tmp_path / FAILURE).exists()
    )


def test_processes_are_warned_before_the_time_limit(tmp_path):
    command = f"trap 'touch {tmp_path}/warned; exit 0' USR2; while true; do sleep 0.1; done"
    assert local_job(tmp_path, command, tasks=1).wait(timeout=30) == 0  # 59 seconds before the end of 60
    assert (tmp_path / "warned").exists() and not (tmp_path / FAILURE).exists()


@pytest.mark.parametrize(
    ("codes", "found"),
    [
        ([None, 0], None), ([None, -9], (1, -9)), ([1, None], (0, 1)), ([1, -9], (1, -9)), ([143, None], None),
        ([130, 143], None), ([144, -6], None),
        ([None, 137], (1, 137)), ([0, 0], None),
    ],
)  # fmt: skip
def test_what_counts_as_a_failure_of_a_process(codes, found):
    assert local.first_failure(codes) == found


def test_a_local_job_takes_the_gpus_that_its_user_has_chosen(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(
        local.subprocess,
        "Popen",
        lambda command, shell, env: started.append((command, env)) or SimpleNamespace(pid=7, poll=lambda: 0),
    )
    monkeypatch.setattr(gpus_here, "outcome", lambda each, job: 0)
    monkeypatch.setattr(gpus_here.torch.cuda, "device_count", lambda: 2)
    arguments = (
        "data.name=synthetic",
        "data.image_size=8",
        f"out={tmp_path}",
        "cluster=local",
        "cluster.snapshot=false",
        "train.batch=8",
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5a, 3")
    for gpus, given in (
        (["cluster.gpus_per_node=2"], "GPU-5a,3"),
        (["cluster.gpus_per_node=1"], "GPU-5a"),
        (["cluster.tasks_per_node=2"], ""),
    ):
        assert submit.submit_all([one(*arguments, *gpus, f"name=run-{len(started)}")]) == 0
        assert started[-1][1]["CUDA_VISIBLE_DEVICES"] == given
    assert "export PYTHONPATH=" in started[-1][0] and "-m pixlat.launch.cluster.local_job" in started[-1][0]
    # of the third run alone
    assert capsys.readouterr().err == "computing on CPUs, 2 GPUs are here: set cluster.gpus_per_node=2\n"
    with pytest.raises(UserError, match=r"gpus_per_node=4, but CUDA_VISIBLE_DEVICES='GPU-5a, 3' shows 2"):
        submit.submit_all([one(*arguments, "cluster.gpus_per_node=4", "name=more")])
    assert (
        submit.submit_all([one(*arguments, "cluster.gpus_per_node=0", "name=cpus")]) == 0
        and not capsys.readouterr().err
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus_here.visible_gpus(3) == ["0", "1", "2"]


def test_the_job_takes_its_code_from_the_copy_whatever_the_working_directory_holds():
    assert "export PYTHONPATH=/code${PYTHONPATH:+:$PYTHONPATH}\nexport PYTHONSAFEPATH=1" in text()


def test_a_sweep_is_one_array_with_a_limit():
    runs = configurations(("method=jit", "seed=0,1,2", *SLURM, "cluster.array_parallelism=2"))
    (group,) = groups(plan(runs))
    assert (
        len(group) == 3
        and "#SBATCH --array=0-2%2" in sbatch_text(group, Path("/code"))
        and "_%A_%a" not in sbatch_text(group, Path("/code"))
    )


def test_earlier_stages_come_once_and_their_job_is_a_dependency(monkeypatch):
    """Runs with seeds 0 and 1 wait for the run with train.lr=1 and their seed."""

    def stages(run):
        return (
            {}
            if run.train.lr == 1
            else {
                "codec": dataclasses.replace(run, train=dataclasses.replace(run.train, lr=1.0), cluster=ClusterConfig())
            }
        )

    monkeypatch.setattr(submit, "stage_runs", stages)
    runs = configurations(("method=jit", "seed=0,1", "train.lr=0.1,0.2", *SLURM))
    first, second, third = groups(plan(runs))
    assert [each.run.seed for each in first] == [0, 1] and {each.run.cluster.name for each in first} == {"slurm"}
    assert [(each.run.seed, each.after) for each in second] == [(0, (first[0].folder,))] * 2
    assert [(each.run.seed, each.after) for each in third] == [(1, (first[1].folder,))] * 2
    assert batch_options(second, Path("/code"), ["12_0"])["dependency"] == "afterok:12_0"
    assert "--kill-on-invalid-dep=yes" in sbatch_text(second, Path("/code"), ["12_0"])


def test_a_dry_run_prints_the_batch_file_and_writes_nothing(tmp_path, capsys):
    arguments = ("data.name=synthetic", "data.image_size=16", f"out={tmp_path / 'runs'}", "dry_run=true")
    assert submit.submit_all([one(*SLURM, *arguments)]) == 0
    printed = capsys.readouterr().out
    assert "each of 8 processes" in printed and "#SBATCH --partition=p" in printed and not list(tmp_path.iterdir())


def test_a_submission_from_within_a_job_hides_that_job_and_not_the_cluster(monkeypatch):
    """The scheduler would hand the outer request down; without SLURM_CONF it would not be found (submitit's
    clean_env hides it too).
    """
    monkeypatch.setenv("SLURM_CONF", "/etc/here")
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "8")
    with request.clean_environment():
        assert os.environ.get("SLURM_CONF") == "/etc/here" and "SLURM_GPUS_PER_NODE" not in os.environ
    assert os.environ["SLURM_GPUS_PER_NODE"] == "8"


# -- the copy of the code ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git checkout with a committed, a changed, a new and an ignored file."""
    root = tmp_path / "checkout"
    for folder in ("launch", "pixlat"):
        (root / folder).mkdir(parents=True)
    for name, content in {
        "pixlat/__init__.py": "",
        "launch/a.py": "A = 1",
        "launch/b.py": "B = 1",
        ".gitignore": "*.log",
        "elsewhere.py": "",
    }.items():
        (root / name).write_text(content)
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run(git + command, check=True)
    (root / "launch/b.py").write_text("B = 2")
    (root / "launch/new.py").write_text("")
    (root / "launch/some.log").write_text("")
    for module in ("pixlat.launch.cluster.snapshot", "pixlat.common.origin"):
        monkeypatch.setattr(f"{module}.ROOT", root)
    return root


def test_the_copy_has_changes_and_new_files_and_knows_its_commit(checkout, tmp_path):
    copy = take_snapshot(tmp_path)
    assert sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*.py")) == [
        "pixlat/__init__.py", "pixlat/launch/a.py", "pixlat/launch/b.py", "pixlat/launch/new.py",
    ]  # fmt: skip
    assert (copy / "pixlat/launch/b.py").read_text() == "B = 2"
    note = json.loads((copy / "pixlat/snapshot.json").read_text())
    assert len(note["git_sha"]) == 40 and note["dirty"] and "+B = 2" in note["diff"]
    assert take_snapshot(tmp_path) == copy
    (checkout / "launch/a.py").write_text("A = 2")
    assert take_snapshot(tmp_path) != copy and (copy / "pixlat/launch/a.py").read_text() == "A = 1"


def test_without_git_everything_but_caches_is_copied(checkout):
    shutil.rmtree(checkout / ".git")
    (checkout / "launch/__pycache__").mkdir()
    (checkout / "launch/__pycache__/a.pyc").write_text("")
    assert {file.name for file in code_files(checkout)} == {"__init__.py", "a.py", "b.py", "new.py", "some.log"}


def test_the_copy_of_an_installed_package_is_laid_out_alike(checkout, tmp_path, monkeypatch):
    """In a wheel the folders lie in pixlat/, with no git that knows them."""
    installed = tmp_path / "site-packages" / "pixlat"
    shutil.copytree(checkout / "launch", installed / "launch")
    shutil.copy(checkout / "pixlat/__init__.py", installed)
    for module in ("pixlat.launch.cluster.snapshot", "pixlat.common.origin"):
        monkeypatch.setattr(f"{module}.ROOT", installed)
    monkeypatch.setattr("pixlat.common.origin.IN_CHECKOUT", False)
    copy = take_snapshot(tmp_path)
    assert {path.relative_to(copy).as_posix() for path in copy.rglob("*.py")} == {
        "pixlat/__init__.py", "pixlat/launch/a.py", "pixlat/launch/b.py", "pixlat/launch/new.py",
    }  # fmt: skip
    assert json.loads((copy / "pixlat/snapshot.json").read_text())["git_sha"] == "unknown"


def test_a_job_runs_the_copy_and_tells_its_origin(tmp_path):
    copy = take_snapshot(tmp_path)
    code = "import pixlat.launch.job.provenance as p; print(p.__file__); print(p.git_state()['git_sha'])"
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert printed == [
        str(copy / "pixlat/launch/job/provenance.py"),
        json.loads((copy / "pixlat/snapshot.json").read_text())["git_sha"],
    ]


# -- a process of a job ------------------------------------------------------------------------------------------------


class Left(BaseException):
    """Stands in for the end of the process."""


class Environment(SimpleNamespace):
    """A process of a Slurm job, as submitit describes it."""

    def __init__(self, folder: Path, rank: int = 0, **changes) -> None:
        paths = SimpleNamespace(result_pickle=folder / "result.pkl", stdout=folder / "log.out")
        facts = {
            "cluster": "slurm",
            "job_id": "7_1",
            "raw_job_id": "8",
            "global_rank": rank,
            "local_rank": rank % 2,
            "num_tasks": 4,
            "num_nodes": 2,
        }
        super().__init__(**facts | {"hostnames": ["n1", "n2"], "paths": paths} | changes)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Signal handlers as they were; `requeued` counts what submitit's handler, which ends the process, was asked."""
    requeued = []

    def submitit(number, frame):
        requeued.append(number)
        sys.exit(-1)

    def leave(code):
        raise Left(code)

    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, submitit)
    monkeypatch.setattr(worker, "leave", leave)
    monkeypatch.setattr(worker, "job_state", lambda job_id: JobState("RUNNING", "n[1-2]", "1:00", "None"))
    yield SimpleNamespace(requeued=requeued, folder=tmp_path, monkeypatch=monkeypatch)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_submitted_module_is_light():
    """submitit loads it before it listens to signals;
    a second of torch would be a second in which preemption ends the job for good.
    """
    code = (
        "import sys, pixlat.launch.cluster.worker; sys.exit(any(name in sys.modules for name in ('torch', "
        "'numpy', 'accelerate', 'submitit')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_signal_before_submitit_listens_is_ignored():
    command = request.python_command(ClusterConfig())
    code = (
        "from signal import *; raise_signal(SIGUSR2); signal(SIGUSR2, lambda *_: print('heard')); raise_signal(SIGUSR2)"
    )
    result = subprocess.run(f'{command} -c "{code}"', shell=True, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "heard\n"), result.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_outside_the_training_the_first_process_requeues_at_once(job, number):
    with pytest.raises(Left, match="0"), Notice(Environment(job.folder)).heeded():
        os.kill(os.getpid(), number)
    assert job.requeued == [signal.SIGUSR2]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_the_other_processes_work_on_until_the_first_has_left_and_then_leave_silently(job, number):
    def work(self, environment):
        os.kill(os.getpid(), number)
        raise ConnectionError("Connection closed by peer")

    job.monkeypatch.setattr(Worker, "work", work)
    with fake_submitit(job, Environment(job.folder, rank=1)), pytest.raises(Left, match="0"):
        Worker({}, job.folder)()
    assert not job.requeued and not (job.folder / FAILURE).exists()


def test_after_the_training_has_stopped_and_saved_the_first_process_requeues(job):
    stopped = Stopped("SIGUSR2", Path("step-1"))
    with pytest.raises(Left, match="0"), Notice(Environment(job.folder)).heeded():
        raise stopped
    assert job.requeued == [signal.SIGUSR2]
    with pytest.raises(Left, match="0"), Notice(Environment(job.folder, rank=1)).heeded():
        raise stopped
    assert job.requeued == [signal.SIGUSR2]


@pytest.mark.parametrize(
    ("state", "requeued"), [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False), (None, False)]
)
def test_a_cancelled_job_is_not_queued_again(job, state, requeued):
    """`scontrol requeue` would bring it back; a SIGTERM alone does not tell cancellation from preemption,
    the controller does.
    """
    job.monkeypatch.setattr(worker, "job_state", lambda job_id: state and JobState(state, "", "", ""))
    with pytest.raises(Left, match="0" if requeued else "143"), Notice(Environment(job.folder)).heeded():
        os.kill(os.getpid(), signal.SIGTERM)
    assert bool(job.requeued) == requeued


def test_a_job_that_cannot_be_requeued_says_so_in_one_line(job):
    def broken(number, frame):
        raise FileNotFoundError(2, "No such file or directory", "scontrol")

    signal.signal(signal.SIGUSR2, broken)
    job.monkeypatch.setattr(Worker, "work", lambda self, environment: os.kill(os.getpid(), signal.SIGUSR2))
    with fake_submitit(job, Environment(job.folder)), pytest.raises(Left, match="1"):
        Worker({}, job.folder)()
    assert "scontrol" in failure(job) and "run the same command again" in failure(job)


def test_requeueing_ignores_the_sigterm_that_it_causes(job):
    """Otherwise it can end the very `scontrol requeue` that asked for it; ignored signals are inherited."""
    assert Worker({}, job.folder).checkpoint().function == Worker({}, job.folder)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_too_many_time_outs_are_named(job):
    from submitit.core.utils import UncompletedJobError

    def at_the_limit(number, frame):
        raise UncompletedJobError("Job not requeued because: timed-out too many times.")

    signal.signal(signal.SIGUSR2, at_the_limit)
    job.monkeypatch.setattr(Worker, "work", lambda self, environment: os.kill(os.getpid(), signal.SIGUSR2))
    with fake_submitit(job, Environment(job.folder)), pytest.raises(Left, match="1"):
        Worker({"cluster.max_timeouts": "2"}, job.folder)()
    assert "timed-out too many times" in failure(job) and "cluster.max_timeouts=2" in failure(job)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("data.path=/x is gone."), "data.path=/x is gone."),
        (RuntimeError("\nfirst\nsecond"), "RuntimeError: first"),
    ],
)
def test_the_first_failure_is_kept_with_its_place_and_log(job, error, reason):
    def work(self, environment):
        raise error

    job.monkeypatch.setattr(Worker, "work", work)
    job.monkeypatch.setenv("SLURMD_NODENAME", "n9")
    with fake_submitit(job, Environment(job.folder, rank=1)), pytest.raises(Left, match="1"):
        Worker({}, job.folder)()
    facts = json.loads((job.folder / FAILURE).read_text())
    assert (facts["reason"], facts["process"], facts["node"], facts["job"]) == (reason, 1, "n9", "7_1") and facts[
        "log"
    ].endswith("log.out")
    error = ValueError("later")
    with fake_submitit(job, Environment(job.folder, rank=2)), pytest.raises(Left, match="1"):
        Worker({}, job.folder)()
    assert failure(job) == reason


def test_a_full_disk_or_memory_is_told_without_a_traceback(job, capsys):
    for error, what in (
        (OSError(28, "No space left on device"), "the disk is full"),
        (MemoryError(), "there is not enough memory"),
    ):
        job.monkeypatch.setattr(Worker, "work", lambda self, environment, error=error: (_ for _ in ()).throw(error))
        (job.folder / FAILURE).unlink(missing_ok=True)
        with fake_submitit(job, Environment(job.folder)), pytest.raises(Left, match="1"):
            Worker({}, job.folder)()
        assert f"{what} ({str(error) or 'MemoryError'}). No checkpoint had been written yet. " in failure(job)
    assert "Traceback" not in capsys.readouterr().err


def test_an_earlier_start_leaves_neither_a_result_nor_a_failure(job):
    for name in ("result.pkl", FAILURE):
        (job.folder / name).write_text("{}")
    job.monkeypatch.setattr(Worker, "work", lambda self, environment: None)
    with fake_submitit(job, Environment(job.folder)):
        Worker({}, job.folder)()
    assert not (job.folder / "result.pkl").exists() and not (job.folder / FAILURE).exists()


@contextmanager
def fake_submitit(job, environment):
    """submitit's JobEnvironment is the one given."""
    with job.monkeypatch.context() as patch:
        patch.setattr("submitit.JobEnvironment", lambda: environment)
        yield


def failure(job) -> str:
    return json.loads((job.folder / FAILURE).read_text())["reason"]


def test_the_processes_find_each_other_and_an_earlier_start_does_not_disturb(job, monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "to be restored")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    export_processes(Environment(job.folder, rank=3))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,4"  # as the scheduler gave them; LOCAL_RANK chooses among them
    found = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1"}
    assert meeting_port("8", "0") != meeting_port("8", "1") != meeting_port("9", "1")


def test_a_machine_without_its_gpus_is_named(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(UserError, match=r"n5 was to give 2 GPUs \(given: 0,1\).*cluster\.exclude=n5"):
        worker.check_gpus(one(*SLURM[:3], "cluster.gpus_per_node=2"))


def test_a_signal_that_training_did_not_answer_is_passed_on():
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(ConnectionError), StopRequest():
            os.kill(os.getpid(), signal.SIGUSR2)
            raise ConnectionError
        assert heard == [signal.SIGUSR2] * 2
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert request.agreed(1) == "SIGUSR2"
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_requeued_job_waits_for_the_lock_of_its_earlier_start(tmp_path, monkeypatch):
    monkeypatch.setattr("pixlat.launch.job.folder.PATIENCE_S", 0.0)
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is working in"), locked(tmp_path):
            pass
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        monkeypatch.setattr("pixlat.launch.job.folder.time.sleep", lambda seconds: fcntl.flock(lock, fcntl.LOCK_UN))
        with locked(tmp_path):
            pass


# -- how runs are ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run that was submitted and has shown 16,000 of 64,000 images."""
    made = open_folder(one(f"out={tmp_path}", "name=run", "train.images=64000"))
    append_row(made / JOBS, {"job": "7", "log": str(tmp_path / "log.out"), "cluster": "slurm"})
    append_row(made / "metrics.jsonl", {"images": 16000, "images_per_s": 2.0})
    return made


def job_now(state: str, reason: str = "None") -> dict[str, JobState]:
    return {"7": JobState(state, "n1", "1:00", reason)}


def test_a_working_job_shows_progress_and_time_left(folder):
    row = status.status(folder, job_now("RUNNING"))
    assert (row.state, row.progress, row.images_per_s, row.left, row.job) == ("running", "25 %", "2", "6:40:00", "7")
    append_row(folder / "metrics.jsonl", {"images": 64000, "images_per_s": 2.0})
    assert status.status(folder, job_now("RUNNING")).left == "evaluating"


def test_a_waiting_job_shows_why(folder):
    row = status.status(folder, job_now("PENDING", "Dependency"))
    assert (row.state, row.reason) == ("waiting", "Dependency")


def test_a_failed_job_shows_its_reason_and_log(folder, tmp_path):
    (folder / FAILURE).write_text(json.dumps({"reason": "no space left.", "log": "/l"}))
    row = status.status(folder, job_now("FAILED"))
    assert (row.state, row.reason) == ("failed", "no space left. Log: /l")
    assert status.status(folder, job_now("RUNNING")).state == "running"  # queued again


def test_a_job_that_could_say_nothing_shows_the_scheduler_s_word_and_the_log_s(folder, tmp_path):
    (tmp_path / "log.out").write_text("train\nslurmstepd: error: Detected 1 oom-kill event(s)\nsome more\n")
    row = status.status(folder, job_now("OUT_OF_MEMORY"))
    assert row.state == "failed" and row.reason.startswith(
        "OUT_OF_MEMORY: slurmstepd: error: Detected 1 oom-kill event(s) Log: "
    )
    assert status.status(folder, job_now("CANCELLED")).state == "stopped"


def test_without_a_job_the_lock_tells(folder):
    assert status.status(folder, {}).state == "stopped"
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status.status(folder, {}).state == "running"
    assert status.status(folder, None).state == "unknown"
    write_record(record(fd=756.74), folder / "result.json")
    row = status.status(folder, None)
    assert (row.state, row.score, row.reason) == ("finished", "fd_embedded 756.7", "")


DAMAGE = {
    "config.yaml": ("", "[]", "train: 5", "a: [", "\x00", "train:\n  images: many\n"),
    "metrics.jsonl": ("{\n", "[]\n", '{"images": "x", "images_per_s": 1}\n', "5\n"),
    "jobs.jsonl": ("{\n", "[]\n", "null\n"),
    "failure.json": ("", "[]", "{}", "null"),
    "result.json": ("", "{}", "[]", '{"schema": "result.v1"'),
    "checkpoints/step-00000009/manifest.json": ("", "[]", "null"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_one_row_and_hides_no_other(folder, tmp_path, name):
    open_folder(one(f"out={tmp_path}", "name=sound", "train.images=64000"))
    (folder / JOBS).unlink()  # no scheduler is asked
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for text in DAMAGE[name]:
        (folder / name).write_text(text)
        rows = {row.name: row for row in status.statuses(tmp_path)}
        assert rows["sound"].state == "stopped" and rows["sound"].reason == ""
        assert rows["run"].state == "damaged" and str(folder) in rows["run"].reason, text
    (folder / name).unlink()
    os.mkfifo(folder / name)  # reading it would wait for ever
    assert {row.name: row.state for row in status.statuses(tmp_path)} == {"run": "damaged", "sound": "stopped"}


def test_a_truncated_checkpoint_is_told_also_of_a_finished_run(folder):
    made = folder / "checkpoints/step-00000009"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_bytes(b"12345")
    (made / "manifest.json").write_text(json.dumps({"model.safetensors": {"bytes": 5, "sha256": ""}}))
    write_record(record(), folder / "result.json")
    assert status.status(folder, {}).reason == ""
    (made / "model.safetensors").write_bytes(b"123")
    row = status.status(folder, {})
    assert (
        row.state == "finished"
        and row.reason == f"The newest checkpoint is damaged: {made / 'model.safetensors'} has 3 bytes instead of 5."
    )
    (made / "model.safetensors").unlink()
    assert "is missing" in status.status(folder, {}).reason


def test_only_the_end_of_a_log_is_read(folder, monkeypatch):
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"images": 16 * step, "images_per_s": 4.0, "loss": 1.0}) + "\n" for step in range(4000)
        )
        file.write('{"images": 99')  # cut short by a kill
    assert (folder / "metrics.jsonl").stat().st_size > 3 * status.LOG_END
    assert status.last_row(folder / "metrics.jsonl")["images"] == 16 * 3999


def test_five_hundred_folders_are_quick(tmp_path):
    """In processor time, by far: a row took 10 ms when the whole configuration and log were read."""
    first = open_folder(one(f"out={tmp_path}", "name=run0", "train.images=64000"))
    for number in range(1, 500):
        shutil.copytree(first, tmp_path / f"run{number}")
    for number in range(0, 500, 2):
        write_record(record(f"run{number}"), tmp_path / f"run{number}" / "result.json")
    before = time.process_time()
    rows = status.statuses(tmp_path)
    assert len(rows) == 500 and {row.state for row in rows} == {"finished", "stopped"}
    assert time.process_time() - before < 3


def test_the_table_is_printed_without_torch(folder, tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "launch/status.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": "/nowhere"})
    assert "run" in result.stdout and "unknown" in result.stdout and "the scheduler does not answer" in result.stdout
    assert " torch\n" not in result.stderr


def test_what_squeue_says_is_read_and_a_silent_controller_does_not_hang(tmp_path, monkeypatch):
    script = tmp_path / "squeue"
    script.write_text("#!/bin/sh\necho '7_1|RUNNING|n[1-2]|59:00|None'\necho '8|PENDING||1:00:00|Resources'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert slurm.job_states() == {
        "7_1": JobState("RUNNING", "n[1-2]", "59:00", "None"),
        "8": JobState("PENDING", "", "1:00:00", "Resources"),
    }
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(slurm, "SECONDS", 0.2)
    assert slurm.job_states() is None and slurm.job_state("7_1") is None


@pytest.mark.parametrize(("seconds", "shown"), [(59.6, "0:01:00"), (3661, "1:01:01"), (90_000, "1 d 01:00")])
def test_durations(seconds, shown):
    assert status.clock(seconds) == shown
