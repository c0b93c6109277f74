"""Every command line of the READMEs is one that the program accepts as it stands, and every command that a text or a
message names exists.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pixlat import cli
from pixlat.evaluation import run as evaluation_run
from pixlat.evaluation.command import Syntax, action_of, from_flags, parse, split_words
from pixlat.launch.cluster import submit as cluster
from pixlat.launch.run import asks_for_help, configurations, help_for

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDERS = ("...", "FOLDER", "=mysite", "NAME")  # of lines that say themselves that something is to be filled in
PACKAGES = ("common", "evaluation", "launch", "methods", "pixlat")
STARTS = r"(?:torchrun --nproc-per-node \d+ -m )?pixlat (?!=)"
# The folders of the repository that belong to it; a README elsewhere (a build, a run) is not ours.
FOLDERS = (*PACKAGES, "tests")


def readmes() -> list[Path]:
    return [ROOT / "README.md", *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("README.md")))]


def command_lines() -> list[tuple[str, str]]:
    """(README, command) for every indented line that starts the program; continued lines are joined, the remark behind
    is cut.
    """
    found = []
    for file in readmes():
        text = re.sub(r" \\\n\s*", " ", file.read_text(encoding="utf-8"))
        for line in re.findall(rf"^    ({STARTS}.*)$", text, flags=re.MULTILINE):
            command = re.split(r" {2,}", line)[0]
            if not any(word in command for word in PLACEHOLDERS):
                found.append((str(file.relative_to(ROOT)), command))
    return found


LINES = command_lines()


@pytest.mark.parametrize(("readme", "command"), LINES, ids=[f"{readme}: {command}" for readme, command in LINES])
def test_the_line_is_accepted(readme: str, command: str) -> None:
    words = shlex.split(command)
    name, *arguments = words[words.index("pixlat") + 1 :]
    if name == "--help":
        return
    assert cli.COMMANDS[name].group or name == "completion"
    if name == "train":
        check_training(arguments)
    elif name == "evaluate":
        evaluation_run.check(*parse(evaluation_run.Keys, arguments, tuple(evaluation_run.GROUPS)))
    elif name == "study":
        check_words(cli.STUDIES[arguments[0]].load_syntax(), arguments[1:])
    elif syntax := cli.COMMANDS[name].load_syntax():
        check_words(syntax, arguments)


def check_training(arguments: list[str]) -> None:
    """The configurations of a `pixlat train` line, those of a cluster with what a cluster needs."""
    if asks_for_help(arguments):
        assert help_for(arguments)
        return
    for run in configurations(arguments):
        if run.cluster.name != "here":
            cluster.check(run)


def check_words(syntax: Syntax, arguments: list[str]) -> None:
    """The actions and keys of another command; those of a run's configuration make a configuration."""
    if "--help" in arguments:
        return
    if syntax.actions and arguments and "=" not in arguments[0]:
        name, arguments = action_of("", syntax.actions, arguments)
        syntax = syntax.actions[name] if syntax.actions[name] != Syntax() else syntax
    _, given = split_words(from_flags(syntax.keys, arguments))
    keys, rest = parse(syntax.keys, given, tuple(syntax.groups))
    method = {"method": keys.method} if getattr(keys, "method", None) else {}
    sweeps = {
        key: value for key, value in rest.items() if key.split(".")[0] in ("method", "preset", "data", "train", "model")
    }
    assert configurations([f"{key}={value}" for key, value in {"method": "jit", **sweeps, **method}.items()])


def test_there_are_lines_to_check() -> None:
    assert len(LINES) > 40 and {readme for readme, _ in LINES} >= {
        "README.md",
        "launch/README.md",
        "evaluation/README.md",
    }


# -- what texts and messages name --------------------------------------------------------------------------------------


def named_commands() -> Iterator[tuple[str, str, str]]:
    """(file, command, the word behind it) for every "`pixlat COMMAND" of code and READMEs."""
    files = [
        *readmes(),
        *(file for folder in PACKAGES for suffix in ("*.py", "*.yaml") for file in (ROOT / folder).rglob(suffix)),
    ]
    for file in files:
        for name, word in re.findall(
            r"`(?:torchrun --nproc-per-node \d+ -m )?pixlat ([a-z]+)(?![=\w])(?: ([a-z][\w-]*)(?=[ `]))?",
            file.read_text(encoding="utf-8"),
        ):
            yield str(file.relative_to(ROOT)), name, word


WORDS = ("help",)  # what else may stand in the place of a command


def test_every_command_that_is_named_exists() -> None:
    found = list(named_commands())
    assert len(found) > 30
    for file, name, word in found:
        if name in WORDS:
            continue
        assert name in cli.COMMANDS, (file, name)
        actions = cli.STUDIES if name == "study" else getattr(cli.COMMANDS[name].load_syntax(), "actions", {})
        assert not (actions and word) or word in actions, (file, name, word)


# Scripts whose docstring says which command they are, and the marker of a README that was written before there was one.
SCRIPTS = (
    "launch/run.py",
    "evaluation/claims.py",
    "evaluation/collapse.py",
    "evaluation/hidden_states.py",
    "evaluation/board/text.py",
)


def test_no_text_names_a_script() -> None:
    """Who has installed a wheel has no launch/run.py. The scripts stay, and launch/README.md says once that they are
    the commands.
    """
    allowed = {"README.md": 1, "launch/README.md": 1, **dict.fromkeys(SCRIPTS, 1)}
    for file in [
        *readmes(),
        *(file for folder in PACKAGES for suffix in ("*.py", "*.yaml") for file in (ROOT / folder).rglob(suffix)),
    ]:
        name = str(file.relative_to(ROOT))
        lines = [
            line
            for line in file.read_text(encoding="utf-8").splitlines()
            if re.search(r"python (launch|evaluation)/\w+\.py", line)
        ]
        assert len(lines) <= allowed.get(name, 0), (name, lines)
