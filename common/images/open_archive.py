"""Opens the archives of `data=tar|parquet|arrow`."""

from __future__ import annotations

from pathlib import Path

from pixlat.common.errors import UserError
from pixlat.common.images.archive import Archive
from pixlat.common.images.tables import ArrowArchive, ParquetArchive, TableArchive
from pixlat.common.images.tar import TarArchive


def open_archive(kind: str, root: Path) -> Archive:
    """All files of a kind (a key of ARCHIVES) at or below a path, in the order of their names."""
    archive = ARCHIVES[kind]
    files = [root] if root.is_file() else sorted(root.rglob(f"*{archive.suffix}")) if root.is_dir() else []
    files = [
        file
        for file in files
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]
    if not files:
        raise UserError(
            f"data.path={str(root)!r} holds no {archive.suffix} file. Give the folder of the files, or one file."
        )
    return archive(root, files)


ARCHIVES: dict[str, type[TarArchive | TableArchive]] = {
    "tar": TarArchive,
    "parquet": ParquetArchive,
    "arrow": ArrowArchive,
}
