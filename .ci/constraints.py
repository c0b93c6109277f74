"""Versions of the packages that pixlat is tested with.

    python .ci/constraints.py refresh    installs what pyproject.toml asks for anew and writes constraints.txt (6 GB)
    python .ci/constraints.py oldest     prints the lowest versions that pyproject.toml promises, for `pip install -c`
    python .ci/constraints.py check      names what constraints.txt lacks or contradicts, as a test does

After a refresh run `.ci/run`, which installs this set, and commit both if it passes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
# torch asks for exactly one version of each of these, and another build of it (CPU, another CUDA) for none of them: a
# line could only be in the way.
OF_TORCH = re.compile(r"nvidia-|cuda-|triton$")
PYTHON = "3.11"  # of .ci/run
HEADER = f"""\
# The tested set: what `.ci/run` installs (and the trackers, which its tests imitate), Python {PYTHON} on Linux.
# `pip install -c constraints.txt -e '.[dev]'` takes these versions.
# Made by `python .ci/constraints.py refresh`; do not edit. CUDA's packages and triton are left out on purpose: each
# build of torch asks for its own.
"""


def declared() -> list[Requirement]:
    """All requirements of pyproject.toml, those of its extras included, without pixlat[...] itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [each for each in map(Requirement, lines) if each.name != project["name"]]


def oldest() -> Iterator[str]:
    """`name==version` for each lower bound or exact version. A requirement without either promises nothing."""
    for requirement in declared():
        bounds = [each.version for each in requirement.specifier if each.operator in (">=", "==")]
        if bounds:
            yield f"{requirement.name}=={bounds[0]}"


def faults(requirements: Sequence[Requirement], pinned: Mapping[str, str]) -> list[str]:
    """What is wrong with the tested versions as an answer to these requirements, a sentence each."""
    found = []
    for each in requirements:
        version = pinned.get(canonicalize_name(each.name))
        if version is None:
            found.append(f"{each.name} has no line.")
        elif not each.specifier.contains(version, prereleases=True):
            found.append(f"{each.name}=={version} is not in {each.specifier}.")
    return found


def unlisted(pinned: Mapping[str, str]) -> list[str]:
    """What the packages of this environment need and constraints.txt does not have, a sentence each.

    A package is asked only if it is here in its tested version. Markers are answered as `.ci/run`'s machine would.
    """
    found = []
    for name, version in pinned.items():
        here = installed(name)
        if here is None or here.version.partition("+")[0] != version:
            continue
        needs = [Requirement(line) for line in here.requires or []]
        asked = [each for each in needs if each.marker is None or each.marker.evaluate(tested_environment())]
        found += [
            f"{name}: {fault}" for fault in faults([each for each in asked if not OF_TORCH.match(each.name)], pinned)
        ]
    return found


def installed(name: str) -> Distribution | None:
    """A package of this environment."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def lines() -> dict[str, str]:
    """name -> version of constraints.txt, names in their canonical form."""
    rows = [line.partition("#")[0].strip() for line in FILE.read_text().splitlines()]
    return {canonicalize_name(name): version for name, _, version in (row.partition("==") for row in rows if row)}


def refresh() -> str:
    """Installs what pyproject.toml asks for into a fresh environment without this file, and writes down what came."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [str(Path(folder) / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", *(str(each) for each in declared())], check=True)
        found = json.loads(
            subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True, text=True).stdout
        )
    return HEADER + "".join(f"{line}\n" for line in as_lines({row["name"]: row["version"] for row in found}))


def as_lines(versions: dict[str, str]) -> list[str]:
    """Sorted lines of the file, without tools of the environment, torch's packages and local versions such as +cpu."""
    named = {canonicalize_name(name): version.partition("+")[0] for name, version in versions.items()}
    return [
        f"{name}=={version}"
        for name, version in sorted(named.items())
        if name not in ("pip", "pixlat") and not OF_TORCH.match(name)
    ]


def tested_environment() -> dict[str, str]:
    """The answers of `.ci/run`'s machine to the markers of requirements, where they may differ from this machine's."""
    return {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "extra": "",
    }


def main(action: str = "") -> int:
    """Returns the exit code."""
    if action == "oldest":
        print("\n".join(oldest()))
    elif action == "check":
        found = faults(declared(), lines()) + unlisted(lines())
        print("\n".join(found) or f"{FILE.name} has a fitting version of everything.")
        return int(bool(found))
    elif action == "refresh":
        if sys.version_info[:2] != tuple(map(int, PYTHON.split("."))):
            print(f"error: run this with Python {PYTHON}, as .ci/run does.", file=sys.stderr)
            return 2
        FILE.write_text(refresh())
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
