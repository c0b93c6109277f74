"""How each judge alone orders the rows of a table, and how far judges agree (Kendall's tau). Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

from pixlat.evaluation.board.columns import JUDGED
from pixlat.evaluation.board.entries import Entry, told_apart
from pixlat.evaluation.board.groups import Group
from pixlat.evaluation.board.standing import contact_with, judge_name
from pixlat.evaluation.board.styles import ABSENT, TextTable

MOST = 100  # the best entries that take part: the comparison takes their number squared

RANKS_NOTE = (
    "The place that each judge alone gives a row, by its own {score}. (met): the row has met this judge, "
    "whose opinion of it counts for nothing."
)
TAU_NOTE = (
    "Kendall's tau between two judges' orders: 1 where they agree on every pair of rows, 0 where they agree on half of "
    "them, -1 where on none. Of few rows it says little: chance alone orders 3 rows alike once in 6 times."
)


def judge_tables(group: Group) -> list[TextTable]:
    """The ranks by each judge and the judges' agreement; none unless two judges have scored two trained entries."""
    entries = [entry for entry in group.entries if not entry.untrained and "judges" in entry.row][:MOST]
    scores = {judge: by_place for judge, by_place in own_scores(entries).items() if len(by_place) > 1}
    if len(scores) < 2:
        return []
    met = [{each["judge"] for each in contact_with(entry.row)[0]} for entry in entries]
    return [ranks_table(entries, scores, met), tau_table(scores, met)]


def own_scores(entries: Sequence[Entry]) -> dict[str, dict[int, float]]:
    """Judge -> the place of an entry -> its score by this judge."""
    scores: dict[str, dict[int, float]] = {}
    for i, entry in enumerate(entries):
        for judge in entry.row["judges"]:
            if JUDGED in judge["metrics"]:
                scores.setdefault(judge["id"], {})[i] = judge["metrics"][JUDGED]["value"]
    return scores


def ranks_table(
    entries: Sequence[Entry], scores: Mapping[str, Mapping[int, float]], met: Sequence[set[str]]
) -> TextTable:
    """One line for each entry with its place by each judge."""
    places = {
        judge: {i: place for place, i in enumerate(sorted(own, key=lambda i: own[i]), start=1)}
        for judge, own in scores.items()
    }
    names = told_apart(entries, [entry.row["name"] for entry in entries])
    cells = [
        [name, *(_place(places[judge].get(i), judge in met[i]) for judge in scores)] for i, name in enumerate(names)
    ]
    return TextTable("Ranks by each judge", RANKS_NOTE.format(score=JUDGED), ["run", *map(judge_name, scores)], cells)


def _place(place: int | None, met: bool) -> str:
    return ABSENT if place is None else f"{place} (met)" if met else str(place)


def tau_table(scores: Mapping[str, Mapping[int, float]], met: Sequence[set[str]]) -> TextTable:
    """One line for each pair of judges: tau of the entries that have met neither, and of all."""
    cells = []
    for first, second in combinations(scores, 2):
        common = sorted(scores[first].keys() & scores[second].keys())
        clean = [i for i in common if not met[i] & {first, second}]
        values = [
            text
            for places in (clean, common)
            for text in (
                _tau([scores[first][i] for i in places], [scores[second][i] for i in places]),
                str(len(places)),
            )
        ]
        cells.append([f"{judge_name(first)} and {judge_name(second)}", *values])
    headers = ["judges", "tau, rows that met neither", "rows", "tau, all rows", "rows"]
    return TextTable("Agreement of the judges", TAU_NOTE, headers, cells)


def _tau(first: Sequence[float], second: Sequence[float]) -> str:
    tau = kendall_tau(first, second)
    return ABSENT if tau is None else f"{tau:+.2f}"


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two orders of the same items; None if one of them orders nothing."""
    pairs = [(_sign(first[i] - first[j]), _sign(second[i] - second[j])) for i, j in combinations(range(len(first)), 2)]
    ordered = [sum(1 for pair in pairs if pair[side]) for side in (0, 1)]
    return sum(a * b for a, b in pairs) / math.sqrt(ordered[0] * ordered[1]) if all(ordered) else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
