"""The one command: its help, its dialect, the lines that were written before it, and shell completion."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from records import record

from pixlat import __version__, cli
from pixlat.common.errors import UserError
from pixlat.completion import SCRIPTS, candidates
from pixlat.evaluation import leaderboard
from pixlat.evaluation.command import NoKeys, Syntax, from_flags, parse, run_command
from pixlat.evaluation.records.record import write_record
from pixlat.evaluation.studies.claim_tools import command as claims
from pixlat.launch import run as train
from pixlat.launch import status
from pixlat.methods import registered

ROOT = Path(__file__).resolve().parent.parent
LISTED = [name for name, command in cli.COMMANDS.items() if command.group]
HEAVY = ("torch", "torchvision", "timm", "accelerate", "matplotlib", "scipy", "transformers", "submitit")
HELPS = [
    (),
    ("--help",),
    ("--version",),
    ("train", "method=jit", "--help"),
    ("train", "method=jit", "--help", "all"),
    ("prepare", "images", "--help"),
    *((name, "--help") for name in LISTED),
    *(("study", name, "--help") for name in cli.STUDIES),
]
# Answers in a process of its own, and tells on stderr its seconds of CPU time and which heavy modules it has imported.
TIMED = f"""\
import sys, time
from pixlat.cli import main
code = main(sys.argv[1:])
print(time.process_time(), *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pixlat", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def told(arguments: list[str], capsys) -> tuple[int, str, str]:
    code = cli.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_answers_at_once_and_imports_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", TIMED, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    seconds, *heavy = done.stderr.split()
    assert done.returncode == 0 and done.stdout and not heavy, done.stderr
    assert float(seconds) < 0.5
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_all_commands_fit_a_screen():
    lines = cli.help_text().splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    for name in LISTED:
        assert sum(re.match(rf"\S* +{name} +\S", line) is not None for line in lines) == 1


def test_python_m_pixlat_is_the_command():
    assert run("--version").stdout == f"pixlat {__version__}\n"
    assert run().stdout == run("--help").stdout == cli.help_text() + "\n"


def test_the_version_is_that_of_the_package():
    assert (
        f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
        or 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    )


@pytest.mark.parametrize("arguments", [["help", "train"], ["--help", "train"], ["train", "help"], ["train"]])
def test_help_may_stand_before_or_behind_the_command(arguments, capsys):
    assert told(arguments, capsys) == told(["train", "--help"], capsys)


def test_help_of_training_lists_every_method_on_a_screen_or_two():
    text = train.help_text()
    assert all(f"\n  {name} " in text for name in registered()) and len(text.splitlines()) < 40


# -- dispatch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "'trian' is not a command of pixlat. Did you mean 'train'?"),
        (["leaderbord", "runs=x"], "Did you mean 'leaderboard'?"),
        (["speed", "method=jit"], "Did you mean 'bench'?"),
        (["latents"], "Did you mean 'prepare latents'?"),
        (["study", "colapse"], "Did you mean 'collapse'?"),
        (["completion", "fish"], "there is no completion for 'fish'"),
        (["prepare", "latent"], "Did you mean 'latents'?"),
        (["reference", "biuld"], "Did you mean 'build'?"),
        (["bench", "memroy"], "Did you mean 'memory'?"),
        (["claims", "raport"], "Did you mean 'report'?"),
        (["claims", "report", "jit-manifold"], "takes no names"),
        (["leaderboard", "run=x"], "unknown key 'run'. Did you mean 'runs'?"),
        (["leaderboard", "check=perhaps"], "check=perhaps does not fit: it must be true or false."),
        (["leaderboard", "matched=train_mac"], "Did you mean 'train_macs'?"),
        (["leaderboard", "--runz", "x"], "'--runz' is not of the form key=value. Did you mean 'runs'? Keys: runs,"),
        (["leaderboard", "--runs"], "--runs needs a value: runs=VALUE."),
        (["status", "nowhere"], "there is no folder nowhere"),
        (["claims", "job=2"], "Did you mean 'jobs'?"),
        (["export", "form=x"], "Did you mean 'from'?"),
        (["export", "from=x"], "to= is missing. `pixlat export --help` has an example."),
        (["import", "file=x"], "method= is missing."),
        (["plan", "hardwar=h100"], "Did you mean 'hardware'?"),
        (["bench", "trian.lr=1"], "Did you mean 'train.lr'?"),
        (["bench", "speed.batsh=1"], "Did you mean 'speed.batch'?"),
        (["train", "method=jit", "train.lrr=1"], "Did you mean 'train.lr'?"),
    ],
)
def test_mistakes_are_one_line_with_the_way_out(arguments, message, capsys):
    code, out, err = told(arguments, capsys)
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_the_old_use_of_the_console_command_is_train(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "main", lambda arguments: seen.append(list(arguments)) or 7)
    assert cli.main(["method=jit", "seed=1"]) == cli.main(["train", "method=jit", "seed=1"]) == 7
    assert cli.main(["--help", "method=jit"]) == 7
    assert seen == [["method=jit", "seed=1"], ["method=jit", "seed=1"], ["method=jit", "--help"]]


def test_training_takes_the_same_words_as_the_script(capsys):
    words = ["method=jit", "preset=imagnet256-b"]
    script = subprocess.run([sys.executable, "launch/run.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert told(["train", *words], capsys) == (script.returncode, script.stdout, script.stderr)
    assert "Did you mean 'imagenet256-b'?" in script.stderr


def test_arguments_default_to_those_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pixlat", "--version"])
    assert cli.main() == 0 and capsys.readouterr().out == f"pixlat {__version__}\n"


@pytest.mark.parametrize("name", LISTED)
def test_every_command_takes_arguments_and_says_what_it_takes(name, capsys):
    command = cli.COMMANDS[name]
    assert command.run(["--help"]) == 0 and f"pixlat {name}" in capsys.readouterr().out
    assert name == "study" or isinstance(command.load_syntax(), Syntax)


def test_a_reader_that_leaves_early_ends_the_command_quietly():
    child = subprocess.Popen([sys.executable, "-m", "pixlat"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.wait(timeout=60) == 141 and child.stderr.read() == b""


def test_an_interrupt_is_one_sentence(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(status, "main", interrupted)
    assert told(["status"], capsys) == (128 + signal.SIGINT, "", "interrupted. Finished files are kept.\n")


# -- the dialect -------------------------------------------------------------------------------------------------------


def test_flags_become_keys():
    arguments = ["--update-readme", "--runs", "a b", "--at=0.5", "x", "--json", "check=true"]
    assert from_flags(leaderboard.Keys, arguments) == [
        "update_readme=true",
        "runs=a b",
        "at=0.5",
        "x",
        "--json",
        "check=true",
    ]


@pytest.mark.parametrize("name", ["007", "1e3", "[x]", "a: b", "2024-11-26", "{a", "true"])
def test_text_stays_as_it_was_written(name):
    assert parse(leaderboard.Keys, [f"runs={name}"])[0].runs == name


def test_a_value_that_stands_for_a_key_which_is_not_there_is_a_mistake():
    with pytest.raises(UserError, match="does not fit"):
        parse(leaderboard.Keys, ["runs=${x}"])


def test_none_is_written_null():
    assert parse(leaderboard.Keys, ["out=null"])[0].out is None


def test_a_command_without_keys_refuses_them():
    assert parse(NoKeys, []) == (NoKeys(), {})


def test_what_work_returns_is_printed_or_is_the_exit_code(capsys):
    assert run_command(["a=1"], str, lambda arguments: "done") == 0 and capsys.readouterr().out == "done\n"
    assert run_command(["a=1"], str, lambda arguments: 1) == 1 and capsys.readouterr().out == ""
    assert run_command([], lambda: "help", lambda arguments: "done") == 0 and capsys.readouterr().out == "help\n"
    assert (
        run_command([], lambda: "help", lambda arguments: "done", alone=True) == 0
        and capsys.readouterr().out == "done\n"
    )


@pytest.fixture
def runs(tmp_path) -> Path:
    for number, name in enumerate(("a", "b")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_record(record(name, 80.0 + number), tmp_path / "runs" / name / "result.json")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--runs", "RUNS", "--out", "OUT"], ["runs=RUNS", "out=OUT"]),
        (["--runs=RUNS", "--matched", "train_macs", "--at", "0.01"], ["runs=RUNS", "matched=train_macs", "at=0.01"]),
        (["--check", "--results", "RUNS", "--readme", "README"], ["check=true", "results=RUNS", "readme=README"]),
        (
            ["--update-readme", "--results", "RUNS", "--readme", "README"],
            ["update_readme=true", "results=RUNS", "readme=README"],
        ),
    ],
)
def test_the_leaderboards_old_flags_do_what_its_keys_do(runs, tmp_path, capsys, old, new):
    readme = tmp_path / "README.md"
    found = []
    for arguments in (old, new):
        readme.write_text("\n".join(leaderboard_markers()))
        given = [
            each.replace("RUNS", str(runs)).replace("OUT", str(tmp_path / "out")).replace("README", str(readme))
            for each in arguments
        ]
        found.append((leaderboard.main(given), *capsys.readouterr(), readme.read_text()))
    assert found[0] == found[1]
    assert found[0][0] == (2 if "--check" in old else 0) and (
        "--check" not in old or "`pixlat leaderboard update_readme=true`" in found[0][2]
    )


def leaderboard_markers() -> tuple[str, str]:
    from pixlat.evaluation.board.text import MARKERS

    return MARKERS


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            ["run", "jit-manifold", "--quick", "--jobs", "1", "--out", "OUT"],
            ["run", "jit-manifold", "quick=true", "jobs=1", "out=OUT"],
        ),
        (["--quick", "--out", "OUT"], ["quick=true", "out=OUT"]),
        (["run", "--out=OUT", "jit-manifold", "pmf-times"], ["run", "jit-manifold", "pmf-times", "out=OUT"]),
        (["report", "--out", "OUT"], ["report", "out=OUT"]),
        ([], ["list"]),
    ],
)
def test_old_flags_of_the_claims_do_what_its_keys_do(tmp_path, capsys, monkeypatch, old, new):
    calls = []
    monkeypatch.setattr(claims, "run", lambda *arguments: calls.append(arguments) or 1)
    answers = [
        (claims.main([each.replace("OUT", str(tmp_path)) for each in words]), *capsys.readouterr())
        for words in (old, new)
    ]
    assert answers[0] == answers[1]
    assert len(calls) in (0, 2) and calls[:1] == calls[1:]
    if calls:
        assert answers[0][0] == 1 and calls[0][0] == [word for word in old if word in ("jit-manifold", "pmf-times")]
        assert calls[0][1] == ("--quick" in old) and calls[0][2] == tmp_path and calls[0][3] >= 1


@pytest.mark.parametrize(("old", "new"), [(["OUT", "--json"], ["out=OUT", "json=true"]), (["OUT"], ["out=OUT"])])
def test_old_flags_of_the_status_do_what_its_keys_do(tmp_path, capsys, monkeypatch, old, new):
    monkeypatch.setattr(
        status, "statuses", lambda folder: [status.Row(folder.name, "failed", "5 %", "", "", "", "", "out of memory")]
    )
    (tmp_path / "here").mkdir()
    answers = [
        (status.main([each.replace("OUT", str(tmp_path / "here")) for each in words]), *capsys.readouterr())
        for words in (old, new)
    ]
    assert (
        answers[0] == answers[1] and answers[0][0] == 0 and "here" in answers[0][1] and "out of memory" in answers[0][1]
    )


# -- completion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("pixlat ", LISTED, ["complete"]),
        ("pixlat le", ["leaderboard"], ["train"]),
        ("pixlat train me", ["method="], ["model.depth="]),
        ("pixlat train method=", [f"method={name}" for name in registered()], []),
        ("pixlat train method=jit,pm", ["method=jit,pmf"], ["method=jit,jit"]),
        (
            "pixlat train method=jit preset=imagenet256-",
            ["preset=imagenet256-b", "preset=imagenet256-h"],
            ["preset=demo"],
        ),
        ("pixlat train method=reg model.", ["model.tokenizer="], ["model.bottleneck=", "train.lr="]),
        ("pixlat train method=jit model.", ["model.bottleneck="], ["model.tokenizer="]),
        ("pixlat train method=jit train.lr=1 train.l", ["train.log_images="], ["train.lr="]),
        ("pixlat train data=", ["data=folder", "data=emoji32"], []),
        ("pixlat train dry_run=", ["dry_run=true", "dry_run=false"], []),
        ("pixlat method=jit preset=d", ["preset=demo"], []),
        ("pixlat plan hard", ["hardware="], []),
        ("pixlat plan method=jit sample.", ["sample.steps="], ["train.lr="]),
        ("pixlat evaluate protocol=adm", ["protocol=adm256"], ["protocol=embedded"]),
        ("pixlat export fr", ["from="], ["from_="]),
        ("pixlat prepare ", ["images", "latents", "tokenizer", "judges"], []),
        ("pixlat prepare images sh", ["shard_images="], []),
        ("pixlat bench me", ["memory", "method="], []),
        ("pixlat bench memory speed.", ["speed.batch="], []),
        ("pixlat claims ", ["list", "run", "report", "quick="], []),
        ("pixlat study ", ["collapse", "hidden-states"], []),
        ("pixlat study collapse heldout", ["heldout="], []),
        ("pixlat completion ", ["bash", "zsh"], []),
        ("pixlat help tr", ["train"], []),
        ("pixlat nonsense ", [], ["train"]),
        ("pixlat train name='a b' se", ["seed="], []),
        ("pixlat train name='a b", [], []),
    ],
)
def test_what_may_follow(line, some, none):
    found = candidates(line)
    assert set(some) <= set(found) and not set(none) & set(found) and len(set(found)) == len(found)


def test_files_are_completed(tmp_path, monkeypatch):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.yaml").write_text("method: reg\n")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "samples.npz").touch()
    monkeypatch.chdir(tmp_path)
    assert candidates("pixlat evaluate run=") == ["run=runs/", "run=samples.npz"]
    assert candidates("pixlat evaluate run=runs/") == ["run=runs/one/"]
    assert candidates("pixlat compare ") == ["runs/", "samples.npz"] and candidates("pixlat compare .h") == [".hidden/"]
    assert candidates("pixlat status runs/o") == ["runs/one/"]
    assert "sample.path_drop=" not in candidates("pixlat evaluate sample.")
    assert "model.tokenizer=" in candidates("pixlat evaluate run=runs/one model.")  # the run's own method
    assert candidates("pixlat train method=sit model.tokenizer=ru") == ["model.tokenizer=runs/"]  # of an earlier stage
    assert candidates("pixlat train method=sit model.prediction=") == []
    assert candidates("pixlat prepare images to=ru") == ["to=runs/"] and candidates("pixlat sample as=") == []
    assert candidates(f"pixlat evaluate run={tmp_path}/sa") == [f"run={tmp_path}/samples.npz"]


def test_completion_answers_between_two_key_strokes():
    code = TIMED.replace("main(sys.argv[1:])", "main(['complete', *sys.argv[1:]])")
    done = subprocess.run(
        [sys.executable, "-c", code, "pixlat train method=jit preset=im"], cwd=ROOT, capture_output=True, text=True
    )
    seconds, *heavy = done.stderr.split()
    assert "preset=imagenet256-b" in done.stdout.split() and not heavy and float(seconds) < 0.3


@pytest.fixture
def shell(tmp_path) -> dict[str, str]:
    """The environment of a shell that has the command `pixlat`."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "pixlat"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pixlat "$@"\n')
    command.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return os.environ | {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "PS1": "> ",
        "TERM": "dumb",
        "INPUTRC": "/dev/null",
    }


BASH_REPLY = """\
source <(pixlat completion bash)
COMP_LINE="$LINE" COMP_POINT=${#LINE} COMP_WORDS=(pixlat "$LAST") COMP_CWORD=1
[[ $BREAKS == no ]] && COMP_WORDBREAKS=' '
_pixlat
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("line", "reply", "breaks"),
    [
        ("pixlat lead", ["leaderboard"], "yes"),
        ("pixlat train method=ji", ["jit"], "yes"),  # bash replaces what stands behind the "="
        ("pixlat train method=ji", ["method=jit"], "no"),
        ("pixlat train method=jit preset=imagenet1024", ["imagenet1024-b"], "yes"),
        ("pixlat train dry_", ["dry_run="], "yes"),
        ("pixlat train dry_run=", ["true", "false"], "yes"),
        ("pixlat nonsense x", [""], "yes"),
    ],
)
def test_bash_completes(shell, line, reply, breaks):
    variables = {"LINE": line, "LAST": line.split()[-1], "BREAKS": breaks}
    done = subprocess.run(
        ["bash", "-c", BASH_REPLY], cwd=ROOT, env=shell | variables, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.rstrip("\n").split("\n") == reply and not done.stderr


# A space follows a value that is complete, and none follows a key that waits for its value.
TYPED = "train method=jit preset=imagenet1024-b "


def typed(command: list[str], keys: list[tuple[str, str]], environment: dict[str, str]) -> str:
    """What an interactive shell shows: each of `keys` is typed once the text before it has appeared behind the last
    one.
    """
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(command[0], command, environment)
    shown, end, behind = "", time.monotonic() + 60, 0
    try:
        for text, awaited in keys:
            os.write(terminal, text.encode())
            while not re.search(awaited, shown[behind:]) and time.monotonic() < end:
                if select.select([terminal], [], [], 0.2)[0]:
                    shown = (shown + os.read(terminal, 4096).decode(errors="replace")).replace(
                        " \b", ""
                    )  # zsh takes a space back
            assert re.search(awaited, shown[behind:]), (awaited, shown)
            behind = len(shown)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)
    return shown


def test_an_interactive_bash_completes(shell):
    keys = [
        ("source <(pixlat completion bash); echo re''ady\n", "ready"),
        ("pixlat train meth\tji\tpreset=imagenet1024\t", TYPED),
    ]
    typed(["bash", "--norc", "--noprofile", "-i"], keys, shell)


def test_an_interactive_zsh_completes(shell):
    if shutil.which("zsh") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("zsh is not installed")
    keys = [
        ("autoload -U compinit && compinit -u -D; source <(pixlat completion zsh); echo re''ady\n", "ready"),
        ("pixlat train meth\tji\tpreset=imagenet1024\t", TYPED),
    ]
    typed(["zsh", "-f", "-i"], keys, shell)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_printed(name, capsys):
    assert told(["completion", name], capsys)[:2] == (0, SCRIPTS[name] + "\n")
    assert f"pixlat completion {name}" in told(["completion"], capsys)[1]
