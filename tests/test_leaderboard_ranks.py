"""Which records become one row, which rows one entry, who is ranked, and ranks as ranges."""

import json
import random
from statistics import fmean, stdev

import pytest
from records import EXTRACTOR, JUDGES, fields, jackknifed, judged, met, metric, parent_stage, record
from scipy import stats

from pixlat.evaluation.board.columns import columns_of, marks
from pixlat.evaluation.board.entries import distinct, entries_of, shared_name, told_apart
from pixlat.evaluation.board.groups import Records, group
from pixlat.evaluation.board.judges import judge_tables, kendall_tau
from pixlat.evaluation.board.notes import budget_notes, earlier_stages, training_macs
from pixlat.evaluation.board.ranks import NO_ERROR, ONE_TRAINING, UNPAIRED, range_text, ranges_of, ranking
from pixlat.evaluation.board.ranks import difference as compared
from pixlat.evaluation.board.standing import contact_text, reason_not_ranked
from pixlat.evaluation.board.text import to_latex, to_markdown, to_terminal
from pixlat.evaluation.leaderboard import render
from pixlat.evaluation.metrics.spread import (
    difference,
    mean_of_trainings,
    over_seeds,
    trained_difference,
    unpaired_difference,
)
from pixlat.evaluation.metrics.student import central_probability, t_quantile
from pixlat.evaluation.records.record import build_record

LITE0 = {"name": "embedded", "params": 5, "sha256": EXTRACTOR.sha256, "used_at": "train"}


def names(entries):
    return [entry.row["name"] for entry in entries]


def shown(table, key):
    """The texts of one column of a group."""
    column = next(column for column in columns_of(table) if column.key == key)
    return [column.read(entry).text for entry in table.entries]


# -- Student's t -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 19, 20, 60, 61])
def test_students_quantiles_are_those_of_scipy(df):
    assert t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), abs=1e-8)
    for t in (0.0, 0.5, 3.0):
        assert central_probability(t, df) == pytest.approx(1 - 2 * stats.t.sf(t, df), abs=1e-12)
    with pytest.raises(ValueError, match="at least two values"):
        t_quantile(0)


# -- rows and entries --------------------------------------------------------------------------------------------------


def test_evaluations_of_one_checkpoint_are_one_row():
    """The one with the most sampling seeds, then the newest; another guidance is another row, and counts as tried."""
    one = {"checkpoint": record("run")["checkpoint"]}
    first = record("first", 90.0, **one)
    later = record("later", 80.0, created_utc="2026-11-23T00:00:00+00:00", **one)
    more = record("more", 85.0, seeds={"train": 3, "sample": [0, 1, 2]}, **one)
    other = record("other", 70.0, sampling={**first["sampling"], "guidance_scale": 9.0}, **one)
    assert [(row["name"], hidden) for row, hidden in distinct([first, later])] == [("later", 1)]
    entries = entries_of([first, later, more, other])
    assert {(entry.row["name"], entry.hidden, entry.tried) for entry in entries} == {("more", 2, 2), ("other", 0, 2)}
    made = to_markdown(Records([first, later, more, other], []))
    assert "2 further evaluations of the same checkpoints with the same settings are not shown" in made
    assert "first" not in made and "later" not in made
    unnamed = [record(name, checkpoint={**first["checkpoint"], "sha256": None}) for name in "ab"]
    assert len(distinct(unnamed)) == 2


def test_trainings_that_differ_only_in_their_seed_are_one_entry():
    rows = [judged(f"jit-toy-demo-seed{seed}-abcde{seed}", ratio, seed) for seed, ratio in enumerate((2.5, 2.7, 2.3))]
    (entry,) = entries_of(rows[::-1])
    assert entry.row["name"] == "jit-toy-demo" and list(entry.by_seed) == [0, 1, 2]
    value = entry.metric("fd_ratio")
    spread = stdev((2.5, 2.7, 2.3)) / 3**0.5
    assert value["value"] == pytest.approx(2.5) and value["se"] == pytest.approx((spread**2 + 0.03**2) ** 0.5)
    (first, *_) = entry.row["judges"]
    assert first["metrics"]["fd_ratio"]["value"] == pytest.approx(2.5) and first["metrics"]["fd_ratio"]["values"]
    table = group(rows, "Unguided")
    assert shown(table, "seed") == ["0, 1, 2"] and shown(table, "each_seed") == ["2.50, 2.70, 2.30"]
    assert shared_name(["a-seed0", "b-seed1"]) == "a-seed0"


def test_other_settings_and_repeated_seeds_are_never_averaged():
    x, v = judged("x", 2.5), judged("v", 2.0, seed=1, settings={"model.prediction": "v"})
    assert sorted(names(entries_of([x, v]))) == ["v", "x"]
    again = judged("again", 3.0, created_utc="2026-11-24T00:00:00+00:00")
    assert sorted(names(entries_of([x, again, judged("x-seed1", 2.6, seed=1)]))) == ["again", "x"]
    assert (
        len(
            entries_of(
                [x, judged("earlier", 4.0, seed=1, checkpoint={**x["checkpoint"], "sha256": "ab" * 32, "step": 10})]
            )
        )
        == 2
    )


def test_records_without_a_configuration_are_grouped_by_what_they_say():
    def old(name, seed, **changes):
        system = {**fields()["system"], **changes}
        return record(name, seeds={"train": seed, "sample": [0]}, system=system)

    assert len(entries_of([old("a", 0), old("b", 1)])) == 1
    assert len(entries_of([old("a", 0), old("b", 1, prediction="v")])) == 2
    finished = {key: fields()[key] for key in ("name", "created_utc", "system", "data", "protocol", "metrics", "notes")}
    pair = [build_record({**finished, "name": name, "kind": "evaluated"}) for name in "ab"]
    assert len(entries_of(pair)) == 2
    mixed = judged("j", 2.0, protocol=old("a", 0)["protocol"], metrics=old("a", 0)["metrics"])
    assert "records do not name their settings" in to_markdown(Records([old("a", 0), mixed], []))


def test_settings_that_differ_have_columns_and_tell_entries_of_one_method_apart():
    base = fields()["sampling"]
    rows = [
        judged("x", 2.5),
        judged("v", 2.6, settings={"model.prediction": "v", "train.lr": 0.1}),
        judged("guided more", 2.7, sampling={**base, "guidance": "cfg", "guidance_scale": 4.0}),
        judged("other", 2.8, method="sit", sampling={**base, "steps": 7}),
    ]
    table = group(rows, "Unguided")
    columns = {column.label: column for column in columns_of(table) if column.key.startswith("setting:")}
    assert set(columns) == {"guidance", "interval", "steps", "model.prediction", "train.lr"}
    assert columns["guidance"].essential and columns["model.prediction"].essential and not columns["steps"].essential
    assert shown(table, "setting:guidance") == ["none", "none", "cfg 4", "none"]
    assert shown(table, "setting:model.prediction") == ["preset's", "v", "preset's", "preset's"]
    for made in (to_markdown, to_latex, lambda records: to_terminal(records, rows[0]["protocol_hash"])):
        assert "model.prediction" in made(Records(rows, []))
    alike = entries_of(rows[:2])
    assert sorted(told_apart(alike, ["jit", "jit"])) == ["jit", "jit, model.prediction=v, train.lr=0.1"]
    assert told_apart(entries_of([judged("a", 1.0), judged("b", 2.0)]), ["jit", "jit"]) == ["jit (a)", "jit (b)"]


# -- differences and ranges --------------------------------------------------------------------------------------------


def test_differences_of_several_trainings_are_those_of_equal_seeds():
    shift = {0: 0.30, 1: 0.34, 2: 0.32}
    first = {seed: judged(f"a{seed}", 3.0 + seed, seed) for seed in (0, 1, 2, 5)}
    second = {seed: judged(f"b{seed}", 3.0 + seed + shift[seed], seed, method="sit") for seed in shift}
    found = trained_difference("fd_ratio", first, second)
    values = [-each for each in shift.values()]
    assert (found.value_bc, found.seeds, found.df) == (pytest.approx(fmean(values)), 3, 2)
    assert found.se == pytest.approx(stdev(values) / 3**0.5)
    assert found.margin == pytest.approx(stats.t.ppf(0.975, 2) * found.se) and found.separated
    one = trained_difference("fd_ratio", first, {0: second[0]})
    assert one == difference("fd_ratio", first[0]["metrics"]["fd_ratio"], second[0]["metrics"]["fd_ratio"])
    assert one.df == 19 and one.value_bc == one.value
    assert trained_difference("fd_ratio", {5: first[5]}, second) is None
    assert trained_difference("precision", {0: first[0]}, {0: second[0]}) is None  # no jackknife values


def test_without_pairs_the_two_errors_decide_and_the_shared_part_cancels():
    first, second = metric(2.0, se=0.5, se_real=0.4), metric(3.0, se=0.5, se_real=0.4)
    found = unpaired_difference("fd_ratio", [first], [second])
    assert found.se == pytest.approx(2**0.5 * 0.3) and found.df == 19 and found.seeds == 0
    several = unpaired_difference("fd_ratio", [first, metric(2.2), metric(2.1)], [second])
    assert several.df == 2 and several.value == pytest.approx(2.1 - 3.0)
    both = over_seeds([{"fd": {**first, "value": 1.0}}, {"fd": {**first, "value": 2.0}}])["fd"]
    assert both["se"] == pytest.approx((0.3**2 / 2 + 0.4**2) ** 0.5)
    assert mean_of_trainings([metric(1.0, value_bc=0.5), metric(3.0)])["value_bc"] is None


def test_a_rank_counts_who_is_better_and_who_is_worse():
    alike = [judged(f"a{seed}", 2.50 + 0.1 * seed, seed) for seed in (0, 1, 2)]
    close = [judged(f"b{seed}", (2.54, 2.60, 2.72)[seed], seed, method="b") for seed in (0, 1, 2)]
    far = [judged(f"c{seed}", 4.0 + 0.1 * seed, seed, method="c") for seed in (0, 1, 2)]
    table = group([*far, *close, *alike], "Unguided")
    assert table.rank_texts == ["1-2", "1-2", "3"] and table.leaders == {0, 1}
    assert ONE_TRAINING not in table.notes and UNPAIRED not in table.notes
    single = group([judged("a", 2.0), judged("b", 2.001, method="b")], "Unguided")
    assert single.rank_texts == ["1", "2"] and ONE_TRAINING in single.notes  # paired: the noise cancels
    apart = group([judged("a", 2.0), judged("b", 2.001, seed=4, method="b")], "Unguided")
    assert apart.rank_texts == ["1-2", "1-2"] and UNPAIRED in apart.notes
    bare = [record(name, metrics={"fid": metric(value)}) for name, value in (("a", 1.0), ("b", 2.0), ("c", 2.0))]
    plain = group(bare, "Unguided")
    assert plain.rank_texts == ["1", "2-3", "2-3"] and NO_ERROR in plain.notes
    assert group(bare[:1], "Unguided").notes == [] and range_text((1, 3)) == "1-3"


def test_ranges_of_many_are_those_of_all_pairs():
    """The shortcuts for pairs that are surely apart, and for single trainings, change nothing."""
    draw = random.Random(0)
    rows = []
    for i in range(60):
        noise = [draw.gauss(0, 1) for _ in range(20)]
        value = draw.uniform(2, 4)
        rows.append(
            judged(f"r{i}", value, seed=i % 7, settings={"i": i // 2}, metrics={"fd_ratio": jackknifed(value, noise)})
        )
    entries = entries_of(rows)
    assert 30 <= len(entries) < 60
    plain = [[1, len(entries)] for _ in entries]
    for i, first in enumerate(entries):
        for j, second in enumerate(entries):
            found = compared(first, second, "fd_ratio")
            plain[i][0] += i != j and found.separated and found.value_bc > 0
            plain[i][1] -= i != j and found.separated and found.value_bc < 0
    assert [list(each) for each in ranking(entries, "fd_ratio").ranges] == plain
    assert ranges_of([], [], lambda i, j: 0.0) == []


# -- contact -----------------------------------------------------------------------------------------------------------


def test_no_rank_across_contact():
    clean = judged("clean", 3.0)
    taught = judged("taught", 1.5, method="t", contact=[met("plain", "teacher")], judged_by=["residual", "vit"])
    encoder = judged("encoder", 2.0, method="e", contact=[met("embedded-v1", "encoder")])  # this judge ranks nothing
    table = group([clean, taught, encoder], "Unguided")
    assert names(table.ranked) == ["encoder", "clean"] and [(e.row["name"], r) for e, r in table.unranked] == [
        ("taught", "met plain")
    ]
    assert table.rank_texts == ["1", "2", "-"]
    assert shown(table, "contact") == ["EfficientNet-Lite0: encoder", "none", "plain: teacher"]
    assert shown(table, "reason") == ["-", "-", "met plain"]
    records = Records([clean, taught, encoder], [])
    for made in (to_markdown(records), to_latex(records), to_terminal(records, clean["protocol_hash"])):
        assert "judges met" in made and "plain: teacher" in made and "met plain" in made


def test_contact_of_earlier_records_is_computed_from_digests():
    """Directly, or through an earlier stage and that stage's own stages; another network of the name is no contact."""
    inner = {**parent_stage("k", "inner", "m"), "macs_total": 1, "pretrained_components": [{**LITE0, "role": "loss"}]}
    outer = {**parent_stage("t", "autoencoder (in the package)", "vae"), "macs_total": 2, "parents": [inner]}
    direct = record("direct", 50.0, pretrained_components=[{**LITE0, "role": "encoder"}])
    met_outside = {**outer, "pretrained_components": [{**LITE0, "role": "loss"}]}
    through = record("through", 60.0, pretrained_components=[], parents=[met_outside])
    deep = record("deep", 70.0, pretrained_components=[], parents=[outer])
    other = record("other", 90.0, pretrained_components=[{**LITE0, "role": "encoder", "sha256": "cd" * 32}])
    assert contact_text(direct) == "EfficientNet-Lite0: encoder"
    assert contact_text(through).startswith("EfficientNet-Lite0: loss of autoencoder")
    assert "loss of " in contact_text(deep) and contact_text(other) == "none"
    table = group([direct, through, deep, other], "Unguided")
    assert names(table.ranked) == ["other"] and {reason for _, reason in table.unranked} == {"met EfficientNet-Lite0"}


def test_copies_unknown_contact_and_other_judges_have_no_rank():
    copy = judged("copy", 0.9, method="c", copies=0.61)
    bound = judged("bound", 0.9, method="b", copies=0.06)  # within its error of what unseen real images have
    assert reason_not_ranked(entries_of([copy])[0], "fd_ratio") == "61 % of its images are copies of training images"
    assert reason_not_ranked(entries_of([bound])[0], "fd_ratio") == ""
    some = judged("some", 1.0, judged_by=["plain", "vit"])
    assert reason_not_ranked(entries_of([some])[0], "fd_ratio") == "judged by plain and vit only"
    nameless = {**LITE0, "role": "x", "sha256": None}
    partly = record("partly", pretrained_components=[{**LITE0, "role": "encoder"}, nameless])
    assert contact_text(partly) == "EfficientNet-Lite0: encoder"
    assert reason_not_ranked(entries_of([partly])[0], "fd_embedded") == "met EfficientNet-Lite0"
    open_contact = group([record("open", pretrained_components=[nameless])], "Unguided")
    assert shown(open_contact, "contact") == ["not known"]
    assert "Of 1 of 1 ranked rows it is not known" in open_contact.notes[-1]
    unknown = {key: value for key, value in copy.items() if key not in ("contact", "pretrained_components")}
    assert contact_text(unknown) == "not known"
    assert reason_not_ranked(entries_of([unknown])[0], "fd_ratio") == "not recorded which judges it met"
    unscored = record("unscored", metrics={})
    assert reason_not_ranked(entries_of([unscored])[0], "fid") == "not evaluated"
    assert reason_not_ranked(entries_of([some])[0], "fid") == "no fid"


# -- marks, real images, judges ----------------------------------------------------------------------------------------


def test_marks_praise_neither_collapse_nor_networks_that_saw_nothing():
    collapsed = {"precision": metric(1.0), "density": metric(2.0), "is": metric(99.0), "psnr": metric(30.0)}
    untrained = {**fields()["train"], "images_seen": 0}
    rows = [
        record("a", metrics={"fd_embedded": metric(90.0, se=1.0), "precision": metric(0.2), "psnr": metric(20.0)}),
        record("b", metrics={"fd_embedded": metric(99.0, se=1.0), **collapsed}),
        record("untrained", metrics={"fd_embedded": metric(1.0, se=1.0), "psnr": metric(99.0)}, train=untrained),
    ]
    table = group(rows, "Unguided")
    columns = columns_of(table)
    marked = {column.key: chosen for column, chosen in zip(columns, marks(table, columns), strict=True) if chosen}
    assert names(table.entries) == ["untrained", "a", "b"] and marked == {"psnr": {2}}
    trained = group(rows[:2], "Unguided")
    assert trained.leaders == {0}


def test_real_images_stand_apart_in_every_table():
    rows = [judged("a", 2.5), judged("b", 3.5, method="b")]
    table = group(rows, "Unguided")
    assert table.real.metric("fd_ratio")["value"] == 1.0 and table.real.metric("copies")["value"] == 0.05
    records = Records(rows, [])
    lines = [line for line in to_markdown(records).splitlines() if "held-out real images" in line and line[0] == "|"]
    assert len(lines) == 1 and lines[0].startswith("|        |") and "1.00 ±" in lines[0] and "5.0 ± 1.0" in lines[0]
    tex = to_latex(records)
    assert tex.index("\\midrule\n & held-{}out real images") > tex.index("b & b demo")
    assert "held-out real images" in to_terminal(records, rows[0]["protocol_hash"])
    assert group([record(metrics={"fid": metric(1.0)})], "Unguided").real is None


def test_each_judge_has_its_values_its_order_and_its_agreement_with_others():
    rows = [
        judged("a", 2.0, method="a", own=(0, 0, 0, 2)),
        judged("b", 3.0, method="b", own=(0, 0, -2, 3)),
        judged("c", 4.0, method="c", own=(0, 0, 0, -3.5), contact=[met("embedded-v1", "encoder")]),
    ]
    table = group(rows, "Unguided")
    assert shown(table, "judge:vit") == ["2.00 ± 0.06", "1.00 ± 0.06", "4.00 ± 0.06"]
    ranks, agreement = judge_tables(table)
    assert ranks.headers == ["run", *JUDGES, "EfficientNet-Lite0"]
    assert ranks.cells == [["a", "1", "1", "2", "2"], ["b", "2", "2", "1", "3"], ["c", "3", "3", "3", "1 (met)"]]
    found = {line[0]: line[1:] for line in agreement.cells}
    assert found["plain and residual"] == ["+1.00", "3", "+1.00", "3"]
    assert found["plain and EfficientNet-Lite0"] == ["+1.00", "2", "-0.33", "3"]
    for made in (to_markdown(Records(rows, [])), to_terminal(Records(rows, []), rows[0]["protocol_hash"])):
        assert "1 (met)" in made and "-0.33" in made
    assert judge_tables(group([record()], "Unguided")) == []


def test_tau_is_that_of_scipy():
    draw = random.Random(0)
    for _ in range(20):
        first, second = ([draw.randrange(6) for _ in range(9)] for _ in range(2))
        assert kendall_tau(first, second) == pytest.approx(stats.kendalltau(first, second).statistic)
    assert kendall_tau([1.0, 1.0], [1.0, 2.0]) is None and kendall_tau([], []) is None


# -- costs -------------------------------------------------------------------------------------------------------------


def test_stages_of_stages_count_once():
    inner = {**parent_stage("k", "inner", "m"), "macs_total": 5, "checkpoint_sha256": "ab" * 32}
    outer = {**parent_stage("t", "outer", "m"), "macs_total": 7, "parents": [inner]}
    row = record(parents=[outer, inner])
    assert [stage["name"] for stage in earlier_stages(row)] == ["outer", "inner"]
    assert training_macs(row) == 2 * 10**18 + 12 and budget_notes([row]) == []


def test_json_keeps_every_row():
    rows = [judged(f"jit-seed{seed}", 2.0, seed) for seed in (0, 1)]
    made = render(Records(rows, []))
    assert [row["name"] for row in json.loads(made["json"])] == ["jit-seed0", "jit-seed1"]
    assert made["csv"].splitlines()[0].endswith("judges_met")


def test_data_without_held_out_images_are_ranked_by_the_distance():
    """There is no ratio then; a single judge's distance in its own units ranks, and the note says so."""
    rows = [
        judged(name, 1.0, method=name, metrics={"fd": metric(value, se=1.0)})
        for name, value in (("a", 50.0), ("b", 90.0))
    ]
    bare = [{key: value for key, value in row.items() if key not in ("real", "judges")} for row in rows]
    table = group(bare, "Unguided")
    assert table.primary == "fd" and table.rank_texts == ["1", "2"] and table.real is None
    page = to_markdown(Records(bare, []))
    assert "Without held-out images there is no ratio" in page and "fd_ratio" not in page
    with_ratio = to_markdown(Records([judged("a", 2.0)], []))
    assert "Judges: plain, residual, vit. EfficientNet-Lite0: shown, ranks nothing." in with_ratio
