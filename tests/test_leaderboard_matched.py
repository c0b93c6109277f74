"""Runs at equal cost, and the curves that make it possible."""

import json
import math

import pytest
from records import judged, metric, parent_stage, record

from pixlat.common.errors import UserError
from pixlat.evaluation import leaderboard
from pixlat.evaluation.board.groups import group, read_records
from pixlat.evaluation.board.matched import (
    Curve,
    Point,
    at,
    common_budget,
    curves_of,
    matched_table,
    matched_tables,
    point_ranges,
)
from pixlat.evaluation.records.curve import read_curve
from pixlat.evaluation.records.record import write_record

HASH = record()["protocol_hash"]


def point(images, value, macs=None, se=1.0, protocol_hash=HASH):
    return {
        "images": images,
        "macs_train": macs or images * 10**12,
        "protocol_hash": protocol_hash,
        "metrics": {"fd_embedded": metric(value, se=se)},
    }


def run(name, value, images, **changes):
    """A record whose training cost is 10^12 MACs an image."""
    row = record(name, value, **changes)
    return record(
        name, value, **{"train": {**row["train"], "images_seen": images, "macs_total": images * 10**12}, **changes}
    )


def matched(rows, curves, axis="images", budget=None):
    made = group(rows, "Unguided")
    found = curves_of(made, axis, curves)
    return matched_table(made, axis, found, budget or common_budget(found))


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_interpolation_is_linear_in_the_logarithm_of_the_cost():
    curve = Curve("a", [Point(100, 80.0, 2.0), Point(10_000, 40.0, 6.0)])
    middle = at(curve, 1000)
    assert (middle.value, middle.error) == pytest.approx((60.0, 4.0), rel=1e-12)
    assert at(curve, 200).value == pytest.approx(80 - 40 * math.log(2) / math.log(100), rel=1e-12)
    assert at(curve, 10_050) == curve.points[1]  # within a hundredth: measured
    assert at(curve, 99) is None or at(curve, 99) == curve.points[0]
    assert at(curve, 90) is None and at(curve, 11_000) is None and at(curve, None) is None
    assert at(Curve("b", [Point(1, 2.0), Point(4, 1.0, 1.0)]), 2) == Point(2, 1.5, None)


def test_the_budget_is_where_most_runs_can_be_compared():
    def curve(*costs):
        return Curve("x", [Point(cost, 1.0) for cost in costs])

    assert common_budget([curve(10, 100), curve(20, 300), curve(50, 200)]) == 100
    assert common_budget([curve(1), curve(10, 100), curve(20, 300)]) == 100  # a tiny run does not drag the others down
    assert common_budget([curve(5), curve(5.02), curve(50)]) == 5.02
    assert common_budget([curve(5), curve(50)]) is None
    assert common_budget([]) is None


def test_a_thousand_runs_are_fast():
    curves = [Curve(str(i), [Point(i + 1, 1.0), Point(2 * i + 2, 1.0)]) for i in range(10_000)]
    assert common_budget(curves) == 9900  # the first run that ends where the last begins, but for a hundredth


# -- tables ------------------------------------------------------------------------------------------------------------


def test_runs_are_ranked_at_a_common_number_of_images():
    long, short, other = run("long", 50.0, 100_000), run("short", 90.0, 10_000), run("other", 10.0, 500)
    table = matched([long, short, other], {long["row_id"]: [point(1000, 200.0), point(20_000, 70.0)]})
    cells = {row[1]: row for row in table.cells}
    assert [row[:2] for row in table.cells] == [["1", "short"], ["2", "long"], ["-", "other"]]
    assert cells["short"][2:4] == ["90.00 ± 2.50", "measured"]
    assert cells["long"][2] == f"{200 - 130 * math.log(10) / math.log(20):.2f} ± 1.00"
    assert cells["long"][3:] == ["between 1000 and 2e+04", "50.00 ± 2.50", "1e+05"]
    assert cells["other"][3] == "not trained or sampled that far"
    assert "At 1e+04 images" in table.note


def test_curves_of_several_judges_are_matched_by_their_ratio():
    """Rows without a rank are listed with the reason, below those that have one."""
    rows = [
        judged("long", 2.0, train={**record()["train"], "images_seen": 4000}),
        judged("short", 3.0, method="s", train={**record()["train"], "images_seen": 1000}),
        judged("copies", 1.0, method="c", copies=0.9, train={**record()["train"], "images_seen": 1000}),
    ]
    hashed = rows[0]["protocol_hash"]
    early = {"images": 1000, "macs_train": 10, "protocol_hash": hashed, "metrics": {"fd_ratio": metric(5.0, se=0.1)}}
    table = matched(rows, {rows[0]["row_id"]: [early]})
    assert [line[:3] for line in table.cells] == [
        ["1", "short", "3.00 ± 0.06"],
        ["2", "long", "5.00 ± 0.10"],
        ["-", "copies", "1.00 ± 0.06"],
    ]
    assert table.headers[2] == "fd_ratio ↓"
    assert table.cells[2][3] == "measured; not ranked: 90 % of its images are copies of training images"


def test_ranks_at_equal_cost_are_ranges():
    points = [Point(1, 1.0, 0.1), Point(1, 1.2, 0.1), Point(1, 2.0, 0.1), Point(1, 2.0, None)]
    assert point_ranges(points) == [(1, 2), (1, 2), (3, 4), (3, 4)]


def test_without_curves_only_the_final_points_are_listed():
    table = matched([run("a", 50.0, 1000), run("b", 40.0, 5000)], {})
    assert "only their final points" in table.note
    assert [row[:4] for row in table.cells] == [
        ["-", "b", "-", "final point only"],
        ["-", "a", "-", "final point only"],
    ]
    # the ranked table says it all
    assert matched_tables(group([run("a", 50.0, 1000), run("b", 40.0, 1000)], "Unguided"), {}) == []


def test_earlier_stages_are_part_of_the_training_cost():
    parent = parent_stage("k", "t", "m")
    row = run("chained", 50.0, 1000, parents=[{**parent, "macs_total": 7 * 10**15}])
    (curve,) = curves_of(group([row], "Unguided"), "train_macs", {row["row_id"]: [point(100, 90.0)]})
    assert [each.cost for each in curve.points] == [7.1e15, 8e15]
    unknown = run("unknown", 50.0, 1000, parents=[{**parent, "macs_total": None}])
    assert curves_of(group([unknown], "Unguided"), "train_macs", {}) == []


def test_points_of_another_protocol_are_not_compared():
    row = run("a", 50.0, 1000)
    (curve,) = curves_of(
        group([row], "Unguided"), "images", {row["row_id"]: [point(10, 1.0, protocol_hash="other"), point(100, 90.0)]}
    )
    assert [each.cost for each in curve.points] == [100, 1000]


def test_one_checkpoint_sampled_in_several_step_counts_is_a_curve():
    compute = record()["compute"]
    sampling, one = record()["sampling"], {"checkpoint": record()["checkpoint"]}
    rows = [
        record(
            f"s{n}",
            100.0 / n,
            compute={**compute, "macs_per_image": n * 10**9},
            sampling={**sampling, "steps": n},
            **one,
        )
        for n in (1, 2, 4)
    ]
    rows.append(record("guided more", 3.0, sampling={**sampling, "guidance_scale": 9.0}, **one))
    curves = curves_of(group(rows, "Unguided"), "sampling_macs", {})
    assert sorted([each.cost / 1e9 for each in curve.points] for curve in curves) == [[1, 2, 4], [187]]


# -- files -------------------------------------------------------------------------------------------------------------


def write_run(folder, row, lines=""):
    folder.mkdir(parents=True)
    write_record(row, folder / "result.json")
    if lines:
        (folder / "curve.jsonl").write_text(lines)


def test_curves_are_read_beside_their_records(tmp_path, capsys):
    write_run(
        tmp_path / "a",
        run("a", 50.0, 10_000),
        "".join(json.dumps(point(n, 100.0)) + "\n" for n in (100, 1000)) + '{"cut',
    )
    write_run(tmp_path / "b", run("b", 70.0, 1000))
    records = read_records(tmp_path)
    assert sorted(len(curve) for curve in records.curves.values()) == [0, 2]
    assert leaderboard.main(["--runs", str(tmp_path), "--matched", "images"]) == 0
    shown = capsys.readouterr().out
    assert "At equal images seen. At 1000 images." in shown and "measured" in shown
    assert leaderboard.main(["--runs", str(tmp_path), "--matched", "train_macs", "--at", "0.5"]) == 0
    assert "At 0.5 PMACs" in capsys.readouterr().out
    assert not list(tmp_path.glob("leaderboard.*"))


GOOD = point(1, 1.0)
BROKEN = [
    {},
    [],
    1,
    {**GOOD, "more": 1},
    {**GOOD, "images": -1},
    {**GOOD, "images": True},
    {**GOOD, "metrics": {"fd": 3}},
    {**GOOD, "metrics": []},
]


@pytest.mark.parametrize("line", ["nonsense", json.dumps(GOOD).replace("1.0", "NaN"), *map(json.dumps, BROKEN)])
def test_a_broken_curve_is_named_and_its_run_stays(tmp_path, line):
    write_run(tmp_path / "a", run("a", 50.0, 1000), json.dumps(point(1, 1.0)) + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"curve\.jsonl"):
        read_curve(tmp_path / "a" / "curve.jsonl")
    records = read_records(tmp_path)
    assert [row["name"] for row in records.rows] == ["a"]
    assert len(records.left_out) == 1 and "curve.jsonl" in records.left_out[0]


def test_an_impossible_budget_is_refused(tmp_path, capsys):
    for text in ("0", "-1", "nan", "inf", "x"):
        assert leaderboard.main(["--runs", str(tmp_path), "--matched", "images", "--at", text]) == 2
        assert capsys.readouterr().err.startswith(f"error: at={text}" if text == "x" else "error: at=")
    assert leaderboard.main(["--runs", str(tmp_path), "--matched", "images"]) == 0
    assert "No run" in capsys.readouterr().out
