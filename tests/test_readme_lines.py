"""Every command line of the READMEs is one that the program accepts as it stands: keys, presets,
values and what a cluster needs.
"""

import re
import shlex
from pathlib import Path

import pytest

from pixlat.evaluation import run as evaluation_run
from pixlat.evaluation import sweep as evaluation_sweep
from pixlat.evaluation.command import parse
from pixlat.launch import plan
from pixlat.launch.cluster import submit as cluster
from pixlat.launch.run import asks_for_help, configurations, help_for

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDERS = ("...", "FOLDER", "=mysite")  # lines that say themselves that something is to be filled in


def command_lines() -> list[tuple[str, str]]:
    """(README, command) for every indented line that starts a program of the project; continued lines are joined,
    the remark behind is cut.
    """
    found = []
    for file in sorted(ROOT.rglob("README.md")):
        if any(part.startswith(".") or part in ("build", "runs") for part in file.relative_to(ROOT).parts):
            continue
        text = re.sub(r" \\\n\s*", " ", file.read_text(encoding="utf-8"))
        for line in re.findall(
            r"^    ((?:python|torchrun --nproc-per-node \d+) (?:launch|evaluation)/\w+\.py.*)$",
            text,
            flags=re.MULTILINE,
        ):
            command = re.split(r" {2,}", line)[0]
            if not any(word in command for word in PLACEHOLDERS):
                found.append((str(file.relative_to(ROOT)), command))
    return found


LINES = command_lines()


@pytest.mark.parametrize(("readme", "command"), LINES, ids=[f"{readme}: {command}" for readme, command in LINES])
def test_the_line_is_accepted(readme: str, command: str) -> None:
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    arguments = words[words.index(script) + 1 :]
    assert (ROOT / script).is_file()
    if script == "launch/run.py":
        if asks_for_help(arguments):
            assert help_for(arguments)
            return
        for run in configurations(arguments):
            if run.cluster.name != "here":
                cluster.check(run)
    elif script == "launch/plan.py":
        _, rest = parse(plan.Keys, arguments, tuple(plan.GROUPS))
        assert configurations([f"{key}={value}" for key, value in rest.items()])
    elif script == "evaluation/run.py":
        evaluation_run.check(*parse(evaluation_run.Keys, arguments, tuple(evaluation_run.GROUPS)))
    elif script == "evaluation/sweep.py":
        assert parse(evaluation_sweep.Keys, arguments, ("sample", "data"))


def test_there_are_lines_to_check() -> None:
    assert len(LINES) > 40 and {readme for readme, _ in LINES} >= {
        "README.md",
        "launch/README.md",
        "evaluation/README.md",
    }
