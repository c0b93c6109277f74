"""Rules of the layout: who may import whom, what is documented, and that nothing heavy is imported early."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "methods", "evaluation", "launch")
FORBIDDEN = {"common": ("methods", "evaluation", "launch"), "methods": ("evaluation", "launch"), "evaluation": ("launch",)}


def runtime_imports(path: Path) -> Iterator[str]:
    """The modules that a file imports when it runs; those under `if TYPE_CHECKING` are for type checkers only."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return walk(ast.parse(path.read_text()))


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_go_one_way(package):
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in runtime_imports(path)
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert not wrong


def test_methods_do_not_import_each_other():
    for path in (ROOT / "methods").glob("*/*.py"):
        others = [name for name in runtime_imports(path) if name.startswith("methods.") and name.split(".")[1] not in (path.parent.name, "base")]
        assert not others, (path, others)


def test_the_trainer_the_evaluator_and_the_launcher_name_no_method():
    names = [folder.name for folder in (ROOT / "methods").iterdir() if (folder / "method.py").exists()]
    assert "jit" in names
    for package in ("common", "evaluation", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
            exempt = path.name == "config.py" or path.parent.name == "claims"  # the default of `method`; statements about methods
            assert not words & set(names) or exempt, path


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_says_what_it_is_and_everything_public_has_a_docstring(package):
    assert (ROOT / package / "README.md").exists()
    for path in (ROOT / package).rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and len(node.body) > 3:
                assert ast.get_docstring(node), (path, node.name)


@pytest.mark.parametrize(
    "module",
    [
        "launch.run",
        "launch.status",
        "evaluation.leaderboard",
        "evaluation.record",
        "evaluation.run",
        "evaluation.reference",
        "evaluation.sweep",
        "common.config",
    ],
)
def test_no_torch_before_it_is_needed(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
