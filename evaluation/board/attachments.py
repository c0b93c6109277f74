"""What lies beside a record and belongs on the page: its sample grid as a data URI, and the losses of its log.

Imports no torch.

A record names these files; the names are data. Only regular files inside the record's own folder are opened,
and only up to a size.
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
    """The file `name` of a record's folder; None where there is none (a record may travel alone).

    One outside the folder or huge is a UserError.
    """
    try:
        if not name or not (folder / name).is_file():
            return None
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise UserError(f"{folder}: the record names {name!r}, which is outside its folder and not opened.")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: is larger than {MAX_BYTES >> 20} MiB and not put on a page.")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise (
            error
            if isinstance(error, UserError)
            else UserError(f"{folder}: the record names {name!r}, which cannot be read: {error}")
        ) from error
    return path


def grid_uri(path: Path) -> tuple[str, int, int]:
    """A picture as a WebP data URI at most 720 pixels wide, with its width and height.

    What is no picture is a UserError.
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
    except Exception as error:  # Pillow's decoders meet damaged bytes with whatever they lead to
        raise UserError(f"{path}: cannot be read as a PNG: {error or type(error).__name__}") from error
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode(), picture.width, picture.height


def losses(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Every loss of a metrics.jsonl over the images seen, at most 200 points each, as means of equal stretches.

    A broken file is a UserError.
    """
    try:
        rows = read_rows(path)
        return {name: thinned(points) for name in _loss_names(rows) if (points := _points(rows, name))}
    except Exception as error:  # names and values of a log may be anything
        raise UserError(f"{path}: cannot be read as a log of metrics: {error}") from error


def _loss_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The total losses, one a phase."""
    return sorted({name for row in rows for name in row if name.rpartition("/")[2] == "loss"})


def _points(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    pairs = [(float(row["images"]), float(row[name])) for row in rows if name in row]
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most CURVE_POINTS points: means of stretches of equal length, rounded to five digits."""
    length = -(-len(points) // CURVE_POINTS) if points else 1
    stretches = [points[start : start + length] for start in range(0, len(points), length)]
    return [(_mean([x for x, _ in stretch]), _mean([y for _, y in stretch])) for stretch in stretches]


def _mean(values: Sequence[float]) -> float:
    return float(f"{math.fsum(values) / len(values):.5g}")


def grid_of(record: Record, folder: Path) -> tuple[str, int, int] | None:
    """The record's sample grid, or that of its reconstructions; None where it has neither."""
    paths = (attachment(folder, record.get("artifacts", {}).get(key)) for key in ("grid_png", "reconstruction_png"))
    path = next((path for path in paths if path), None)
    return grid_uri(path) if path else None


def losses_of(record: Record, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """The losses of the record's log; none where it has none."""
    path = attachment(folder, record.get("artifacts", {}).get("log"))
    return losses(path) if path else {}
