"""Configuration: strict keys, presets, sweeps, run folders,
and a command line that answers before torch is imported.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pixlat import methods
from pixlat.common.config.explain import describe
from pixlat.common.config.identity import (
    LATER_KEYS,
    chosen_settings,
    config_entry,
    differences,
    identity,
    run_folder,
)
from pixlat.common.config.resolve import resolve, split_overrides, sweep
from pixlat.common.config.schema import RunConfig, to_dict
from pixlat.common.errors import UserError
from pixlat.common.plugins import plugins_of
from pixlat.launch.run import configurations, help_for, help_text
from pixlat.methods import get_spec, registered

ROOT = Path(__file__).resolve().parent.parent


def one(*arguments: str) -> RunConfig:
    (run,) = configurations(arguments)
    return run


def test_precedence_is_defaults_preset_command_line():
    preset = one("method=jit", "preset=imagenet256-h")
    assert preset.model.dropout == 0.2  # the method's default is 0
    assert one("method=jit", "preset=imagenet256-h", "model.dropout=0.3", "data.path=/x").model.dropout == 0.3


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["method=jitt"], ["method='jitt'", "Did you mean 'jit'?"]),
        (["preset=imagnet256-b"], ["imagnet256-b", "Did you mean 'imagenet256-b'?"]),
        (["train.lrr=1"], ["train.lrr", "Did you mean 'train.lr'?", "--help"]),
        (["model.dept=3"], ["model.dept", "Did you mean 'model.depth'?"]),
        (["train.lr=fast"], ["train.lr", "fast"]),
        (["train.batch=64", "train.micro_batch=48"], ["micro_batch=48", "batch=64"]),
        (["train.schedule=cosin"], ["train.schedule", "constant, cosine, linear"]),
        (["train.images=-1"], ["train.images=-1", "at least 0"]),
        (["eval.ema=0.5"], ["eval.ema='0.5'", "Averages:"]),
        (["model.heads=7"], ["model.heads=7"]),
        (["seed"], ["'seed'", "key=value"]),
        (["jit", "preset=demo"], ["'jit'", "Did you mean method=jit?"]),
        (["seed=1", "seed=2"], ["seed is given twice"]),
        (["model=3"], ["model"]),
    ],
)
def test_mistakes_are_named_with_the_way_out(arguments, fragments):
    with pytest.raises(UserError) as error:
        configurations(arguments)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_a_run_without_settings_is_the_default_one():
    assert resolve(get_spec(RunConfig.method), {}) == one(f"method={RunConfig.method}")


def test_comma_lists_sweep_and_brackets_do_not():
    runs = configurations(["seed=0,1,2", "train.betas=[0.9,0.99]", "train.lr=1e-3,2e-3"])
    assert [(r.seed, r.train.lr) for r in runs] == [(s, lr) for s in (0, 1, 2) for lr in (1e-3, 2e-3)]
    assert all(r.train.betas == [0.9, 0.99] for r in runs)
    assert list(sweep(split_overrides(["a=1,2"]))) == [{"a": "1"}, {"a": "2"}]


def test_the_folder_depends_on_what_matters_and_on_nothing_else():
    base = one("method=jit")
    assert run_folder(base) == run_folder(one("method=jit", "preset=demo"))
    assert run_folder(base) == run_folder(one("data.workers=3", "train.threads=1"))
    assert run_folder(base) != run_folder(one("train.lr=0.123"))
    assert identity(base) != identity(one("seed=1"))
    assert run_folder(one("name=mine", "out=there")) == Path("there/mine")
    assert differences(to_dict(base), to_dict(one("train.lr=0.123", "out=x"))) == [
        f"train.lr: {base.train.lr} -> 0.123"
    ]


@pytest.mark.parametrize("name", sorted(registered()))
def test_every_preset_of_every_method_resolves(name):
    from pixlat.common.config.resolve import load_presets

    for preset, settings in load_presets(get_spec(name).presets).items():
        run = resolve(get_spec(name), {"method": name, "preset": preset, "data.path": "/images"})
        assert settings["about"]
        assert run.preset == preset
        if expected := settings.get("expected"):
            assert expected["source"]


@pytest.mark.parametrize("name", sorted(registered()))
def test_every_key_has_a_meaning(name):
    spec = get_spec(name)
    rows = [*describe(RunConfig), *describe(spec.config, "model"), *describe(spec.sample, "sample")]
    assert len(rows) > 40
    for key, kind, default, _ in rows:
        assert key and kind and default
    missing = [key for key, _, _, meaning in describe(RunConfig) if not meaning]
    assert not missing


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/run.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def help_of(*arguments: str) -> str:
    """The help, from a process that must not import torch for it."""
    code = (
        f"import sys, pixlat.launch.run as r; t = r.help_for({arguments!r}); assert 'torch' not in sys.modules, "
        "'torch imported'; print(t)"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_help_is_short_and_names_every_method() -> None:
    text = help_of("--help")
    assert all(f"\n  {name} " in text for name in registered()) and "method=NAME --help" in text
    assert len(text.splitlines()) < 40


def test_help_of_a_method_lists_its_presets_and_every_key_and_no_other_method() -> None:
    text = help_of("method=jit", "--help")
    for expected in ("imagenet256-b", "sample.steps", "model.bottleneck", "data (13), train (24)"):
        assert expected in text
    assert "model.tokenizer" not in text and "train.lr" not in text
    everything = help_of("method=jit", "--help", "all")
    for expected in ("train.lr (float", "sample.steps", "model.bottleneck", "dry_run", "cluster.nodes"):
        assert expected in everything
    assert (
        "train.lr" in help_of("--help", "train")
        and "dry_run" in help_of("--help", "run")
        and "train.lr" not in help_of("--help", "run")
    )


@pytest.mark.parametrize(("words", "message"), [(["trian"], "Did you mean 'train'?"), (["model"], "the method's")])
def test_help_of_an_unknown_group_is_a_mistake(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        help_for(["--help", *words])


def test_help_of_an_unknown_method_is_a_mistake() -> None:
    result = run_cli("method=jitt", "--help")
    assert result.returncode == 2 and "Did you mean 'jit'?" in result.stderr and not result.stdout


@pytest.fixture
def plugins_of_others(tmp_path, monkeypatch):
    """Packages that register a method whose module is gone, and one with the name of a built-in method."""
    for package, line in (("broken", "broken = broken_plugin.config:SPEC"), ("impostor", "jit = impostor.config:SPEC")):
        installed = tmp_path / f"{package}-1.0.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (installed / "entry_points.txt").write_text(f"[{methods.ENTRY_POINT_GROUP}]\n{line}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins_of.cache_clear()
    yield
    plugins_of.cache_clear()


def test_a_broken_plugin_is_named_and_hides_nothing(plugins_of_others) -> None:
    text = help_text()
    assert "broken_plugin" in text and "\n  jit " in text
    with pytest.raises(UserError, match="method='broken' is a plug-in of the package broken that cannot be loaded"):
        get_spec("broken")


def test_a_plugin_with_a_built_in_name_is_ignored_with_a_warning(plugins_of_others, caplog) -> None:
    assert get_spec("jit").config.__module__ == "pixlat.methods.jit.config"
    assert "impostor" in caplog.text and "'jit'" in caplog.text


def test_a_reader_that_leaves_early_ends_the_command_quietly() -> None:
    child = subprocess.Popen(
        [sys.executable, "launch/run.py", "method=jit", "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    child.stdout.close()
    assert child.wait(timeout=60) == 141 and child.stderr.read() == b""


@pytest.mark.parametrize("name", ["../elsewhere", "a/b/../../c", "/tmp/run", ".hidden", "a/.b", ""])
def test_a_name_stays_below_out(name) -> None:
    with pytest.raises(UserError, match="below out="):
        one(f"name='{name}'")
    assert run_folder(one("name=group/run", "out=there")) == Path("there/group/run")


def test_only_settings_that_are_not_defaults_are_told() -> None:
    spec = get_spec("jit")
    assert chosen_settings(resolve(spec, {"train.lr": "0.5", "name": "x"}), spec)["train.lr"] == 0.5
    assert not {key for key in chosen_settings(resolve(spec, {"seed": "1"}), spec) if key.startswith("cluster.")}


def entry(*overrides: str, method: str = "jit", stages: dict[str, str] | None = None) -> dict[str, Any]:
    """The record's `config` of a demo with these settings."""
    spec = get_spec(method)
    return config_entry(resolve(spec, dict(pair.split("=", 1) for pair in overrides)), spec, stages or {})


def test_runs_that_differ_in_seed_place_and_machine_only_have_one_configuration() -> None:
    base = entry()
    assert base == {"digest": base["digest"], "settings": {}, "preset": "demo"} and len(base["digest"]) == 12
    for same in (
        "seed=3", "name=x", "out=there", "train.threads=1", "train.trackers=[tensorboard]", "cluster.name=local",
        "data.workers=2", "data.path=/other", "eval.num_images=5000", "eval.seeds=[0,1]", "eval.precision=bf16",
        "train.log_images=100", "budget.images=147200", "eval.ema='0.999'", "train.recompute_blocks=true",
    ):  # fmt: skip
        assert entry(same) == base, same
    others = [
        "model.prediction=v", "train.images=1600", "train.lr=1e-4", "sample.guidance=1", "sample.steps=3",
        "eval.ema=raw", "data.flip=true", "train.precision=bf16",
    ]  # fmt: skip
    found = [entry(other) for other in others]
    assert len({each["digest"] for each in [base, *found]}) == 1 + len(others)
    assert [list(each["settings"]) for each in found] == [[other.partition("=")[0]] for other in others]


def test_an_earlier_run_counts_by_its_configuration_and_not_by_its_folder() -> None:
    places = ("train", "runs/one", "runs/two")
    found = [entry(f"model.decoder={place}", method="rae", stages={"decoder": "aa"}) for place in places]
    assert len({each["digest"] for each in found}) == 1 and found[1]["settings"] == {"model.decoder": "runs/one"}
    assert entry("model.decoder=train", method="rae", stages={"decoder": "bb"})["digest"] != found[0]["digest"]


def test_numbers_that_a_record_cannot_hold_are_words() -> None:
    assert entry("train.clip_grad=.inf")["settings"] == {"train.clip_grad": "inf"}
    assert entry("train.betas=[0.5,.nan]")["settings"] == {"train.betas": [0.5, "nan"]}


def test_a_mistake_exits_with_2_and_one_line_on_stderr():
    result = run_cli("method=jit", "train.lrr=1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert "torch" not in result.stderr


def test_keys_that_came_later_leave_earlier_runs_what_they_were() -> None:
    run = resolve(get_spec("jit"), {"seed": "0"})
    saved = to_dict(run)
    for key, value in LATER_KEYS.items():
        group, name = key.split(".")
        assert saved[group].pop(name) == value
    assert differences(saved, to_dict(run)) == []
    changed = resolve(get_spec("jit"), {"data.modes": "strict"})
    assert differences(saved, to_dict(changed)) == ["data.modes: convert -> strict"]
    assert identity(changed) != identity(run)
    earlier = resolve(get_spec("jit"), {"train.images": "104000", "eval.num_images": "1000"})
    assert identity(earlier) == "30534fd851ee"  # of a demo before there were eval.precision and eval.uint8
    assert identity(resolve(get_spec("jit"), {"eval.precision": "bf16"})) != identity(run)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        (
            "train.lr=fast",
            "the command line: train.lr=fast does not fit: it must be a number, for example 0.5 or 1e-4.",
        ),
        (
            "train.batch=1.5",
            "the command line: train.batch=1.5 does not fit: it must be a whole number, for example 2.",
        ),
        (
            "train.batch=null",
            "the command line: train.batch=null does not fit: it must be a whole number, for example 2.",
        ),
        ("data.flip=maybe", "the command line: data.flip=maybe does not fit: it must be true or false."),
        ("data.name=[1]", "the command line: data.name=[1] does not fit: it must be a word."),
        (
            "eval.seeds=3",
            "the command line: eval.seeds=3 does not fit: it must be a list in brackets, for example [0,1].",
        ),
        (
            "train.ema_decay=[x]",
            "the command line: train.ema_decay=[x] does not fit: it must be a list in brackets, for example [0.1,0.9].",
        ),
        (
            "sample.interval=0.1",
            "the command line: sample.interval=0.1 does not fit: it must be a list in brackets, for example [0.1,0.9].",
        ),
    ],
)
def test_values_of_a_wrong_type_are_told_in_our_words(argument: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(get_spec("jit"), dict([argument.split("=")]))
    assert str(caught.value) == told
