"""The one command: `python launch/run.py method=jit`. Trains, samples, evaluates, writes a record and shows the leaderboard.

Nothing here imports torch before the configuration is known to be right: `--help` and a wrong key answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, and not another package called `common`

from common.config import RunConfig, describe, load_presets, resolve, split_overrides, sweep
from common.errors import UserError
from launch.budget import within_budget
from launch.sites import with_site
from methods import get_spec, registered

USAGE = """\
pixlat: pixel space against latent space in image generation

  python launch/run.py method=jit                                  train, sample, evaluate and rank the demo on the embedded data (minutes on a laptop)
  python launch/run.py method=jit preset=imagenet256-b data.path=/data/imagenet/train
  python launch/run.py method=jit data=folder data.path=~/photos data.image_size=64 name=photos
  python launch/run.py method=jit seed=0,1,2 train.lr=1e-3,2e-3    comma lists sweep: six runs, one after the other
  python launch/run.py method=jit preset=imagenet256-h dry_run=true    what it would do and cost; writes nothing
  python launch/run.py method=jit preset=imagenet256-b data.path=... cluster=slurm cluster.partition=... cluster.nodes=4 cluster.gpus_per_node=8
                                                                   cluster.timeout_min=1440    the same as a job; a sweep is one array
  python launch/run.py method=jit,pmf budget.train_macs=1e13 eval.every_images=6400    runs of equal cost, scored as they train
  python launch/status.py                                          how all runs are: state, progress, time left, log

The same command again resumes the run, or says that it is finished. It never overwrites.
"""


def help_text() -> str:
    """Examples, methods, presets, and every key with type, default and meaning."""
    lines = [USAGE, "Methods"]
    for name in sorted(registered()):
        spec = get_spec(name)
        lines.append(f"  {name:<10} {spec.title} ({spec.paper})")
    for name in sorted(registered()):
        lines += ["", f"Presets of method={name}"]
        lines += [f"  {preset:<20} {settings.get('about', '')}" for preset, settings in load_presets(get_spec(name).presets).items()]
    lines += ["", "Keys of every run: key (type, default): meaning"]
    lines += [_key_line(*row) for row in describe(RunConfig)]
    for name in sorted(registered()):
        spec = get_spec(name)
        lines += ["", f"Keys of method={name}; defaults before the preset"]
        lines += [_key_line(*row) for row in (*describe(spec.config, "model"), *describe(spec.sample, "sample"))]
    return "\n".join(lines)


def _key_line(key: str, kind: str, default: str, meaning: str) -> str:
    return f"  {f'{key} ({kind}, {default})':<58} {meaning}"


def configurations(arguments: Sequence[str]) -> list[RunConfig]:
    """The runs that the command line asks for, checked, in order."""
    choices = [with_site(choice) for choice in sweep(split_overrides(arguments))]
    for choice in choices:
        if "train.images" in choice and (budget := next((key for key in choice if key.startswith("budget.")), None)):
            raise UserError(f"train.images={choice['train.images']} and {budget}={choice[budget]} both say how long the training is. Keep one.")
    runs = [resolve(get_spec(choice.get("method", RunConfig.method)), choice) for choice in choices]
    if len({(run.cluster.name, run.out, run.dry_run) for run in runs}) > 1:
        raise UserError("cluster, out and dry_run cannot be swept: give the command once for each.")
    return runs


def main() -> int:
    """Entry point; returns the exit code: 0 finished, 2 a mistake in the command or its inputs, 128 + signal when stopped."""
    arguments = sys.argv[1:]
    if not arguments or any(argument in ("-h", "--help", "help") for argument in arguments):
        print(help_text())
        return 0
    try:
        runs = [within_budget(run) for run in configurations(arguments)]
        if runs[0].cluster.name != "here":
            from launch.cluster import submit_all

            return submit_all(runs)
        from launch.job import run_all

        return run_all(runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
