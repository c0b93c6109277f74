"""Speed and memory of a method on this machine, as JSON on stdout.

  pixlat bench method=jit preset=imagenet256-b speed.batch=2
      images/s, MACs/s and memory of training steps and of the sampler
  pixlat bench memory method=jit speed.batch=8
      memory of a training step, measured and predicted
  pixlat bench knobs method=jit speed.batch=8
      what recomputed blocks, compiled blocks, exact attention and kept outputs of frozen networks
      change in speed and memory
  pixlat bench data data=folder data.path=... data.image_size=256
      images a second that one core reads, in the order of the files and at random; the images/s of
      your GPUs divided by it is the number of loader processes that they need
  pixlat bench frechet 2048
      the Fréchet distance of 2048 dimensions beside torch-fidelity's and clean-fid's
  pixlat bench neighbours 256 512
      the search for the nearest training images of a run at these sizes, and its first version

Weights are random, because speed does not depend on them. Training is timed in train.precision,
sampling in eval.precision, as in a run. A preset's train.compile=true holds on GPUs. On a CPU, where
compiling takes minutes, it holds only if the command asks for it. Progress goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from pixlat.common.command_line import as_command
from pixlat.common.config.resolve import resolve, split_overrides, sweep
from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.evaluation.bench.data import measure_data
from pixlat.evaluation.bench.options import GROUPS, Keys, configurations
from pixlat.evaluation.bench.steps import measure
from pixlat.evaluation.command import Syntax, action_of, help_text, run_command
from pixlat.methods import get_spec

ACTIONS = dict.fromkeys(("memory", "knobs", "data"), Syntax(Keys, GROUPS)) | dict.fromkeys(
    ("frechet", "neighbours"), Syntax()
)
SYNTAX = Syntax(Keys, GROUPS, ACTIONS)


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(
        sys.argv[1:] if arguments is None else arguments, lambda: help_text(str(__doc__), Keys, GROUPS), work
    )


def work(arguments: Sequence[str]) -> int:
    """Prints one JSON object for each measurement as soon as it is made. Returns the exit code 0."""
    for measured in measurements(arguments):
        print(json.dumps(measured, indent=1))
    return 0


def measurements(arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The measurements of the command, one after the other."""
    kind, rest = arguments[0], arguments[1:]
    if kind == "frechet":
        yield measure_frechet(rest)
    elif kind == "neighbours":
        yield from measure_neighbours(rest)
    elif kind == "data":
        yield measure_data(resolve(get_spec(RunConfig.method), next(sweep(split_overrides(rest)))))
    elif kind == "knobs":
        from pixlat.evaluation.bench.knobs import compare_knobs

        yield from compare_knobs(rest)
    elif kind == "memory":
        from pixlat.evaluation.bench.knobs import measure_memory, with_exact_allocator

        with_exact_allocator()
        for run, speed in configurations(rest):
            yield measure_memory(run, speed.batch)
    elif "=" in kind:
        for run, speed in configurations(arguments):
            yield measure(run, speed.batch, speed.steps, speed.sample)
    else:
        action_of("bench", SYNTAX.actions, arguments)


def measure_frechet(arguments: Sequence[str]) -> dict[str, Any]:
    """The comparison of Fréchet distances at the given number of dimensions, 2048 if there is none."""
    from pixlat.evaluation.bench.frechet import compare

    if arguments and not arguments[0].isdigit():
        raise UserError(f"frechet {arguments[0]}: give the number of dimensions, for example frechet 2048.")
    return compare(int(arguments[0]) if arguments else 2048)


def measure_neighbours(arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The comparison of searches at each of the given sizes."""
    import torch

    from pixlat.evaluation.bench.neighbours import compare

    if wrong := [size for size in arguments if not size.isdigit() or int(size) == 0]:
        raise UserError(f"neighbours {wrong[0]}: give sizes of images in pixels, for example neighbours 256 512.")
    for size in arguments or ["256"]:
        yield compare(int(size), device="cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())
