"""The one command: `python launch/run.py method=jit`.

Trains, samples, evaluates, writes a record and shows the leaderboard.

Nothing here imports torch before the configuration is known to be right: `--help` and a wrong key answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pixlat.common.command_line import as_command
from pixlat.common.config.explain import describe
from pixlat.common.config.resolve import load_presets, resolve, split_overrides, sweep
from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.common.progress import say_last
from pixlat.launch.cluster.sites import with_site
from pixlat.launch.job.budget import within_budget
from pixlat.methods import MethodSpec, get_spec, registered

USAGE = """\
pixlat: pixel space against latent space in image generation

  python launch/run.py method=jit   train, sample, evaluate and rank the demo on the embedded data (minutes on a laptop)
  python launch/run.py method=jit preset=imagenet256-b data.path=/data/imagenet/train
  python launch/run.py method=jit data=folder data.path=~/photos data.image_size=64 name=photos
  python launch/run.py method=jit seed=0,1,2 train.lr=1e-3,2e-3    comma lists sweep: six runs, one after the other
  python launch/run.py method=jit preset=imagenet256-h dry_run=true    what it would do and cost; writes nothing
  python launch/run.py method=jit preset=imagenet256-b data.path=... cluster=slurm cluster.partition=... \\
      cluster.nodes=4 cluster.gpus_per_node=8 cluster.timeout_min=1440    the same as a job; a sweep is one array
  python launch/run.py method=jit,pmf budget.train_macs=1e13 eval.every_images=6400    equal cost, scored as they train
  python launch/status.py                                          how all runs are: state, progress, time left, log

The same command again resumes the run, or says that it is finished. It never overwrites.
"""


def help_text(method: str | None = None) -> str:
    """Examples and methods; with a method, its presets and every key of its runs with type,
    default and meaning instead.
    """
    if method is not None:
        return "\n".join(method_help(get_spec(method)))
    lines = [
        USAGE,
        "Methods; `python launch/run.py method=NAME --help` prints the presets of one and every key",
        *map(method_line, sorted(registered())),
    ]
    return "\n".join(lines)


def method_line(name: str) -> str:
    """The method's line of the help.

    A plug-in that cannot be imported gets a line that says why, and hides no other method.
    """
    try:
        spec = get_spec(name)
    except UserError as error:
        return f"  {name:<12} {error}"
    return f"  {name:<12} {spec.title}"


def method_help(spec: MethodSpec) -> list[str]:
    """Presets and keys of one method."""
    presets = [f"  {preset:<20} {settings.get('about', '')}" for preset, settings in load_presets(spec.presets).items()]
    own = [_key_line(*row) for row in (*describe(spec.config, "model"), *describe(spec.sample, "sample"))]
    title = f"method={spec.name}: {spec.title} ({spec.paper})"
    keys = [_key_line(*row) for row in describe(RunConfig)]
    return [
        title, "", "Presets", *presets, "", "Keys of the method: key (type, default before the preset): meaning", *own,
        "", "Keys of every run", *keys,
    ]  # fmt: skip


def _key_line(key: str, kind: str, default: str, meaning: str) -> str:
    return f"  {f'{key} ({kind}, {default})':<58} {meaning}"


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether help is wanted: without arguments, or with a word for it among them."""
    return not arguments or any(argument in ("-h", "--help", "help") for argument in arguments)


def help_for(arguments: Sequence[str]) -> str:
    """The help of the method that the other arguments name, or the general one; the first of a comma list is shown."""
    overrides = split_overrides([argument for argument in arguments if argument not in ("-h", "--help", "help")])
    return help_text(overrides["method"][0] if "method" in overrides else None)


def configurations(arguments: Sequence[str]) -> list[RunConfig]:
    """The runs that the command line asks for, checked, in order."""
    choices = [with_site(choice) for choice in sweep(split_overrides(arguments))]
    for choice in choices:
        if "train.images" in choice and (budget := next((key for key in choice if key.startswith("budget.")), None)):
            raise UserError(
                f"train.images={choice['train.images']} and {budget}={choice[budget]} both say how long "
                "the training is. Keep one."
            )
    runs = [resolve(get_spec(choice.get("method", RunConfig.method)), choice) for choice in choices]
    if len({(run.cluster.name, run.out, run.dry_run) for run in runs}) > 1:
        raise UserError("cluster, out and dry_run cannot be swept: give the command once for each.")
    return runs


@as_command
def main() -> int:
    """Entry point; returns the exit code: 0 finished, 2 a mistake in the command or its inputs,
    128 + signal when stopped.
    """
    arguments = sys.argv[1:]
    try:
        if asks_for_help(arguments):
            print(help_for(arguments))
            return 0
        runs = [within_budget(run) for run in configurations(arguments)]
        if runs[0].cluster.name != "here":
            from pixlat.launch.cluster.submit import submit_all

            return submit_all(runs)
        from pixlat.launch.job.execute import run_all

        return run_all(runs)
    except UserError as error:
        say_last(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
