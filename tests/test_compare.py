"""evaluation/compare.py: gains of methods over the first one, seed by seed, from records alone."""

import numpy as np
import pytest
from records import fields, metric

from pixlat.common.errors import UserError
from pixlat.evaluation.board.gains import entries, gains, notes, over_training_seeds
from pixlat.evaluation.compare import main
from pixlat.evaluation.metrics.spread import paired_differences
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
    (gain,) = gains({0: repa}, {0: sit})
    (expected,) = paired_differences(repa, sit)
    assert (gain.metric, gain.value, gain.se, gain.seeds) == ("fd_embedded", expected.value_bc, expected.se, 1)
    assert gain.value == pytest.approx(-10, abs=2) and gain.deviations == expected.deviations < -3


def test_several_training_seeds_are_paired_and_their_spread_is_the_error():
    shift = {0: -10.0, 1: -14.0, 2: -12.0}
    sit = {seed: run("sit", seed, 100.0 + 20 * seed, noise()) for seed in (0, 1, 2, 3)}
    repa = {seed: run("repa", seed, 100.0 + 20 * seed + shift[seed], noise()) for seed in shift}
    (gain,) = gains(repa, sit)
    # what differs between seeds, 20, cancels
    assert (gain.value, gain.se, gain.seeds) == (pytest.approx(-12), pytest.approx(2 / 3**0.5), 3)
    with pytest.raises(UserError, match="no seed in common"):
        gains({7: repa[0]}, sit)


def test_an_error_of_nothing_is_no_division_by_zero():
    (found,) = paired_differences(run("a", 0, 1.0, noise()), run("b", 0, 1.0, noise()))
    assert over_training_seeds([found]).deviations == 0.0


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
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith(("sit", "repa", "reg"))}
    assert code == 0 and "fd_embedded ↓" in text and "minus sit demo" in text
    assert "-10.00 ± 0.00" in rows["repa"] and "-15." in rows["reg"] and "±" not in rows["sit"]
    assert "One training seed" in text and "Not one budget" not in text and "6,900" in rows["reg"]


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
    assert (
        "Not one cost: training took from 2000 to 3000 PMACs, earlier stages included." in text
        and "Not one budget" not in text
        and "batch" not in text
    )
    changed = build_record(
        {**{key: value for key, value in sit.items() if key != "row_id"}, "train": sit["train"] | {"batch": 8}}
    )
    assert "The runs differ in their batch: 8, 64 images a step." in notes({"sit": {0: sit}, "other": {0: changed}})


def test_what_spoils_a_comparison_is_said(tmp_path, capsys, monkeypatch):
    sit, repa = run("sit", 0, 100.0, noise()), run("repa", 0, 90.0, noise(), images=13800)
    runs = folders(tmp_path, sit, repa, run("reg", 0, 80.0, noise(), num_images=500))
    assert "Not one budget" in told(runs[:2], capsys, monkeypatch)[1]
    assert told(runs, capsys, monkeypatch)[0] == 2 and "measured differently" in told(runs, capsys, monkeypatch)[1]
    assert "two methods are needed" in told(runs[:1], capsys, monkeypatch)[1]
    with pytest.raises(UserError, match="both sit demo with training seed 0"):
        entries([sit, sit])
