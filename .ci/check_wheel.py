"""`check_wheel.py FILE`: a wheel holds pixlat/ and its metadata, and all files of our folders but READMEs' pictures."""

import subprocess
import sys
import zipfile
from pathlib import Path

from pixlat.launch.cluster.snapshot import FOLDERS, place_in_package


def main(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pixlat"}, tops
    tracked = subprocess.run(["git", "ls-files", "--", *FOLDERS, "pixlat"], capture_output=True, text=True, check=True)
    files = [place_in_package(Path(name)).as_posix() for name in tracked.stdout.split()]
    pictures = [name for name in files if name.startswith("pixlat/methods/") and name.endswith(".png")]
    missing = sorted({*files} - {*pictures} - names)
    assert not missing, f"not in the wheel, see [tool.setuptools] in pyproject.toml: {missing}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
