"""Rules of the layout: who may import whom, what is documented, and that nothing heavy is imported early."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "methods", "evaluation", "launch", "pixlat")
LARGEST_ROOM = 15  # modules

# Rooms from the ground up: a module imports from its own room and from those above it in this list,
# never from one below.
RANKS = (
    "pixlat",  # the face's __init__: the version
    "common",  # the ground: errors, files, progress, seeds, hardware and the like
    "common.config",
    "common.maths",
    "common.layers",
    "common.weights",
    "common.images",
    "common.datasets",
    "common.frozen",
    "common.method",  # the seam
    "common.training",
    "common.accounting",
    "common.pictures",
    "methods",
    "methods.base",
    "methods.*",
    "evaluation.protocols",
    "evaluation.records",
    "evaluation.features",
    "evaluation.metrics",
    "evaluation.judges",
    "evaluation.score",
    "evaluation.board",
    "evaluation.command",
    "evaluation.bench",
    "evaluation.studies",
    "evaluation",  # the commands
    "launch.job",
    "launch.cluster",
    "launch",  # the commands
    "pixlat.*",
)


def modules() -> dict[str, Path]:
    """Every module of the package by its name without the leading `pixlat.`; the face's own keep it."""
    found = {}
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    """The entry of RANKS for a module: its own name, its folder, or the folder above."""
    parts = module.split(".")
    if parts[0] in ("methods", "pixlat"):
        return module if module in RANKS else f"{parts[0]}.*"
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(name for name in names if name in RANKS)


def imports_of(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports: at its top, in functions, and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            names = [name if short(name) in MODULES else node.module for name in inner]
        yield from (short(name) for name in names if name.split(".")[0] == "pixlat")


def short(name: str) -> str:
    """The name of a module as MODULES has it."""
    return name if name in MODULES else name.removeprefix("pixlat.")


GRAPH = {module: set(imports_of(path)) - {module} for module, path in MODULES.items()}


def test_every_import_is_of_pixlat_and_of_a_module_that_exists():
    """A top-level `common` would be somebody else's."""
    for module, path in MODULES.items():
        assert GRAPH[module] <= set(MODULES), (module, GRAPH[module] - set(MODULES))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (
                isinstance(node, ast.ImportFrom) and (node.level or str(node.module).split(".")[0] in PACKAGES[:4])
            ), (module, node.lineno)


def test_imports_go_one_way():
    rank = {room: number for number, room in enumerate(RANKS)}
    wrong = [
        (module, name)
        for module, names in GRAPH.items()
        for name in names
        if rank[room_of(name)] > rank[room_of(module)]
    ]  # fmt: skip
    assert not wrong, "\n".join(f"{module} imports {name}" for module, name in sorted(wrong))


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter(GRAPH).prepare()  # a circle is a CycleError, which names it


def test_rooms_are_small():
    sizes = {
        folder: len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        for path in MODULES.values()
        for folder in [path.parent]
    }
    large = {str(folder.relative_to(ROOT)): size for folder, size in sizes.items() if size > LARGEST_ROOM}
    assert not large


def test_methods_do_not_import_each_other():
    for module in MODULES:
        if module.startswith("methods.") and module != "methods.base":
            own = ".".join(module.split(".")[:2])
            others = [
                name
                for name in GRAPH[module]
                if name.startswith("methods.") and not (name == "methods.base" or name.startswith(own))
            ]
            assert not others, (module, others)


def test_only_the_studies_name_methods():
    names = [folder.name for folder in (ROOT / "methods").iterdir() if (folder / "method.py").exists()]
    assert "jit" in names
    for module, path in MODULES.items():
        # the default of `method`
        if not module.startswith(("methods", "evaluation.studies")) and module != "common.config.schema":
            words = {
                node.value
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            assert not words & set(names), module


def test_the_wheel_lists_every_package():
    """setuptools finds packages below one folder, and ours lie in five; so pyproject.toml lists them."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {
        module if module == "pixlat" else f"pixlat.{module}"
        for module, path in MODULES.items()
        if path.name == "__init__.py"
    }
    assert set(listed) == folders and len(listed) == len(folders)


def test_type_checkers_and_editors_find_every_part_of_the_package():
    """`.ci/typed/pixlat` has the layout of a wheel in links, because type checkers do not follow package-dir."""
    links = ROOT / ".ci" / "typed" / "pixlat"
    expected = {name: ROOT / name for name in PACKAGES[:4]} | {
        path.name: path for path in (ROOT / "pixlat").glob("*.py")
    }
    assert {link.name: link.resolve() for link in links.iterdir()} == expected


@pytest.mark.parametrize("package", PACKAGES[:4])
def test_every_folder_says_what_it_is_and_everything_public_has_a_docstring(package):
    assert (ROOT / package / "README.md").exists()
    for path in (ROOT / package).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and len(node.body) > 3
            ):
                assert ast.get_docstring(node), (path, node.name)


@pytest.mark.parametrize(
    "module",
    [
        "launch.run",
        "launch.status",
        "evaluation.leaderboard",
        "evaluation.records.record",
        "evaluation.judges.shipped",
        "evaluation.run",
        "evaluation.reference",
        "evaluation.sweep",
        "common.config.schema",
    ],
)
def test_no_torch_before_it_is_needed(module):
    code = f"import sys, pixlat.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
