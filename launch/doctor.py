"""Will pixlat work here, and how fast? Looks at packages, GPUs, CPUs, memory, disks, plug-ins and Slurm.

  pixlat doctor                   all checks, with a few seconds of measuring
  pixlat doctor quick=true        without what is measured
  pixlat doctor out=/scratch/runs whether runs can be kept there
  pixlat doctor as=json           one JSON object, for programs

Each line says ok, note (it works, but could work better) or problem, with the command that mends it.
The exit code is 0 without a problem, else 1. Nothing is changed, installed or fetched.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pixlat.common.command_line import as_command
from pixlat.common.config.resolve import one_of
from pixlat.evaluation.command import Syntax, help_text, parse, run_command
from pixlat.launch.checkup.finding import NOTE, PROBLEM, Finding

FORMATS = ("text", "json")
WIDTH = 100  # columns of the report
INDENT = 11  # columns of the level before each text


@dataclass
class Keys:
    """The command's keys."""

    out: str = "runs"  # the folder in which runs will be kept, as in the runs' own out=
    quick: bool = False  # leave out what is measured: matrix products and two processes that meet
    as_: str = "text"  # text, or json


SYNTAX = Syntax(Keys)
Check = Callable[[], Iterator[Finding]]


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 without a problem, 1 with one, 2 for a mistake in the command."""
    return run_command(
        sys.argv[1:] if arguments is None else arguments, lambda: help_text(str(__doc__), Keys), work, alone=True
    )


def work(arguments: Sequence[str]) -> int:
    """Makes and prints the report. Returns the exit code."""
    keys, _ = parse(Keys, arguments)
    one_of("as", keys.as_, FORMATS)
    if keys.as_ == "json":
        found = {topic: list(check()) for topic, check in checks(keys).items()}
        print(json.dumps(as_json(found), indent=1))
    else:
        found = printed(checks(keys))
        print(verdict([each for findings in found.values() for each in findings]))
    return int(any(each.level == PROBLEM for findings in found.values() for each in findings))


def checks(keys: Keys) -> dict[str, Check]:
    """The checks by topic, in the order of the report. Each imports what it needs, torch included, when it runs."""
    from pixlat.launch.checkup import machine, packages, scheduler

    topics: dict[str, Check] = {"software": packages.findings, "gpus": gpus}
    topics |= {"machine": lambda: machine.findings(keys.out), "slurm": scheduler.findings}
    return topics if keys.quick else topics | {"measured": measured}


def gpus() -> Iterator[Finding]:
    """The GPUs; nothing where torch is missing, which `software` tells."""
    if torch_works():
        from pixlat.launch.checkup import gpus as checkup

        yield from checkup.findings()


def measured() -> Iterator[Finding]:
    """The measurements; nothing where torch is missing."""
    if torch_works():
        from pixlat.launch.checkup import measured as checkup

        yield from checkup.findings()


def torch_works() -> bool:
    """Whether torch can be imported."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


# -- report ------------------------------------------------------------------------------------------------------------


def printed(topics: Mapping[str, Check]) -> dict[str, list[Finding]]:
    """Makes all findings and prints each as soon as it is known."""
    found: dict[str, list[Finding]] = {}
    for topic, check in topics.items():
        found[topic] = []
        for each in check():
            if not found[topic]:
                print(topic)
            print(paragraph(each), flush=True)
            found[topic].append(each)
    return found


def paragraph(finding: Finding) -> str:
    """A finding as lines of text. The command that mends it has an unbroken line of its own, to be copied."""
    lines = textwrap.wrap(finding.text, WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
    first, *others = [*lines, *([f"-> {finding.mend}"] if finding.mend else [])]
    return "\n".join([f"  {finding.level:<{INDENT - 2}}{first}", *(" " * INDENT + line for line in others)])


def verdict(findings: Sequence[Finding]) -> str:
    """The answer in one line."""
    problems, notes = (sum(each.level == level for each in findings) for level in (PROBLEM, NOTE))
    noted = f"{notes} {'note' if notes == 1 else 'notes'}"
    if problems:
        count = f"{problems} {'problem' if problems == 1 else 'problems'}"
        return f"\npixlat will not work as it should on {platform.node()}: {count}, {noted}."
    return f"\npixlat will work on {platform.node()}: no problem, {noted}."


def as_json(found: Mapping[str, Sequence[Finding]]) -> dict[str, object]:
    """The whole report as one object."""
    rows = [each.as_json(topic) for topic, findings in found.items() for each in findings]
    levels = [row["level"] for row in rows]
    return {
        "host": platform.node(),
        "works": PROBLEM not in levels,
        "problems": levels.count(PROBLEM),
        "notes": levels.count(NOTE),
        "findings": rows,
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("CUDA_", "OMP_", "NCCL_"))
        },
    }


if __name__ == "__main__":
    sys.exit(main())
