"""The worked example of methods/README.md does what it says, from another package and from the registry."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pixlat.common.config.resolve import resolve
from pixlat.launch.job.dry_run import describe_run
from pixlat.methods import METHODS, get_spec

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The code of the README as files, with the entry point in the metadata of an installed package."""
    text = (ROOT / "methods" / "README.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"```(?:python|yaml)\n# (tiny_flow/\S+)\n(.*?)```", text, flags=re.DOTALL):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(code, encoding="utf-8")
    (section, line) = re.search(r'```toml\n\[project\.entry-points\."(.*?)"\]\n(.*?)\n```', text).groups()  # type: ignore[union-attr]
    installed = tmp_path / "tiny_flow-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-flow\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[{section}]\n{line.replace(chr(34), '')}\n")
    return tmp_path


def test_it_runs_as_another_package_by_its_entry_point(package: Path) -> None:
    short = [
        "train.images=640",
        "train.batch=32",
        "train.preview_images=0",
        "eval.num_images=0",
        "eval.grid_columns=2",
        f"out={package}/runs",
        "name=tiny",
    ]
    environment = os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "launch/run.py", "method=tiny", *short]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    record = json.loads((package / "runs" / "tiny" / "result.json").read_text())
    assert (
        record["system"]["method"] == "tiny"
        and record["sampling"]["nfe_evals"] == 8
        and record["train"]["images_seen"] == 640
    )
    assert (package / "runs" / "tiny" / "samples.png").stat().st_size > 0


def test_one_line_of_the_registry_is_enough(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setitem(METHODS, "tiny", "tiny_flow.config:SPEC")
    told = describe_run(resolve(get_spec("tiny"), {"model.width": "8"}))
    macs = 16 * 16 * 9 * (4 * 8 + 8 * 3)
    assert f"8 x network of {macs / 1e9:.4g} GMACs" in told and "8 evaluations" in told
