"""Speed of a method on this machine: `python evaluation/speed.py method=jit preset=imagenet256-b
speed.batch=2` prints one JSON object.

Takes the keys of launch/run.py, and speed.batch (images a training step and a sampling batch; default 8),
speed.steps (timed steps; default 10) and speed.sample=false to time training only, as for a stage that does not sample.
Weights are random: speed does not depend on them.
Training is timed in train.precision, sampling in eval.precision, as in a run. A preset's train.compile=true holds
on GPUs; on a CPU, where compiling takes minutes, only if the command asks for it. What is being done is told on stderr.

`python evaluation/speed.py memory method=... speed.batch=...` measures what a training step takes,
beside what common/accounting/memory.py predicts.

`python evaluation/speed.py knobs method=... speed.batch=...` tells what recomputed blocks, compiled blocks,
exact attention and kept outputs of frozen networks do to speed and memory, each beside the plain run.

`python evaluation/speed.py data data=folder data.path=... data.image_size=256` tells how many images
a second one core reads, in the order of the files and at random as training does:
divide what your GPUs take by it for the number of loader processes.

`python evaluation/speed.py frechet [dims]` times the Fréchet distance against torch-fidelity's and clean-fid's,
in one run on the same statistics.

`python evaluation/speed.py neighbours 256 512` times the search for nearest training images (neighbours.png)
of a whole run at these sizes, now and as it was first, on a GPU where there is one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from pixlat.common.command_line import as_command
from pixlat.common.config.resolve import resolve, split_overrides, sweep
from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.evaluation.bench.data import measure_data
from pixlat.evaluation.bench.options import configurations
from pixlat.evaluation.bench.steps import measure
from pixlat.methods import get_spec


@as_command
def main(arguments: list[str]) -> int:
    """Prints one JSON object for each configuration; the exit code is 2 for a mistake in the command."""
    if not arguments or "--help" in arguments:
        print(__doc__)
        return 0
    try:
        for measured in measurements(arguments):
            print(json.dumps(measured, indent=1))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measurements(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """What the command asks for, one after the other."""
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
        for run, options in configurations(rest):
            yield measure_memory(run, int(options["speed.batch"]))
    else:
        for run, options in configurations(arguments):
            yield measure(
                run, int(options["speed.batch"]), int(options["speed.steps"]), options["speed.sample"] == "true"
            )


def measure_frechet(arguments: list[str]) -> dict[str, Any]:
    """The comparison of Fréchet distances at the given number of dimensions, 2048 if there is none."""
    from pixlat.evaluation.bench.frechet import compare

    if arguments and not arguments[0].isdigit():
        raise UserError(f"frechet {arguments[0]}: the number of dimensions is wanted, for example frechet 2048.")
    return compare(int(arguments[0]) if arguments else 2048)


def measure_neighbours(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """The comparison of searches at each of the given sizes."""
    import torch

    from pixlat.evaluation.bench.neighbours import compare

    if odd := [each for each in arguments if not each.isdigit() or int(each) == 0]:
        raise UserError(f"neighbours {odd[0]}: sizes of images are wanted, for example neighbours 256 512.")
    for size in arguments or ["256"]:
        yield compare(int(size), device="cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
