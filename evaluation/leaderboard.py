"""All records below a folder as tables and as one page.

  pixlat leaderboard runs=runs out=FOLDER            leaderboard.html, .md, .csv, .json and .tex
  pixlat leaderboard matched=train_macs at=0.01      prints what the runs reach at equal cost
  pixlat leaderboard update_readme=true              the README's table, from evaluation/results
  pixlat leaderboard check=true                      fails if that table is stale

Without keys it reads ./runs. Each protocol hash has a table of its own, because numbers of different
protocols cannot be compared. Guided and unguided rows stand apart. Imports no torch.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixlat.common.command_line import as_command
from pixlat.common.config.resolve import one_of, require
from pixlat.common.errors import UserError
from pixlat.common.files import write_whole
from pixlat.evaluation.board.groups import Records, read_records
from pixlat.evaluation.board.matched import AXES, common_budget, curves_of, matched_table
from pixlat.evaluation.board.page import to_html
from pixlat.evaluation.board.published import from_record
from pixlat.evaluation.board.render import rendered, say_left_out, summary
from pixlat.evaluation.board.standing import contact_text
from pixlat.evaluation.board.text import pipe_table, printable, to_latex, to_markdown, to_readme, with_table
from pixlat.evaluation.command import Syntax, from_flags, help_text, parse, run_command
from pixlat.evaluation.records.published import PublishedRow, read_published
from pixlat.evaluation.records.record import RESULT, to_csv

__all__ = ["main", "read_records", "render", "summary"]

RESULTS = Path(__file__).resolve().parent / "results"
README = RESULTS.parent.parent / "README.md"


@dataclass
class Keys:
    """The command's keys."""

    runs: str = "runs"  # the folder of the runs
    out: str | None = None  # where the files go; none: into the folder of the runs
    matched: str | None = (
        None  # train_macs, images or sampling_macs: prints what runs reach at equal cost, writes nothing
    )
    at: float | None = (
        None  # the cost for matched=, in PMACs, images, or GMACs an image; none: where most runs can be compared
    )
    check: bool = False  # fails if the README's table is stale; writes nothing
    update_readme: bool = False  # writes the README's table
    results: str = str(RESULTS)  # the records of the README's table
    readme: str = str(README)  # the file with that table


SYNTAX = Syntax(Keys)


def render(records: Records, published: Sequence[PublishedRow] = ()) -> dict[str, str]:
    """The contents of leaderboard.md, .csv, .json, .tex and .html, by suffix. CSV and JSON hold all records, unrounded;
    the CSV has one more column, the judges that each row has met.
    """
    rows = [*published, *(from_record(row) for row in records.rows if row["kind"] == "published")]
    return {
        "html": to_html(records, rows),
        "md": to_markdown(records, rows),
        "csv": to_csv({**row, "judges_met": contact_text(row)} for row in records.rows),
        "json": json.dumps(records.rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "tex": to_latex(records),
    }


def write(runs: Path, out: Path) -> list[Path]:
    """Renders the records below `runs` into files in `out`, which is made if it is missing."""
    published = read_published()
    contents = rendered(_read(runs), lambda records: render(records, published))
    try:
        out.mkdir(parents=True, exist_ok=True)
        return [write_whole(out / f"leaderboard.{suffix}", text) for suffix, text in contents.items()]
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}. Choose a writable folder with out=.") from error


def _read(runs: Path, pattern: str = RESULT) -> Records:
    """Reads the records and names those that are left out on stderr."""
    if not runs.is_dir():
        raise UserError(f"runs={runs} is not a folder. Give the folder that holds the runs, by default ./runs.")
    records = read_records(runs, pattern)
    say_left_out(records.left_out)
    return records


def matched(runs: Path, axis: str, at: float | None) -> str:
    """The runs of each protocol at one cost, for a terminal. `at`: in the unit of the axis; none: where most runs can
    be compared.
    """
    return (
        rendered(_read(runs), lambda records: _matched(records, axis, at))
        or f"No run below {runs} has a score and a cost."
    )


def _matched(records: Records, axis: str, at: float | None) -> str:
    name = next(key for key in AXES if key == axis)
    blocks = []
    for section in records.sections:
        for group in section.groups:
            if curves := curves_of(group, name, records.curves):
                table = matched_table(group, name, curves, common_budget(curves) if at is None else at * AXES[name][2])
                cells = pipe_table([[printable(cell) for cell in row] for row in table.cells], table.headers, "simple")
                blocks.append(f"{section.name}, {group.heading.lower()}\n{table.title}. {table.note}\n\n{cells}")
    return "\n\n".join(blocks)


def update_readme(results: Path, readme: Path, check: bool) -> str:
    """Writes the README's table, or refuses with a UserError if it is not what the records in `results` give."""
    try:
        old = readme.read_text(encoding="utf-8")
        new = with_table(old, rendered(_read(results, "*.json"), to_readme))
    except (OSError, ValueError) as error:
        raise UserError(f"{readme}: {error}") from error
    if new == old:
        return f"{readme}: the table is up to date"
    if check:
        raise UserError(f"{readme}: the table is stale. Run `pixlat leaderboard update_readme=true` and commit it.")
    write_whole(readme, new)
    return f"{readme}: table written"


def usage() -> str:
    """Examples and keys."""
    return help_text(str(__doc__), Keys)


def work(arguments: Sequence[str]) -> str:
    """Runs the action that the keys choose and returns the text to print. Leaves out damaged records."""
    keys, _ = parse(Keys, from_flags(Keys, arguments))
    require(keys.at is None or 0 < keys.at < math.inf, "at", keys.at, "must be positive")
    if keys.check or keys.update_readme:
        return update_readme(Path(keys.results).expanduser(), Path(keys.readme).expanduser(), keys.check)
    runs = Path(keys.runs).expanduser()
    if keys.matched is not None:
        one_of("matched", keys.matched, list(AXES))
        return matched(runs, keys.matched, keys.at)
    return "\n".join(str(path) for path in write(runs, Path(keys.out).expanduser() if keys.out else runs))


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(sys.argv[1:] if arguments is None else arguments, usage, work, alone=True)


if __name__ == "__main__":
    sys.exit(main())
