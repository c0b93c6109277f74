"""All records below a folder as tables and as one page.

    python evaluation/leaderboard.py [--runs runs] [--out DIR]            leaderboard.html, .md, .csv, .json and .tex
    python evaluation/leaderboard.py --matched train_macs [--at 0.01]     what the runs reach at equal cost,
                                                                          in the terminal
    python evaluation/leaderboard.py --update-readme                      the README's table, from the records
                                                                          in evaluation/results
    python evaluation/leaderboard.py --check                              fails if that table is stale

One table per protocol hash: numbers of different protocols never meet.
Guided and unguided rows stand apart. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pixlat.common.command_line import as_command
from pixlat.common.errors import UserError
from pixlat.common.files import write_whole
from pixlat.evaluation.board.groups import Records, read_records, sections
from pixlat.evaluation.board.matched import AXES, common_budget, curves_of, matched_table
from pixlat.evaluation.board.page import to_html
from pixlat.evaluation.board.published import from_record
from pixlat.evaluation.board.render import rendered, say_left_out, summary
from pixlat.evaluation.board.text import pipe_table, printable, to_latex, to_markdown, to_readme, with_table
from pixlat.evaluation.records.published import PublishedRow, read_published
from pixlat.evaluation.records.record import RESULT, to_csv

__all__ = ["main", "read_records", "render", "summary"]

RESULTS = Path(__file__).resolve().parent / "results"
README = RESULTS.parent.parent / "README.md"


def render(records: Records, published: Sequence[PublishedRow] = ()) -> dict[str, str]:
    """The contents of leaderboard.md, .csv, .json, .tex and .html, by suffix.

    CSV and JSON hold the records, unrounded, and nothing else.
    """
    rows = [*published, *(from_record(row) for row in records.rows if row["kind"] == "published")]
    return {
        "html": to_html(records, rows),
        "md": to_markdown(records, rows),
        "csv": to_csv(records.rows),
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
        raise UserError(f"cannot write into {out}: {error.strerror}. Choose a writable folder with --out.") from error


def _read(runs: Path, pattern: str = RESULT) -> Records:
    """The records; what is left out is named on stderr."""
    if not runs.is_dir():
        raise UserError(f"--runs={runs} is not a folder. Give the folder that holds the runs, by default ./runs.")
    records = read_records(runs, pattern)
    say_left_out(records.left_out)
    return records


def matched(runs: Path, axis: str, at: float | None) -> str:
    """The runs of each protocol at one cost, for a terminal. `at`: in the unit of the axis; none:
    where most runs can be compared.
    """
    return (
        rendered(_read(runs), lambda records: _matched(records, axis, at))
        or f"No run below {runs} has a score and a cost."
    )


def _matched(records: Records, axis: str, at: float | None) -> str:
    name = next(key for key in AXES if key == axis)
    blocks = []
    for section in sections(records.rows):
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
        raise UserError(
            f"{readme}: the table is stale. Run `python evaluation/leaderboard.py --update-readme` and commit it."
        )
    write_whole(readme, new)
    return f"{readme}: table written"


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files and says so; broken records are named on stderr and do not stop the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--out", type=Path, help="where the files go (default: the folder of runs)")
    parser.add_argument("--matched", choices=list(AXES), help="print what runs reach at equal cost; writes nothing")
    parser.add_argument("--at", type=positive, help="the cost for --matched, in PMACs, images, or GMACs an image")
    parser.add_argument("--check", action="store_true", help="fail if the README's table is stale; writes nothing")
    parser.add_argument("--update-readme", action="store_true", help="write the README's table")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the records of the README's table (default: evaluation/results)"
    )
    parser.add_argument("--readme", type=Path, default=README, help="the file with that table (default: README.md)")
    try:
        print(_answer(parser.parse_args(arguments)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def positive(text: str) -> float:
    """A number above zero."""
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError(text)
    return value


def _answer(options: argparse.Namespace) -> str:
    if options.check or options.update_readme:
        return update_readme(options.results, options.readme, options.check)
    if options.matched:
        return matched(options.runs, options.matched, options.at)
    return "\n".join(str(path) for path in write(options.runs, options.out or options.runs))


if __name__ == "__main__":
    sys.exit(main())
