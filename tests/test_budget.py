"""Runs of a given cost, scores during training, and several sampling seeds: by function,
and once through the command.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from evaluated_run import Projections, image_folder

from pixlat.common.accounting.macs import training_cost
from pixlat.common.config.identity import identity, run_folder
from pixlat.common.datasets.load import summarise
from pixlat.common.errors import UserError
from pixlat.common.frozen.tokenizer import read_autoencoder_card
from pixlat.common.training.optim import learning_rate
from pixlat.common.training.steps import total_steps
from pixlat.common.weights.checkpoint import latest
from pixlat.evaluation.board.groups import group, read_records
from pixlat.evaluation.board.matched import curves_of, matched_table
from pixlat.evaluation.board.notes import training_macs
from pixlat.evaluation.records.curve import CURVE, read_curve
from pixlat.evaluation.records.parents import earlier_runs
from pixlat.evaluation.records.record import read_record
from pixlat.launch.job import execute as jobs
from pixlat.launch.job import scores
from pixlat.launch.job.budget import within_budget
from pixlat.launch.job.execute import run_one
from pixlat.launch.run import configurations, main
from pixlat.methods import get_class
from pixlat.methods.base import DataInfo

MODEL = (
    "model.depth=1",
    "model.width=16",
    "model.heads=2",
    "model.patch=4",
    "model.bottleneck=8",
    "model.context_tokens=0",
    "model.context_start=0",
)
TRAIN = ("train.batch=8", "train.warmup_images=0", "train.schedule=constant", "train.ema_decay=[0.9]")
KEPT = ("train.log_images=16", "train.checkpoint_images=48", "train.preview_images=0")
EVAL = ("eval.num_images=24", "eval.batch=12", "eval.grid_columns=2", "sample.steps=2")
SMALL = ("data=synthetic", "data.image_size=8", *MODEL, *TRAIN)


def one(*arguments):
    """The demo without its warm-up, unless the arguments say otherwise."""
    settings = {"method": "jit", "train.warmup_images": "0", **dict(argument.split("=", 1) for argument in arguments)}
    (run,) = configurations([f"{key}={value}" for key, value in settings.items()])
    return run


def macs_an_image(run):
    return training_cost(get_class(run.method), run.model, DataInfo.of(summarise(run.data))).per_image


def macs_of(run):
    """MACs of a whole run whose images are remembered as early as can be."""
    info = DataInfo.of(summarise(run.data))
    encoded = min(run.train.images, info.num_train * (2 if run.data.flip else 1))
    return training_cost(get_class(run.method), run.model, info).total(run.train.images, encoded, run.train.batch)


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_a_budget_of_macs_gives_as_many_whole_steps_as_fit():
    cost = macs_an_image(one(*SMALL))
    for images in (1600, 1605, 1607.9):
        run = within_budget(one(*SMALL, f"budget.train_macs={cost * images}"))
        assert run.train.images == 1600 and run.train.batch == 8
        assert cost * run.train.images <= run.budget.train_macs < cost * (run.train.images + run.train.batch)


def test_a_dearer_network_gets_fewer_images_of_the_same_budget():
    small, large = (within_budget(one(*SMALL, "budget.train_macs=1e11", f"model.width={width}")) for width in (32, 64))
    ratio = macs_an_image(large) / macs_an_image(small)
    assert ratio > 2 and small.train.images / large.train.images == pytest.approx(ratio, rel=0.01)


def test_a_budget_of_images_is_not_exceeded_and_the_smaller_budget_counts():
    assert within_budget(one("budget.images=1615")).train.images == 1600
    assert within_budget(one("budget.images=1600", "budget.train_macs=1e30")).train.images == 1600
    cost = macs_an_image(one(*SMALL))
    assert within_budget(one(*SMALL, "budget.images=160000", f"budget.train_macs={cost * 320}")).train.images == 320
    assert within_budget(one()) == one()


def test_the_schedule_ends_where_the_budget_does():
    run = within_budget(
        one(
            "budget.images=16000", "train.schedule=cosine", "train.lr=1", "train.min_lr=0.1", "train.warmup_images=1600"
        )
    )
    assert (
        learning_rate(run.train, 16000) == pytest.approx(0.1)
        and learning_rate(run.train, 8800) == pytest.approx(0.55)
        and total_steps(run.train) == 1000
    )


def test_a_budget_is_only_another_way_to_say_how_long():
    """It is the run of that many images, with the same folder;
    and what it means is in its configuration and its record.
    """
    budgeted, plain = within_budget(one("budget.images=1600")), one("train.images=1600")
    assert identity(budgeted) == identity(plain) and run_folder(budgeted) == run_folder(plain)


def test_earlier_stages_are_part_of_the_budget(tmp_path):
    def rae(macs, decoder):
        (run,) = configurations(("method=rae", f"budget.train_macs={macs}", f"model.decoder={decoder}"))
        return within_budget(run)

    (decoder,) = configurations(("method=rae_decoder",))
    earlier = macs_of(decoder)
    run = rae(2 * earlier, "train")
    longer = dataclasses.replace(run, train=dataclasses.replace(run.train, images=run.train.images + run.train.batch))
    assert macs_of(run) <= earlier < macs_of(longer)
    with pytest.raises(UserError, match="the earlier stages alone cost"):
        rae(0.9 * earlier, "train")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"the cost of model\.decoder=.* is not known"):
        rae(2 * earlier, tmp_path)


@pytest.mark.parametrize("method", ["dit", "sit", "repa", "reg"])
def test_the_autoencoder_in_the_package_is_part_of_the_budget_and_of_the_record(method):
    """It was trained here, so what it cost is in the budget, in the record's parents and in the price of the row."""
    (run,) = configurations((f"method={method}",))
    cost = read_autoencoder_card()["macs_total"]
    assert cost > 9e12 and run.model.tokenizer == "embedded"
    budgeted = within_budget(configurations((f"method={method}", f"budget.train_macs={cost + macs_of(run)}"))[0])
    assert run.train.images - run.train.batch <= budgeted.train.images <= run.train.images
    with pytest.raises(UserError, match="the earlier stages alone cost"):
        within_budget(configurations((f"method={method}", f"budget.train_macs={0.9 * cost}"))[0])
    (parent,) = earlier_runs(run, run.model)
    assert (parent["key"], parent["method"], parent["checkpoint_sha256"]) == (
        "tokenizer",
        "vae",
        read_autoencoder_card()["sha256"],
    )
    assert training_macs({"train": {"macs_total": 7}, "parents": [parent]}) == cost + 7
    released = dataclasses.replace(run.model, tokenizer="sd-ft-ema")
    assert earlier_runs(run, released) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SMALL, "budget.train_macs=1e3"), r"budget.train_macs=1000 allows 0 steps of 8 images"),
        (("budget.images=1600", "train.warmup_images=1600"), "the warm-up alone needs train.warmup_images=1600"),
        (("budget.images=10",), "budget.images=10 allows 0 steps"),
        (("budget.images=0",), "must be positive"),
        (("budget.images=100", "train.images=100"), "both say how long"),
        (("budget.train_mac=1e9",), "Did you mean 'budget.train_macs'"),
        (("eval.seeds=[1,1]",), "must be different"),
        (("eval.every_images=-1",), "at least 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_allocated(arguments, message):
    with pytest.raises(UserError, match=message):
        within_budget(one(*arguments))


def test_the_command_says_what_the_budget_allows(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "method=jit", *SMALL, "budget.train_macs=1e9", "dry_run=true"])
    assert main() == 0
    printed, expected = capsys.readouterr().out, within_budget(one(*SMALL, "budget.train_macs=1e9")).train.images
    assert (
        f"steps        {expected // 8} of 8 images" in printed
        and f"  train.images={expected}" in printed
        and "budget.train_macs=1000000000.0" in printed
    )


# -- scores during training --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Features in a moment; pictures have tests of their own."""
    monkeypatch.setattr("pixlat.evaluation.judges.panel.EmbeddedExtractor", Projections)
    monkeypatch.setattr("pixlat.launch.job.pictures.draw_pictures", lambda *_: None)


def start(out, data, *changes, name="run"):
    """A run of 12 steps of 8 images, as launch/run.py starts it."""
    arguments = (
        f"out={out}",
        f"name={name}",
        "data=folder",
        f"data.path={data}",
        "data.image_size=8",
        *MODEL,
        *TRAIN,
        *KEPT,
        *EVAL,
        "train.images=96",
    )
    settings = dict(argument.split("=", 1) for argument in (*arguments, *changes))
    if "budget.images" in settings:
        del settings["train.images"]
    run_one(within_budget(one(*(f"{key}={value}" for key, value in settings.items()))))
    return Path(out) / name


def weights(folder):
    from pixlat.common.weights.checkpoint import load

    return load(latest(folder / "checkpoints")).tensors


def assert_same_training(one, two):
    for stem, tensors in weights(one).items():
        for name, value in tensors.items():
            assert torch.equal(value, weights(two)[stem][name]), (stem, name)
    assert read_record(one / "result.json")["metrics"] == read_record(two / "result.json")["metrics"]


def test_scores_during_training_do_not_change_it_and_the_record_is_their_last_point(tmp_path, data):
    plain, scored = start(tmp_path / "a", data), start(tmp_path / "b", data, "eval.every_images=32")
    assert_same_training(plain, scored)
    assert not (plain / CURVE).exists()
    points = read_curve(scored / CURVE)
    record = read_record(scored / "result.json")
    assert [point["images"] for point in points] == [32, 64] and {point["protocol_hash"] for point in points} == {
        record["protocol_hash"]
    }
    assert [point["macs_train"] / point["images"] for point in points] == [record["train"]["macs_total"] / 96] * 2
    assert all(point["metrics"].keys() == record["metrics"].keys() for point in points)
    values = [point["metrics"]["fd"]["value"] for point in (*points, record)]
    assert len(set(values)) == 3


def test_a_point_is_the_score_of_a_run_that_ends_there(tmp_path, data):
    """The same noise and labels whenever it is asked.

    The schedule is constant, and the average is one for which neither run is too short, so the weights are the same.
    """
    scored = start(tmp_path / "a", data, "eval.every_images=64", "train.ema_decay=[0.3]")
    short = start(tmp_path / "b", data, "budget.images=64", "train.ema_decay=[0.3]")
    assert read_curve(scored / CURVE)[0]["metrics"] == read_record(short / "result.json")["metrics"]
    assert read_record(short / "result.json")["train"]["budget"] == {"train_macs": None, "images": 64}


class Broken(Exception):
    """Stands in for a process that ends without warning."""


@pytest.mark.parametrize("moment", ["in the second score", "after the second score", "at a step between"])
def test_a_run_stopped_anywhere_ends_with_the_same_curve(tmp_path, data, monkeypatch, moment):
    whole = start(tmp_path / "a", data, "eval.every_images=32")
    evaluate, calls = scores.evaluate_method, []
    append = scores.write_whole

    def stop_in_evaluation(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 and moment == "in the second score":
            raise Broken
        return evaluate(*args, **kwargs)

    def stop_after_writing(path, text):
        written = append(path, text)
        if len(text.splitlines()) == 2 and moment == "after the second score":
            raise Broken
        return written

    with monkeypatch.context() as patch:
        patch.setattr(scores, "evaluate_method", stop_in_evaluation)
        patch.setattr(scores, "write_whole", stop_after_writing)
        if moment == "at a step between":
            forward = get_class("jit").forward
            patch.setattr(
                get_class("jit"),
                "forward",
                lambda self, phase, batch, step: _raise() if step == 10 else forward(self, phase, batch, step),
            )
        with pytest.raises(Broken):
            start(tmp_path / "b", data, "eval.every_images=32")
    resumed = start(tmp_path / "b", data, "eval.every_images=32")
    assert read_curve(whole / CURVE) == read_curve(resumed / CURVE)
    assert_same_training(whole, resumed)


def _raise():
    raise Broken


def test_scores_of_lost_steps_are_replaced(tmp_path, data):
    """A start whose last checkpoints are damaged goes back behind points that it had made."""
    folder = start(tmp_path, data, "eval.every_images=16", "train.keep_checkpoints=9")
    expected = read_curve(folder / CURVE)
    assert [point["images"] for point in expected] == [16, 32, 48, 64, 80]
    (folder / "result.json").unlink()
    for checkpoint in sorted((folder / "checkpoints").glob("step-*"))[2:]:
        (checkpoint / "manifest.json").unlink()
    spoilt = [{**point, "metrics": {}} if point["images"] > 32 else point for point in expected]
    (folder / CURVE).write_text("".join(json.dumps(point) + "\n" for point in spoilt))
    assert read_curve(start(tmp_path, data, "eval.every_images=16", "train.keep_checkpoints=9") / CURVE) == expected


def test_a_signal_during_a_score_ends_the_run_at_once_and_nothing_is_lost(tmp_path, data, monkeypatch):
    """Everything is saved before: nobody waits for the end of a long evaluation."""
    import signal

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    # a shell starts its background jobs deaf to it
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(scores, "evaluate_method", interrupted)
            with pytest.raises(KeyboardInterrupt):
                start(tmp_path, data, "eval.every_images=32")
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert latest(tmp_path / "run/checkpoints").name == "step-00000004"
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "draw_job", lambda *_: _raise())
        with pytest.raises(Broken):
            start(tmp_path, data, "eval.every_images=32")
    assert [point["images"] for point in read_curve(tmp_path / "run" / CURVE)] == [32, 64]


def test_runs_are_compared_at_equal_training_from_their_curves(tmp_path, data):
    start(tmp_path, data, "eval.every_images=32", name="long")
    start(tmp_path, data, "budget.images=64", "seed=1", name="short")
    records = read_records(tmp_path)
    rows = group(records.rows, "Guided")
    table = matched_table(rows, "images", curves_of(rows, "images", records.curves), 64)
    assert sorted((row[1], row[3]) for row in table.cells) == [("long", "measured"), ("short", "measured")]


# -- several sampling seeds --------------------------------------------------------------------------------------------


def test_several_sampling_seeds_are_recorded_with_mean_and_spread(tmp_path, data):
    folder = start(tmp_path, data, "eval.seeds=[0,1,2]")
    record = read_record(folder / "result.json")
    fd = record["metrics"]["fd"]
    assert record["seeds"]["sample"] == [0, 1, 2] and len(fd["values"]) == 3 and fd["sd_seeds"] > 0
    assert fd["value"] == pytest.approx(sum(fd["values"]) / 3) and fd["n"] == 24
    single = read_record(start(tmp_path, data, "eval.seed=1", name="single") / "result.json")
    assert single["metrics"]["fd"]["value"] == pytest.approx(fd["values"][1], rel=1e-12) and single["seeds"][
        "sample"
    ] == [1]
    assert record["protocol_hash"] == single["protocol_hash"]
