"""Plug-ins of other packages, as installed dist-info folders: one that is broken or clashes is named in a sentence and
harms no other method.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pixlat.common.errors import UserError
from pixlat.common.plugins import Plugin, load_plugin, plugins_of, registered_in
from pixlat.completion import candidates
from pixlat.launch.run import help_text
from pixlat.methods import ENTRY_POINT_GROUP, METHODS, get_spec, registered

ROOT = Path(__file__).resolve().parent.parent
GOOD = """\
from dataclasses import dataclass
from pixlat.methods import MethodSpec

@dataclass
class Config:
    depth: int = 1  # blocks

@dataclass
class Sample:
    steps: int = 1  # evaluations

SPEC = MethodSpec("good", "a good method", "a paper", "good_plugin:Method", Config, Sample, "presets.yaml")
"""


def install(site: Path, package: str, entry_points: str | bytes, metadata: bool = True) -> None:
    """A package as pip leaves it, without its modules."""
    folder = site / f"{package.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    if metadata:
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    text = entry_points.encode() if isinstance(entry_points, str) else entry_points
    (folder / "entry_points.txt").write_bytes(f"[{ENTRY_POINT_GROUP}]\n".encode() + text + b"\n")


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder of installed packages with one good plug-in."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "good_plugin.py").write_text(GOOD)
    install(tmp_path, "good-package", "good = good_plugin:SPEC")
    plugins_of.cache_clear()
    yield tmp_path
    plugins_of.cache_clear()
    sys.modules.pop("good_plugin", None)


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "pixlat"]


def all_is_well() -> bool:
    """Whether the good plug-in and the built-in methods are there."""
    everything = registered()
    return (
        set(METHODS) < set(everything)
        and get_spec("good").title == "a good method"
        and get_spec("jit").config.__module__.endswith("methods.jit.config")
    )


def test_a_plugin_is_a_method_like_others(site, caplog):
    assert all_is_well() and not warnings(caplog)
    assert "\n  good " in help_text() and "model.depth (int, 1)  " in help_text("good", ["model"])
    assert "method=good" in candidates("pixlat train method=") and candidates("pixlat train method=good model.") == [
        "model.depth="
    ]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'bad_plugin'"),
        ("def x(:\n", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import numpy_of_tomorrow", "No module named 'numpy_of_tomorrow'"),
        ("OTHER = 1", "AttributeError"),
    ],
    ids=["gone", "syntax", "raises", "dependency", "attribute"],
)
def test_one_that_cannot_be_imported_is_named_with_its_package_and_entry_point(site, caplog, code, reason):
    install(site, "bad-package", "bad = bad_plugin:SPEC")
    if code is not None:
        (site / "bad_plugin.py").write_text(code)
    with pytest.raises(UserError) as caught:
        get_spec("bad")
    for part in ("method='bad'", "bad-package", "bad_plugin:SPEC", reason, "uninstall it"):
        assert part in str(caught.value)
    text = help_text()
    assert "bad-package" in text and "\n  jit " in text and "\n  good " in text
    assert all_is_well()
    assert "method=bad" in candidates("pixlat train method=") and candidates("pixlat train method=bad model.") == []


def test_a_built_in_name_cannot_be_taken(site, caplog):
    install(site, "impostor", "jit = impostor.config:SPEC\nother = impostor.config:OTHER")
    assert all_is_well() and "other" in registered()
    assert registered() and len(warnings(caplog)) == 1, "once in a process"
    assert all(part in warnings(caplog)[0] for part in ("'jit'", "impostor", "impostor.config:SPEC", "built-in"))


def test_a_name_that_two_packages_register_belongs_to_neither(site, caplog):
    install(site, "first", "same = first_plugin:SPEC\nalone = first_plugin:ALONE")
    install(site, "second", "same = second_plugin:SPEC")
    assert all_is_well() and "same" not in registered() and "alone" in registered()
    (sentence,) = warnings(caplog)
    assert all(
        part in sentence
        for part in (
            "'same'",
            "first (entry point first_plugin:SPEC)",
            "second (entry point second_plugin:SPEC)",
            "uninstall",
        )
    )
    with pytest.raises(UserError, match="method='same' is not registered"):
        get_spec("same")


def test_a_package_that_is_found_twice_is_one(site, tmp_path_factory, monkeypatch, caplog):
    """As an editable install beside its own egg-info."""
    other = tmp_path_factory.mktemp("other")
    install(other, "good-package", "good = shadowed:SPEC")
    sys.path.append(str(other))
    try:
        assert all_is_well() and not warnings(caplog)
    finally:
        sys.path.remove(str(other))


@pytest.mark.parametrize("content", ["this is no entry point", b"\xff\xfe = a:b"], ids=["words", "bytes"])
def test_entry_points_that_cannot_be_read_are_those_of_one_package(site, caplog, content):
    """`importlib.metadata.entry_points` raises for all packages here."""
    install(site, "garbled", content)
    assert all_is_well()
    assert len(warnings(caplog)) == 1 and "The package garbled is ignored" in warnings(caplog)[0]


def test_a_package_without_metadata_is_named_by_its_folder(site):
    install(site, "nameless", "lonely = nameless.config:SPEC", metadata=False)
    assert Plugin("lonely", "nameless.config:SPEC", "nameless") in list(registered_in(ENTRY_POINT_GROUP))


def test_extras_belong_to_no_entry_point(site):
    install(site, "extra", "extra = good_plugin:SPEC [tests]")
    assert registered()["extra"] == "good_plugin:SPEC"
    with pytest.raises(UserError, match="whose spec has the name 'good'"):
        get_spec("extra")


def test_what_is_no_spec_is_refused(site):
    install(site, "wrong", "wrong = good_plugin:Config")
    with pytest.raises(
        UserError, match=r"by the package wrong as 'good_plugin:Config', which is a type and not a MethodSpec"
    ):
        get_spec("wrong")


def test_a_plugin_that_is_there_is_loaded(site):
    assert load_plugin(Plugin("good", "good_plugin:SPEC", "good-package"), "method") is get_spec("good")


def test_the_command_answers_beside_broken_plugins(site):
    install(site, "bad-package", "bad = bad_plugin:SPEC")
    install(site, "garbled", "no entry point")
    install(site, "impostor", "sit = impostor:SPEC")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{site}"}
    command = [sys.executable, "-m", "pixlat", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "\n  jit " in done.stdout and "bad-package" in done.stdout
    assert (
        len(done.stderr.splitlines()) == 2
        and "garbled" in done.stderr
        and "impostor" in done.stderr
        and "Traceback" not in done.stderr
    )
