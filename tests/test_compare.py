"""evaluation/compare.py: gains of methods over the first one, seed by seed, from records alone."""

import numpy as np
import pytest
from records import fields, judged, met, metric
from scipy import stats

from pixlat.common.errors import UserError
from pixlat.evaluation.board.entries import Entry
from pixlat.evaluation.board.gains import entries, gains, notes, verdict
from pixlat.evaluation.compare import main
from pixlat.evaluation.metrics.spread import Difference, paired_differences
from pixlat.evaluation.records.record import build_record, write_record

GROUPS = 10


def run(method, seed, fd, noise, images=6900, **changes):
    """A record whose jackknife values are its score plus `noise` (GROUPS,), which runs of one sampling seed share."""
    more = fields(method, fd, **changes)
    more["system"] |= {"method": method}
    more["seeds"] = {"train": seed, "sample": [0]}
    more["train"] |= {"images_seen": images}
    more["metrics"] = {
        "fd_embedded": metric(fd, value_bc=fd, se=9.0, regularised=False, left_out=[float(fd + x) for x in noise]),
        "is": metric(14.0),
    }
    return build_record(more)


def noise(seed=0, size=1.0):
    return size * np.random.Generator(np.random.PCG64(seed)).normal(size=GROUPS)


def test_one_pair_is_the_paired_jackknife():
    sit, repa = run("sit", 0, 100.0, noise()), run("repa", 0, 90.0, noise() + noise(1, 0.1))
    (gain,) = gains(Entry((repa,)), Entry((sit,)))
    (expected,) = paired_differences(repa, sit)
    assert gain == expected and (gain.metric, gain.seeds, gain.df) == ("fd_embedded", 1, GROUPS - 1)
    assert gain.value_bc == pytest.approx(-10, abs=2) and gain.deviations < -3
    assert gain.margin == pytest.approx(stats.t.ppf(0.975, GROUPS - 1) * gain.se)


def test_several_training_seeds_are_paired_and_their_spread_is_the_error():
    shift = {0: -10.0, 1: -14.0, 2: -12.0}
    sit = Entry(tuple(run("sit", seed, 100.0 + 20 * seed, noise()) for seed in (0, 1, 2, 3)))
    repa = Entry(tuple(run("repa", seed, 100.0 + 20 * seed + shift[seed], noise()) for seed in shift))
    gain, others = gains(repa, sit)
    # what differs between seeds, 20, cancels
    assert (gain.value_bc, gain.se, gain.seeds) == (pytest.approx(-12), pytest.approx(2 / 3**0.5), 3)
    assert gain.margin == pytest.approx(4.302653 * gain.se, rel=1e-6) and verdict(gain) == "better"
    assert others.metric == "is" and verdict(others) == "open"
    with pytest.raises(UserError, match="no seed in common"):
        gains(Entry((run("repa", 7, 1.0, noise()),)), sit)


def test_two_seeds_are_few():
    """A difference of three standard errors says nothing if two seeds measured it."""
    sit = Entry(tuple(run("sit", seed, 100.0, noise()) for seed in (0, 1)))
    repa = Entry(tuple(run("repa", seed, 100.0 - 2 * (1 + seed), noise()) for seed in (0, 1)))
    gain = gains(repa, sit)[0]
    assert gain.deviations == pytest.approx(-3) and verdict(gain) == "open"


def test_an_error_of_nothing_is_no_division_by_zero():
    (found,) = paired_differences(run("a", 0, 1.0, noise()), run("b", 0, 1.0, noise()))
    assert found.deviations == 0.0 and verdict(found) == "open"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("fd_ratio", -1.0, "better"),
        ("fd_ratio", 1.0, "worse"),
        ("recall", 1.0, "better"),
        ("precision", 1.0, "higher"),
        ("is", -1.0, "lower"),
        ("memorisation", -1.0, "lower"),
        ("fid", 0.1, "open"),
    ],
)
def test_the_verdict_follows_the_interval_and_praises_no_collapse(name, value, expected):
    assert verdict(Difference(name, value, value, 0.2)) == expected


def folders(tmp_path, *records):
    for number, record in enumerate(records):
        (tmp_path / str(number)).mkdir()
        write_record(record, tmp_path / str(number) / "result.json")
    return [str(tmp_path / str(number)) for number in range(len(records))]


def told(arguments, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["compare.py", *arguments])
    code = main()
    return code, "".join(capsys.readouterr())


def test_one_command_tells_the_gains_of_two_methods(tmp_path, capsys, monkeypatch):
    runs = folders(
        tmp_path,
        run("sit", 0, 100.0, noise()),
        run("repa", 0, 90.0, noise()),
        run("reg", 0, 85.0, noise() + noise(2, 0.05)),
    )
    code, text = told(runs, capsys, monkeypatch)
    table = text.split("\n\n")[1]
    rows = {line.split()[0]: line for line in table.splitlines() if line.startswith(("sit", "repa", "reg"))}
    assert code == 0 and "fd_embedded ↓" in text and "minus sit demo" in text
    assert "-10.00 ± 0.00" in rows["repa"] and "-15." in rows["reg"] and rows["sit"].rstrip().endswith("100.00 ± 9.00")
    assert "One training seed" in text and "Not one budget" not in text and "6,900" in text
    assert "better" in rows["repa"] and "-10.00 to -10.00" in rows["repa"] and "do not name their settings" in text


def test_earlier_stages_and_batches_keep_a_comparison_from_being_of_one_budget(tmp_path, capsys, monkeypatch):
    """As many images and MACs of its own, and a stage before: the sentence is about the whole cost."""
    parent = {
        "key": "t",
        "name": "t",
        "method": "m",
        "row_id": None,
        "checkpoint_sha256": None,
        "images_seen": 5,
        "device_seconds": 1.0,
        "macs_total": 10**18,
    }
    sit, repa = run("sit", 0, 100.0, noise()), run("repa", 0, 90.0, noise(), parents=[parent])
    text = told(folders(tmp_path, sit, repa), capsys, monkeypatch)[1]
    assert "3000 (of it m 1000)" in text
    assert (
        "Not one cost: training took from 2000 to 3000 PMACs, earlier stages included." in text
        and "Not one budget" not in text
        and "batch" not in text
    )
    changed = build_record(
        {**{key: value for key, value in sit.items() if key != "row_id"}, "train": sit["train"] | {"batch": 8}}
    )
    assert "The runs differ in their batch: 8, 64 images a step." in notes(
        {"sit": Entry((sit,)), "other": Entry((changed,))}, {}
    )


def test_what_spoils_a_comparison_is_said(tmp_path, capsys, monkeypatch):
    sit, repa = run("sit", 0, 100.0, noise()), run("repa", 0, 90.0, noise(), images=13800)
    runs = folders(tmp_path, sit, repa, run("reg", 0, 80.0, noise(), num_images=500))
    assert "Not one budget" in told(runs[:2], capsys, monkeypatch)[1]
    assert told(runs, capsys, monkeypatch)[0] == 2 and "measured differently" in told(runs, capsys, monkeypatch)[1]
    assert "two methods or two settings of one method are needed" in told(runs[:1], capsys, monkeypatch)[1]
    with pytest.raises(UserError, match="both sit demo with training seed 0"):
        entries([sit, sit])


def test_two_settings_of_one_method_are_compared_and_never_averaged(tmp_path, capsys, monkeypatch):
    """x- and v-prediction were an error once, and seeds of both were one entry."""
    x = [judged(f"x{seed}", 2.5 + 0.1 * seed, seed) for seed in (0, 1, 2)]
    v = [judged(f"v{seed}", 2.9 + 0.11 * seed, seed, {"model.prediction": "v"}) for seed in (0, 1, 2)]
    named = entries([x[0], v[1], v[0], x[1], x[2], v[2]])
    assert {name: list(entry.by_seed) for name, entry in named.items()} == {
        "jit demo": [0, 1, 2],
        "jit demo, model.prediction=v": [0, 1, 2],
    }
    code, text = told(folders(tmp_path, *x, *v), capsys, monkeypatch)
    first = text.split("\n\n")[1]
    assert code == 0 and first.startswith("fd_ratio ↓") and "jit demo, model.prediction=v" in first
    assert "+0.39 to +0.43" in first and first.rstrip().endswith("worse")
    assert "judges met" in text and "One training seed" not in text and "do not name" not in text


def test_there_is_no_verdict_across_contact(tmp_path, capsys, monkeypatch):
    rows = [
        judged("a", 3.0),
        judged("b", 2.0, method="b", contact=[met("plain", "teacher")], judged_by=["residual", "vit"]),
        judged("c", 2.0, method="c", contact=[met("embedded-v1", "encoder")]),
        judged("d", 2.0, method="d", copies=0.9),
    ]
    text = told(folders(tmp_path, *rows), capsys, monkeypatch)[1]
    verdicts = {line.split()[0]: line.split()[-1] for line in text.split("\n\n")[1].splitlines()[3:]}
    assert {name: verdicts[name] for name in "bcd"} == {"b": "-", "c": "better", "d": "-"}
    assert "No verdict" in text and "plain: teacher" in text and "EfficientNet-Lite0: encoder" in text
