"""pixlat sample: images from a trained model, as files.

  pixlat sample run=runs/my-run n=64 class=vehicle seed=3 sample.guidance=2 to=vehicles/
  pixlat sample run=runs/my-run n=20 class=vehicle,flag as=png to=two/  classes take turns
  pixlat sample run=runs/my-run class=wishes.txt to=wishes/     a class name or number a line
  pixlat sample run=runs/my-run like=evaluation to=scored/      the images that were scored
  pixlat sample run=hf:owner/name@revision to=out/              an export on the hub
  pixlat sample checkpoint=weights.pth method=NAME preset=NAME to=out/
  torchrun --nproc-per-node 8 -m pixlat sample run=runs/my-run n=50000 class=random as=npz to=big/

The folder gets images/000000.png ..., samples.npz (arr_0 uint8 (N, H, W, 3), labels, seeds), grid.png and
samples.json, which says where they come from. If the command is interrupted, the same command goes on and ends in
the same files. `pixlat evaluate npz=FOLDER/samples.npz` scores them. Image i depends on seed, i, its class and the
settings, but not on the number of processes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pixlat.common.command_line import as_command
from pixlat.common.config.resolve import PRECISIONS, UINT8_RULES, one_of, require, sampling_seeds, split_overrides
from pixlat.common.errors import UserError, close_match
from pixlat.evaluation.command import Syntax, help_text, parse, run_command
from pixlat.launch.sampling.classes import BALANCED, LISTED, Classes, read_classes
from pixlat.launch.sampling.folder import FORMATS, SampleFolder
from pixlat.launch.sampling.request import Order, asked_facts

if TYPE_CHECKING:
    from pixlat.launch.sampling.source import Source

GROUPS = {
    "sample": "the method's sampler, as for `pixlat train`",
    "data": "the data set, if the names of the classes are not beside the weights",
    "model": "the method, for instance where an earlier stage lies",
}
N = 64  # images if the command does not say how many
EVALUATION = "evaluation"
# Keys of other commands that people may try here, and their names here.
MEANT = {
    "num_images": "n",
    "ema": "average",
    "seeds": "seed",
    "labels": "class",
    "classes": "class",
    "out": "to",
    "format": "as",
    "formats": "as",
}


@dataclass
class Keys:
    """The command's keys."""

    run: str | None = None  # a run folder, a folder that `pixlat export` wrote, or hf:owner/name@revision
    checkpoint: str | None = None  # a released file, with method= and preset=
    method: str | None = None  # of the released file
    preset: str | None = None  # of the released file
    to: str | None = None  # the folder for the files; new, empty, or left by the same command
    n: int | None = None  # number of images; none: 64, or as many as a list has lines
    class_: str = BALANCED  # balanced, random, classes by name or number with commas, or a file NAME.txt
    seed: int | None = None  # of the random numbers and of the labels' order; none: 0
    like: str | None = None  # evaluation: n, seed and classes of the run's own evaluation
    as_: str = ",".join(FORMATS)  # which files: png, npz, grid
    average: str | None = None  # which average of the weights, or raw; none: the one that the run is evaluated with
    precision: str | None = None  # auto, bf16, tf32 or fp32; none: the run's eval.precision
    uint8: str | None = None  # round or truncate: how samples become uint8; none: the run's eval.uint8
    batch: int | None = None  # images a process samples at once; none: the run's eval.batch
    device: str = "auto"  # auto or cpu; auto: the accelerator where there is one


SYNTAX = Syntax(Keys, GROUPS)


def usage() -> str:
    """Examples and keys."""
    return help_text(str(__doc__), Keys, GROUPS)


def work(arguments: Sequence[str]) -> str:
    """Samples what the folder lacks and returns what to tell."""
    refuse_other_names(arguments)
    keys, settings = parse(Keys, arguments, tuple(GROUPS))
    formats = check(keys)
    source = find(keys, settings)
    order = order_of(keys, formats, source)
    folder = SampleFolder(Path(str(keys.to)).expanduser(), order.n, order.batch, source.image_size, formats)
    folder.check(asked_facts(order, source))
    folder.check_disk()
    from pixlat.common.processes import join_processes
    from pixlat.launch.sampling.work import make_samples

    state = join_processes(cpu=keys.device == "cpu")
    return make_samples(order, source, folder, state, shlex.join(["pixlat", "sample", *arguments]))


def refuse_other_names(arguments: Sequence[str]) -> None:
    """UserError for a key that other commands have and that is called otherwise here."""
    for key in split_overrides(arguments):
        if key in MEANT:
            raise UserError(f"{key}= is called {MEANT[key]}= here. `pixlat sample --help` lists the keys.")


def check(keys: Keys) -> tuple[str, ...]:
    """Refuses what is wrong whatever the files hold, before any is read. Returns the formats."""
    if (keys.run is None) == (keys.checkpoint is None):
        raise UserError("give exactly one of run= and checkpoint=. `pixlat sample --help` has examples.")
    if keys.to is None:
        raise UserError("to= is missing: the folder for the images, for example to=samples/.")
    check_released(keys)
    for key, lowest in (("n", 1), ("seed", 0), ("batch", 1)):
        if (value := getattr(keys, key)) is not None:
            require(value >= lowest, key, value, f"must be at least {lowest}")
    words = {"precision": PRECISIONS, "uint8": UINT8_RULES, "like": (EVALUATION,), "device": ("auto", "cpu")}
    for key, options in words.items():
        if (value := getattr(keys, key)) is not None:
            one_of(key, value, options)
    if keys.like is not None and (keys.n is not None or keys.class_ != BALANCED):
        raise UserError(f"like={keys.like} says how many images of which classes. Leave n= and class= out, or like=.")
    return read_formats(keys.as_)


def check_released(keys: Keys) -> None:
    """Refuses keys that a released file needs and the command lacks, and keys that the chosen source does not read."""
    if keys.checkpoint is None:
        for key in ("method", "preset"):
            if (value := getattr(keys, key)) is not None:
                raise UserError(f"{key}={value} is not read with run=, whose configuration says it. Leave it out.")
        return
    if keys.method is None or keys.preset is None:
        raise UserError("checkpoint= needs method= and preset=, which say what network the file belongs to.")
    if keys.average is not None:
        raise UserError(f"average={keys.average}: a released file holds one set of weights. Leave the key out.")


def read_formats(asked: str) -> tuple[str, ...]:
    """The formats that `as=` names, each once, in the order of FORMATS."""
    words = [word.strip() for word in asked.strip("[]").split(",")]
    if unknown := [word for word in words if word not in FORMATS]:
        near = close_match(unknown[0], FORMATS)
        raise UserError(f"as={asked}: {unknown[0]!r} is not a kind of file.{near} Kinds: {', '.join(FORMATS)}.")
    return tuple(name for name in FORMATS if name in words)


def find(keys: Keys, settings: dict[str, str]) -> Source:
    """The model that the keys name."""
    from pixlat.launch.sampling.source import EXPORT, find_released, find_run

    chosen = {f"eval.{key}": value for key in ("precision", "uint8") if (value := getattr(keys, key)) is not None}
    if keys.run is None:
        file = Path(str(keys.checkpoint)).expanduser()
        return find_released(file, str(keys.method), str(keys.preset), settings | chosen)
    source = find_run(keys.run, settings | chosen)
    if keys.average is not None and source.kind == EXPORT:
        raise UserError(
            f"average={keys.average}: {source.name} is an export, which holds one set of weights. Leave the key out."
        )
    return source


def order_of(keys: Keys, formats: tuple[str, ...], source: Source) -> Order:
    """What to sample: the command's wishes, and the run's evaluation or the defaults where there is none."""
    classes = read_classes(keys.class_, source.class_names, source.num_classes)
    batch = keys.batch or source.run.eval.batch
    if keys.like is not None:
        n, seed, remark = evaluated(keys, source)
        return Order(n, seed, batch, formats, evaluated_classes(source, n, seed), keys.average, remark)
    n = len(classes.numbers) if classes.law == LISTED else keys.n or N
    rule = f"{keys.class_} lists the classes of {n:,} images. Leave n= out, or change the list"
    require(keys.n in (None, n), "n", keys.n, rule)
    return Order(n, keys.seed or 0, batch, formats, classes, keys.average)


def evaluated(keys: Keys, source: Source) -> tuple[int, int, str]:
    """(number of images, seed, remark for the user) of the run's own evaluation."""
    settings, seeds = source.run.eval, sampling_seeds(source.run)
    require(
        settings.num_images > 0, "like", keys.like, "the run's eval.num_images is 0, so it was not evaluated. Give n="
    )
    seed = seeds[0] if keys.seed is None else keys.seed
    all_seeds = ", ".join(map(str, seeds))
    require(
        seed in seeds, "seed", seed, f"the run was evaluated with {all_seeds}. Give one of them, or leave out like="
    )
    if len(seeds) == 1:
        return settings.num_images, seed, ""
    mean = f"The run's score is the mean over the seeds {all_seeds}"
    return settings.num_images, seed, f"{mean}. These are the images of seed {seed}; seed= chooses another."


def evaluated_classes(source: Source, n: int, seed: int) -> Classes:
    """The classes of the n images of the run's own evaluation. It reads the labels of the data set."""
    from pixlat.common.datasets.load import load_data
    from pixlat.evaluation.score.embedded import evaluation_labels

    labels, law = evaluation_labels(load_data(source.run.data, verify=False), n, seed)
    return Classes(law) if law == BALANCED else Classes(law, tuple(labels.tolist()))


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `pixlat sample`; returns the exit code."""
    return run_command(sys.argv[1:] if arguments is None else arguments, usage, work)


if __name__ == "__main__":
    sys.exit(main())
