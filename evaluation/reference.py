"""Reference statistics of real images, and the files that protocols need.

  pixlat reference fetch-plan protocol=adm256    what to get, from where, its size and digest;
                                                 downloads nothing
  pixlat reference verify protocol=adm256        whether those files are there and right
  pixlat reference build protocol=clean images=/data/imagenet/train size=256 \\
                         id=imagenet256-train out=clean-reference.safetensors
  pixlat reference show FILE.npz                 what an .npz of ADM, JiT or pMF, or a built
                                                 reference, holds

Files are looked for in $PIXLAT_EVAL_DIR and in torch's cache ($TORCH_HOME/hub/checkpoints), or given
as weights= and reference=. `build` takes every image below the folder through ADM's centre crop to
`size` pixels; with torchrun each process takes its share.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pixlat.common.command_line import as_command
from pixlat.common.errors import UserError
from pixlat.evaluation.command import Syntax, action_of, help_text, lines_of, parse, run_command
from pixlat.evaluation.protocols.named import EMBEDDED, PROTOCOLS, NamedProtocol, get_protocol
from pixlat.evaluation.protocols.needed_files import checked, fetch_plan, verify

if TYPE_CHECKING:
    from pixlat.evaluation.features.collect import ImageBatch


@dataclass
class Keys:
    """The keys of all commands."""

    protocol: str | None = None  # a named protocol; none: all of them, for fetch-plan
    weights: str | None = None  # the extractor's file; none: looked for by its name
    reference: str | None = None  # for verify; none: looked for by its name
    images: str | None = None  # for build: a folder of real images, at any depth
    size: int | None = None  # for build: pixels after the crop
    id: str | None = None  # for build: name of the reference in protocols, for instance imagenet256-train
    split: str = "train"  # for build: which part of the data these images are
    out: str | None = None  # for build: the file to write, .safetensors


SYNTAX = Syntax(
    Keys,
    actions={"fetch-plan": Syntax(), "verify": Syntax(), "build": Syntax(), "show": Syntax(paths=True)},
)


def usage() -> str:
    """Actions, keys and protocols."""
    return "\n".join([help_text(str(__doc__), Keys), "", *lines_of([("Protocols", ", ".join(PROTOCOLS))])])


def work(arguments: Sequence[str]) -> str:
    """Runs one action and returns the text to print."""
    actions: dict[str, Callable[[Keys], str]] = {"fetch-plan": plan_files, "verify": verify_files, "build": build}
    name, rest = action_of("reference", SYNTAX.actions, arguments)
    if name == "show":
        return "\n\n".join(show(Path(file).expanduser()) for file in rest)
    keys, _ = parse(Keys, rest)
    return actions[name](keys)


def plan_files(keys: Keys) -> str:
    """The files to fetch for one protocol, or for all."""
    if keys.protocol == EMBEDDED:
        return fetch_plan(())
    chosen = [_protocol(keys)] if keys.protocol else list(PROTOCOLS.values())
    return "\n\n".join(f"{protocol.name}: {protocol.about}\n{fetch_plan(protocol.files)}" for protocol in chosen)


def verify_files(keys: Keys) -> str:
    """Lists a protocol's files. Raises UserError unless all are correct, so that scripts can rely on the exit code."""
    lines, good = verify(_protocol(keys).files, {"weights": keys.weights, "reference": keys.reference})
    if not good:
        raise UserError("\n".join(lines))
    return "\n".join(lines)


def _protocol(keys: Keys) -> NamedProtocol:
    if keys.protocol is None:
        raise UserError(f"give protocol=, one of {', '.join(PROTOCOLS)}.")
    return get_protocol(keys.protocol)


# -- build -------------------------------------------------------------------------------------------------------------


def build(keys: Keys) -> str:
    """Extracts the features of every image below a folder and writes their statistics."""
    protocol, out = _protocol(keys), Path(str(keys.out)).expanduser()
    for key in ("images", "size", "id", "out"):
        if getattr(keys, key) is None:
            raise UserError(f"build needs {key}=. `pixlat reference --help` has an example.")
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise UserError(f"out={keys.out} must end in .safetensors and lie in a folder that exists.")
    if out.exists():
        raise UserError(f"{out} exists already and would be overwritten. Choose another out=, or remove it.")
    folder, size = Path(str(keys.images)).expanduser(), int(keys.size or 0)
    files = image_files(folder)
    weights = checked(protocol.extractor.file, keys.weights)
    from pixlat.common.processes import join_processes
    from pixlat.evaluation.features import reference_files
    from pixlat.evaluation.features.networks import build_extractor
    from pixlat.evaluation.score.embedded import progress

    state = join_processes()
    extractor = build_extractor(protocol.extractor, weights, state.device)
    entry = {
        "id": str(keys.id),
        "digest": digest_of(folder, files, size),
        "split": keys.split,
        "crop": "adm_center_crop",
    }
    stream = progress(squares(files, size), len(files), "extracting features")
    found = reference_files.build(stream, len(files), extractor, entry)
    if state.is_main_process:
        reference_files.write_built(found, out, extractor, size)
    return f"{out}: {len(files):,} images of {size} px, {extractor.id}"


def image_files(folder: Path) -> list[Path]:
    """Every image file below a folder, by name."""
    from pixlat.common.images.archive import IMAGE_SUFFIXES

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < 2:
        raise UserError(
            f"images={folder} holds {len(files)} image files ({', '.join(IMAGE_SUFFIXES)}). Statistics need at least 2."
        )
    return files


def squares(files: Sequence[Path], size: int) -> Iterator[ImageBatch]:
    """This process's share of the images, centre-cropped."""
    import numpy as np

    from pixlat.common.images.crop import read_square
    from pixlat.evaluation.features.collect import batches

    return batches(lambda indices: np.stack([read_square(files[index], size) for index in indices]), len(files))


def digest_of(folder: Path, files: Sequence[Path], size: int) -> str:
    """Digest of the files' names and sizes in bytes. We do not read their contents, which would take hours."""
    hasher = hashlib.sha256(f"{size}\n".encode())
    for file in files:
        hasher.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\n".encode())
    return hasher.hexdigest()


# -- show --------------------------------------------------------------------------------------------------------------


def show(path: Path) -> str:
    """Text with the arrays of an .npz, or the metadata of a built reference."""
    from pixlat.common.files import sha256_of

    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file.")
    lines = [f"{path}", f"  {path.stat().st_size:,} bytes, sha256 {sha256_of(path)}"]
    if path.suffix == ".safetensors":
        from pixlat.evaluation.features.reference_files import facts_of

        return "\n".join([*lines, *(f"  {key}: {value}" for key, value in facts_of(path).items())])
    from pixlat.evaluation.features.arrays import describe_arrays

    return "\n".join([*lines, *(f"  {line}" for line in describe_arrays(path))])


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(sys.argv[1:] if arguments is None else arguments, usage, work)


if __name__ == "__main__":
    sys.exit(main())
