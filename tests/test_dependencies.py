"""constraints.txt, the versions that CI tests, does not lie; pyproject.toml promises what the oldest job installs."""

import importlib.util
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


def load_script():
    """.ci/constraints.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("constraints", ROOT / ".ci" / "constraints.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


constraints = load_script()
TESTED = constraints.lines()


def test_every_dependency_has_a_tested_version_in_its_range():
    assert len(constraints.declared()) > 25
    assert constraints.faults(constraints.declared(), TESTED) == []


def test_what_the_tested_packages_need_is_listed_too():
    assert constraints.unlisted(TESTED) == []


def test_a_missing_and_a_contradicting_line_are_noticed():
    wrong = {name: version for name, version in TESTED.items() if name not in ("pillow", "numpy")} | {"torch": "1.0"}
    assert constraints.faults(constraints.declared(), wrong) == [
        "torch==1.0 is not in " + range_of("torch") + ".",
        "numpy has no line.",
        "pillow has no line.",
    ]
    assert "foolbox: numpy has no line." in constraints.unlisted(wrong)


def range_of(name):
    return str(next(each for each in constraints.declared() if each.name == name).specifier)


def test_every_line_is_one_exact_version():
    rows = [row for row in constraints.FILE.read_text().splitlines() if not row.startswith("#")]
    assert list(TESTED) == sorted(TESTED) and len(rows) == len(TESTED) > 60
    for row in rows:
        (specifier,) = Requirement(row).specifier
        assert specifier.operator == "==" and Version(specifier.version).local is None, row


def test_the_oldest_set_has_a_version_for_everything_that_is_used():
    oldest = {name: Version(version) for name, version in (line.split("==") for line in constraints.oldest())}
    free = {each.name for each in constraints.declared()} - set(oldest)
    assert free == {"types-tabulate", "types-tqdm"}  # stubs for mypy, which the oldest job does not run
    assert not [
        name for name, version in oldest.items() if version > Version(TESTED[constraints.canonicalize_name(name)])
    ]


def test_versions_of_the_machine_itself_stay_out():
    found = {
        "pip": "23.2",
        "torch": "2.15.0+cpu",
        "nvidia-cublas": "13",
        "cuda-toolkit": "13",
        "triton": "3",
        "Jinja2": "3.1.6",
        "pixlat": "0.2",
    }
    assert constraints.as_lines(found) == ["jinja2==3.1.6", "torch==2.15.0"]


@pytest.mark.parametrize("arguments", [(), ("nonsense",)])
def test_without_a_known_action_the_script_explains_itself(arguments, capsys):
    assert constraints.main(*arguments) == 2
    assert "refresh" in capsys.readouterr().out


def test_a_refresh_is_refused_on_another_python(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    assert constraints.main("refresh") == 2
    assert "Python 3.11" in capsys.readouterr().err
