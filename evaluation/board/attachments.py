"""Reads the files beside a record for the page: the sample grid as a data URI, and the losses in the log.

A record names these files, and the names may be hostile. Therefore this module opens only regular files inside the
record's folder, and only up to a maximal size. Imports no torch.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixlat.common.errors import UserError
from pixlat.common.files import read_rows
from pixlat.evaluation.records.record import Record

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 2**25
GRID_WIDTH = 720  # pixels on the page
CURVE_POINTS = 200


def attachment(folder: Path, name: str | None) -> Path | None:
    """The file `name` of a record's folder; None if there is none, because somebody copied only the record.

    Raises UserError for a file outside the folder or a file that is too large.
    """
    try:
        if not name or not (folder / name).is_file():
            return None
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise UserError(f"{folder}: the record names {name!r}, which is outside its folder, so it is not opened.")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: is larger than {MAX_BYTES >> 20} MiB, so the page does not show it.")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise (
            error
            if isinstance(error, UserError)
            else UserError(f"{folder}: the record names {name!r}, which cannot be read: {error}")
        ) from error
    return path


def grid_uri(path: Path) -> tuple[str, int, int]:
    """A picture as a WebP data URI at most 720 pixels wide, with its width and height.

    Raises UserError for a file that is no PNG.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path}: {image.width} x {image.height} pixels are too many for a page.")
            picture = image.convert("RGB")
        if picture.width > GRID_WIDTH:
            picture = picture.resize(
                (GRID_WIDTH, max(1, round(picture.height * GRID_WIDTH / picture.width))), Image.Resampling.LANCZOS
            )
        stream = io.BytesIO()
        picture.save(stream, format="WEBP", quality=82, method=4)
    except UserError:
        raise
    except Exception as error:  # damaged bytes make Pillow's decoders raise exceptions of many types
        raise UserError(f"{path}: cannot be read as a PNG: {error or type(error).__name__}") from error
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode(), picture.width, picture.height


def losses(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The total loss of every phase in a metrics.jsonl over the images seen, with at most 200 points each.

    Raises UserError for a damaged file.
    """
    try:
        rows = read_rows(path)
        return {name: thinned(points) for name in _loss_names(rows) if (points := _points(rows, name))}
    except Exception as error:  # names and values of a log may be anything
        raise UserError(f"{path}: cannot be read as a log of metrics: {error}") from error


def _loss_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the total losses, one for each phase."""
    return sorted({name for row in rows for name in row if name.rpartition("/")[2] == "loss"})


def _points(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    pairs = [(float(row["images"]), float(row[name])) for row in rows if name in row]
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most CURVE_POINTS points: means over consecutive points in groups of equal size, rounded to five digits."""
    length = -(-len(points) // CURVE_POINTS) if points else 1
    stretches = [points[start : start + length] for start in range(0, len(points), length)]
    return [(_mean([x for x, _ in stretch]), _mean([y for _, y in stretch])) for stretch in stretches]


def _mean(values: Sequence[float]) -> float:
    return float(f"{math.fsum(values) / len(values):.5g}")


def grid_of(record: Record, folder: Path) -> tuple[str, int, int] | None:
    """The record's grid of samples, else its grid of reconstructions, else None."""
    paths = (attachment(folder, record.get("artifacts", {}).get(key)) for key in ("grid_png", "reconstruction_png"))
    path = next((path for path in paths if path), None)
    return grid_uri(path) if path else None


def losses_of(record: Record, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """The losses of the record's log; empty if it has no log."""
    path = attachment(folder, record.get("artifacts", {}).get("log"))
    return losses(path) if path else {}
