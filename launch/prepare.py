"""Prepares files once that many runs then use.

  pixlat prepare images     the training and held-out images, decoded and cropped once, in files
                            that a run reads with data=shards data.path=FOLDER
  pixlat prepare latents    the moments of every training image's latents, in files that a run
                            reads with data.latents=FOLDER
  pixlat prepare tokenizer  the weights and the facts of an autoencoder that you have trained
  pixlat prepare judges     the networks that judge images of emoji32, trained and validated
  pixlat import             a run folder from a file that a method's authors released
  pixlat export             a run's weights as safetensors, its configuration and a model card

`pixlat prepare images --help` has examples and keys. The same command again continues where it was
stopped, or says that everything is there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from pixlat.common.command_line import as_command
from pixlat.common.config.resolve import resolve, split_overrides
from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError, close_match
from pixlat.evaluation.command import (
    Syntax,
    action_of,
    asks_for_help,
    groups_of_a_run,
    help_text,
    needed,
    parse,
    run_command,
)
from pixlat.methods import get_spec


@dataclass
class ImagesKeys:
    """The keys of `pixlat prepare images`."""

    to: str | None = None  # the new folder
    workers: int | None = None  # processes; none: one for each core
    shard_images: int = 8192  # images in a file


@dataclass
class LatentsKeys:
    """The keys of `pixlat prepare latents`."""

    to: str | None = None  # the new folder
    batch: int = 64  # images that the encoder gets at once
    dtype: str = "float32"  # float32 or float16
    device: str = "auto"  # auto, cpu or cuda; auto: a GPU if there is one


@dataclass
class TokenizerKeys:
    """The keys of `pixlat prepare tokenizer`."""

    from_: str | None = None  # the folder of a finished run of method=vae
    to: str | None = None  # the new file of weights; the facts go into a .json file beside it


@dataclass
class JudgesKeys:
    """The keys of `pixlat prepare judges`."""

    to: str | None = None  # the new folder
    only: str | None = None  # the id of one judge; none: all of them
    steps: int | None = None  # steps of the training, for a trial; none: as many as the recipe has


@dataclass
class ImportKeys:
    """The keys of `pixlat import`."""

    method: str | None = None  # the method whose weights the file holds
    file: str | None = None  # the released file, or a folder that `pixlat export` wrote
    name: str | None = None  # name of the run folder; none: the file's name
    out: str = RunConfig.out  # the folder in which the run folder is created
    preset: str | None = None  # none: the preset with the file's architecture
    weights: str | None = None  # which weights to take if the file holds several
    licence: str | None = None  # licence of the weights, for the run's model card


@dataclass
class ExportKeys:
    """The keys of `pixlat export`."""

    from_: str | None = None  # a run folder
    to: str | None = None  # the new folder
    ema: str | None = None  # the run's average to export; none: the one that it was evaluated with; raw: no average
    licence: str = ""  # licence of the weights, for the model card


def images(keys: ImagesKeys, rest: dict[str, str]) -> str:
    """Decodes and crops a data set."""
    folder, workers = (
        Path(*needed(keys, "prepare images", "to")).expanduser(),
        keys.workers if keys.workers is not None else os.cpu_count() or 1,
    )
    data = resolve(get_spec(RunConfig.method), rest).data
    from pixlat.common.datasets.load import load_data
    from pixlat.common.datasets.write_shards import write_shards

    source, start = load_data(data), time.perf_counter()
    card = write_shards(
        folder, source, workers, keys.shard_images, source.train.resize if data.crop == "random" else None
    )
    seconds, count = time.perf_counter() - start, source.info.num_train + source.info.num_heldout
    skipped = [reason for part in card.parts.values() for reason in part.skipped.values()]
    faults = [f"  {reason}" for reason in skipped]
    result = (
        f"{count} images of {card.image_size} px under {folder}, {count / seconds:.0f} images/s on "
        f"{max(1, workers)} processes; {len(skipped)} skipped"
    )
    crops = f" data.crop=random data.resize={card.resize}" if card.resize else ""
    return "\n".join([result, *faults, f"Use them with data=shards data.path={folder}{crops}"])


def latents(keys: LatentsKeys, rest: dict[str, str]) -> str:
    """Encodes a training set and its mirror images."""
    folder = Path(*needed(keys, "prepare latents", "to")).expanduser()
    run = resolve(get_spec(rest.get("method", RunConfig.method)), rest)
    if not hasattr(run.model, "tokenizer"):
        raise UserError(f"method={run.method} has no tokenizer, so it has no latents to prepare.")
    import torch

    from pixlat.common.datasets.load import load_data
    from pixlat.common.frozen.store_latents import write_latents
    from pixlat.common.frozen.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(run.model.tokenizer, run.model.tokenizer_path)
    source = load_data(run.data)
    tokenizer.load()
    device = keys.device if keys.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    card = write_latents(folder, source.train, tokenizer.to(device), keys.batch, keys.dtype)
    result = (
        f"{card.images} images and their mirror images, moments {card.shape}, in {len(card.shards)} files "
        f"under {folder}."
    )
    return f"{result} Use them with data.latents={folder}"


def tokenizer(keys: TokenizerKeys, _: dict[str, str]) -> str:
    """Writes the weights of a run's autoencoder, and its facts with the error on held-out images."""
    folder, file = (Path(each).expanduser() for each in needed(keys, "prepare tokenizer", "from", "to"))
    from pixlat.common.config.saved import read_config
    from pixlat.common.frozen.export_tokenizer import export_tokenizer
    from pixlat.evaluation.records.record import RESULT, read_record

    read_config(folder)  # UserError if it is not a run folder
    if not (folder / RESULT).is_file():
        raise UserError(
            f"from={folder} has no {RESULT}, so the cost of its training is not known. Give the folder of a "
            "finished run of method=vae."
        )
    card = export_tokenizer(folder, file, read_record(folder / RESULT))
    return (
        f"{file} ({card['bytes']:,} bytes, sha256 {card['sha256']}), {card['psnr_heldout']:.2f} dB on held-out images"
    )


def judges(keys: JudgesKeys, _: dict[str, str]) -> str:
    """Trains the judges of emoji32, or one of them, and validates them."""
    folder = Path(*needed(keys, "prepare judges", "to")).expanduser()
    from pixlat.evaluation.judges.shipped import JUDGES

    if keys.only not in (None, *JUDGES):
        raise UserError(
            f"only={keys.only!r} is not a judge.{close_match(str(keys.only), JUDGES)} Judges: {', '.join(JUDGES)}."
        )
    if keys.steps is not None and keys.steps < 1:
        raise UserError(f"steps={keys.steps} is not a number of training steps. Give 1 or more, or leave it out.")
    from pixlat.evaluation.judges.prepare import prepare
    from pixlat.evaluation.judges.recipe import RECIPES

    chosen = {name: recipe for name, recipe in RECIPES.items() if keys.only in (None, name)}
    if keys.steps is not None:
        chosen = {name: replace(recipe, steps=keys.steps) for name, recipe in chosen.items()}
    return prepare(folder, chosen)


def import_file(keys: ImportKeys, rest: dict[str, str]) -> str:
    """Creates a run folder from a released file, or from a folder that `pixlat export` wrote."""
    given, method = needed(keys, "import", "file", "method")
    file = Path(given).expanduser()
    from pixlat.launch.released import import_released

    return import_released(
        file,
        Path(keys.out).expanduser() / (keys.name or file.stem),
        method,
        keys.weights,
        keys.preset,
        keys.licence,
        rest,
    )


def export(keys: ExportKeys, _: dict[str, str]) -> str:
    """Writes the files with which others can use a run's weights."""
    folder, to = (Path(each).expanduser() for each in needed(keys, "export", "from", "to"))
    from pixlat.launch.export import export_run

    return export_run(folder, to, keys.ema, keys.licence)


IMAGES = Syntax(ImagesKeys, {"data": "the data set, as for `pixlat train`"})
LATENTS = Syntax(LatentsKeys, groups_of_a_run())
TOKENIZER = Syntax(TokenizerKeys)
JUDGES = Syntax(JudgesKeys)
IMPORT = Syntax(ImportKeys, groups_of_a_run("method", "preset"))
EXPORT = Syntax(ExportKeys)
SYNTAX = Syntax(
    actions={
        "images": IMAGES,
        "latents": LATENTS,
        "tokenizer": TOKENIZER,
        "judges": JUDGES,
        "import": IMPORT,
        "export": EXPORT,
    }
)

IMAGES_HELP = """\
The training and held-out images, decoded and cropped once.

  pixlat prepare images data=tar data.path=/data/imagenet-wds data.image_size=256 to=/scratch/in256

A run reads them with data=shards data.path=FOLDER. With data.crop=random the files also hold the whole
training images, resized to data.resize pixels, which a run with the same two keys crops.
"""
LATENTS_HELP = """\
The moments of the latents of every training image and of its mirror image.

  pixlat prepare latents method=reg preset=imagenet256-xl data.path=/data/imagenet/train to=/latents

A run reads them with data.latents=FOLDER.
"""
TOKENIZER_HELP = """\
Two files of an autoencoder that you have trained: its weights, and its facts (recipe, digest, cost and errors).

  pixlat prepare tokenizer from=runs/my-autoencoder to=autoencoder.safetensors
"""
JUDGES_HELP = """\
The judges of emoji32: small networks that no method uses, trained from scratch on classes, art styles and Unicode
subgroups of the training images, and tested on degraded held-out images. The package contains those that this command
made; run it to check them or to try another recipe.

  pixlat prepare judges to=judges
  pixlat prepare judges to=trial only=emoji32-plain-v1 steps=1000

Each judge takes 10 to 20 minutes on one core. The same command again continues an interrupted training.
"""
IMPORT_HELP = """\
A run folder from a file that a method's authors released. `pixlat sample` and `pixlat evaluate` can use it.

  pixlat import method=jit file=JiT-B-16/checkpoint-last.pth name=jit-b16-released

Give settings that the file does not contain as keys of `pixlat train`.
"""
EXPORT_HELP = """\
A run's weights as safetensors, its configuration and a model card.

  pixlat export from=runs/my-run to=my-run-released licence=MIT
"""

Work: TypeAlias = Callable[[Any, dict[str, str]], str]
ACTIONS: dict[str, tuple[Work, str]] = {
    "images": (images, IMAGES_HELP),
    "latents": (latents, LATENTS_HELP),
    "tokenizer": (tokenizer, TOKENIZER_HELP),
    "judges": (judges, JUDGES_HELP),
    "import": (import_file, IMPORT_HELP),
    "export": (export, EXPORT_HELP),
}


def usage(action: str) -> str:
    """Example and keys of one action."""
    syntax = SYNTAX.actions[action]
    return help_text(ACTIONS[action][1], syntax.keys, syntax.groups)


def do(action: str, arguments: Sequence[str]) -> str:
    """Does one action and returns the message for the user."""
    if lists := [key for key, values in split_overrides(arguments).items() if len(values) > 1]:
        raise UserError(
            f"{', '.join(lists)}: give one value each. Comma lists are for `pixlat train`; this command prepares one "
            "thing at a time."
        )
    syntax = SYNTAX.actions[action]
    return ACTIONS[action][0](*parse(syntax.keys, arguments, tuple(syntax.groups)))


def work(arguments: Sequence[str]) -> str:
    """Does the action that the first word names."""
    return do(*action_of("prepare", SYNTAX.actions, arguments))


def run_action(action: str, arguments: Sequence[str]) -> int:
    """Runs an action as a separate command. Returns the exit code."""
    return run_command(arguments, lambda: usage(action), lambda given: do(action, given))


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 finished, 2 a mistake in the command or its inputs."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if asks_for_help(arguments) and arguments[0] in ACTIONS:
        return run_action(arguments[0], arguments[1:])
    return run_command(arguments, lambda: help_text(str(__doc__)), work)


@as_command
def main_import(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `pixlat import`; returns the exit code."""
    return run_action("import", sys.argv[1:] if arguments is None else arguments)


@as_command
def main_export(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `pixlat export`; returns the exit code."""
    return run_action("export", sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
