"""The papers' statements that a CPU can check.

  pixlat claims                         lists them with their criteria and cost
  pixlat claims run quick=true          all of them on a small budget, 15 minutes on two cores
  pixlat claims run NAME ... jobs=2     some of them in full, each on a core of its own
  pixlat claims report                  the verdicts of the claims that were checked

The authors wrote each claim's criteria before its first run. If something was changed later, the claim says so.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeAlias

from pixlat.common.cache import features_folder
from pixlat.common.command_line import as_command
from pixlat.common.errors import UserError
from pixlat.common.files import write_whole
from pixlat.evaluation.board.text import escape, pipe_table
from pixlat.evaluation.command import Syntax, action_of, from_flags, help_text, parse, run_command, split_words
from pixlat.evaluation.records.claims import PICTURE_FILE, ClaimRecord, read_claims, write_claim
from pixlat.evaluation.studies.claim_tools.framework import all_claims, build_record, find

REPORT = "claims.md"
AMENDED = "**Amended after numbers had been seen:**"

Task: TypeAlias = tuple[str, bool, Path]  # a claim's name, whether quick, the folder of its record
Work: TypeAlias = Callable[[str, bool, Path], object]


def listing() -> str:
    """Every claim with its criteria and its cost."""
    parts = []
    for claim in all_claims().values():
        quick, full = claim.minutes
        lines = [f"{claim.name} ({claim.paper}; {full:g} min, quick {quick:g})", f"  {claim.statement}"]
        parts.append("\n".join([*lines, *(f"  - {criterion}" for criterion in claim.criteria)]))
    return "\n\n".join(parts)


def run(names: Sequence[str], quick: bool, out: Path, jobs: int) -> int:
    """Checks claims, `jobs` at a time on one core each, and prints the report.

    Each claim gets a folder with its record and its picture. Returns 1 if a claim failed to run, else 0.
    """
    # the longest claims start first, so that no core waits at the end
    chosen = sorted(find(names), key=lambda claim: -claim.minutes[0 if quick else 1])
    tasks = [(claim.name, quick, out / f"{claim.name}{'-quick' if quick else ''}") for claim in chosen]
    failed = [task[0] for task, done in zip(tasks, run_all(tasks, jobs), strict=True) if not done]
    if failed:
        print(f"error: these claims failed for the reasons above: {', '.join(failed)}", file=sys.stderr)
    if len(failed) < len(tasks):
        print(report(out))
    return 1 if failed else 0


def run_all(tasks: Sequence[Task], jobs: int, work: Work | None = None) -> list[bool]:
    """Runs every task and returns for each whether it succeeded.

    A task that fails, or whose process dies, does not stop the others. `work` replaces `check` (for tests).
    """
    if min(jobs, len(tasks)) <= 1:
        return [attempt(work or check, task) for task in tasks]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(partial(attempt_apart, work or check), tasks))


def attempt(work: Work, task: Task) -> bool:
    """Runs a task in this process and returns whether it succeeded."""
    try:
        work(*task)
    except Exception:
        traceback.print_exc()
        return False
    return True


def attempt_apart(work: Work, task: Task) -> bool:
    """Runs a task in a new process, which prints its own traceback, and returns whether it succeeded."""
    process = get_context("spawn").Process(target=work, args=task)
    process.start()
    process.join()
    return process.exitcode == 0


def check(name: str, quick: bool, folder: Path) -> ClaimRecord:
    """Measures one claim on one thread, saves its figure and writes its record."""
    import torch

    from pixlat.common.hardware import device_name
    from pixlat.common.pictures.curves import save_figure

    torch.set_num_threads(1)
    (claim,) = find([name])
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    evidence = claim.measure(claim.budget(quick, features_folder(folder.parent)))
    record = build_record(claim, evidence, quick, time.perf_counter() - start, device_name(torch.device("cpu")))
    save_figure(evidence.figure, folder / PICTURE_FILE)
    write_claim(record, folder)
    print(f"{name}: {record['verdict']}, after {record['seconds']:.0f} s", file=sys.stderr)
    return record


def report(out: Path) -> str:
    """The verdicts for a terminal. Also writes claims.md in `out`, which has all details."""
    left_out: list[str] = []
    records = read_claims(out, left_out)
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    if not records:
        raise UserError(f"no claim has been checked below {out}. Run `pixlat claims run quick=true`.")
    write_whole(out / REPORT, to_markdown(records, out))
    rows = [
        [record["name"], record["verdict"], "quick" if record["quick"] else "full", f"{record['seconds']:.0f} s"]
        for record, _ in records
    ]
    return f"{pipe_table(rows, ['claim', 'verdict', 'budget', 'took'], 'simple')}\n\n{out / REPORT}"


def to_markdown(records: Sequence[tuple[ClaimRecord, Path]], out: Path) -> str:
    """One Markdown page with all records and their pictures.

    records: (record, its folder). out: the folder of the page, to which the links to pictures are relative.
    """
    parts = [
        "# Claims of the papers, checked",
        "Criteria were written before the first run; where something was changed after numbers had been seen, "
        "the claim says so.",
    ]
    for record, folder in records:
        criteria = [
            [escape(item["text"]), f"{item['value']:.4g}", f"{item['se']:.2g}" if item["n"] else "", item["verdict"]]
            for item in record["criteria"]
        ]
        rows = [[escape(cell) for cell in row] for row in record["table"]["rows"]]
        parts += [
            f"## {escape(record['name'])}: {record['verdict']}",
            f"*{escape(record['statement'])}* {escape(record['paper'])}.",
            f"{escape(record['setting'])} {'Quick run.' if record['quick'] else ''} Seeds: "
            f"{', '.join(map(str, record['seeds'])) or 'nothing is random'}.",
            *([f"{AMENDED} {escape(record['amended'])}"] if record.get("amended") else []),
            pipe_table(criteria, ["criterion", "found", "standard error", "verdict"]),
            pipe_table(rows, [escape(header) for header in record["table"]["headers"]]),
            *map(escape, record["remarks"]),
        ]
        if (folder / PICTURE_FILE).exists():
            parts.append(f"![{escape(record['name'])}]({(folder / PICTURE_FILE).relative_to(out).as_posix()})")
    return "\n\n".join(parts) + "\n"


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Keys:
    """The command's keys."""

    quick: bool = False  # uses a smaller budget; without an action it runs all claims
    jobs: int = field(default_factory=cores)  # how many claims run at the same time, each on its own core
    out: str = "runs/claims"  # folder for records, pictures and claims.md


SYNTAX = Syntax(Keys, actions={"list": Syntax(), "run": Syntax(), "report": Syntax()})


def work(arguments: Sequence[str]) -> str | int:
    """Lists, runs or reports claims.

    Returns the text to print, or the exit code of a run, which is 1 if a claim failed to run.
    """
    words, given = split_words(from_flags(Keys, arguments))
    keys, _ = parse(Keys, given)
    out = Path(keys.out).expanduser()
    action, names = action_of("claims", SYNTAX.actions, words or ["run" if keys.quick else "list"])
    if names and action != "run":
        raise UserError(
            f"`pixlat claims {action}` takes no names, but you gave {', '.join(names)}. To check claims, use "
            f"`pixlat claims run {' '.join(names)}`."
        )
    if action == "run":
        return run(names, keys.quick, out, keys.jobs)
    return report(out) if action == "report" else listing()


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 for any verdicts, 1 if a claim failed to run, 2 for a mistake in the command."""
    return run_command(
        sys.argv[1:] if arguments is None else arguments, lambda: help_text(str(__doc__), Keys), work, alone=True
    )
