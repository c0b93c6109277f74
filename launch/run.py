"""`pixlat train`: trains, samples, evaluates, writes a record and shows the leaderboard.

`python launch/run.py` is the same command.

Nothing here imports torch before the configuration is known to be right: `--help` and a wrong key answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields

from pixlat.common.command_line import HELP_WORDS, as_command
from pixlat.common.config.explain import preset_notes
from pixlat.common.config.resolve import resolve, split_overrides, sweep
from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError, close_match
from pixlat.common.progress import say_last
from pixlat.evaluation.command import Syntax, filled, key_rows, lines_of, split_words
from pixlat.launch.cluster.sites import with_site
from pixlat.launch.job.budget import within_budget
from pixlat.methods import MethodSpec, get_spec, registered

USAGE = """\
pixlat train: trains a method, samples from it, scores the samples and ranks them

  pixlat train method=jit                 the demo on the embedded data (minutes on a laptop)
  pixlat train method=jit data=folder data.path=~/photos data.image_size=64 name=photos
  pixlat train method=jit preset=imagenet256-b data.path=/data/imagenet/train
  pixlat train method=jit preset=imagenet256-h dry_run=true      what it would do and cost
  pixlat train method=jit seed=0,1,2 train.lr=1e-3,2e-3          comma lists sweep: six runs
  pixlat train method=jit,pmf budget.train_macs=1e13 eval.every_images=6400      equal cost
  pixlat train method=jit preset=imagenet256-b data.path=... cluster=slurm cluster.partition=... \\
               cluster.nodes=4 cluster.gpus_per_node=8 cluster.timeout_min=1440  the same as a job

The same command again resumes the run, or says that it is finished. It never overwrites.
`pixlat status` tells how all runs are.

Keys
  pixlat train method=NAME --help         the presets of a method and its own keys
  pixlat train --help GROUP               keys of every run: run, data, train, budget, eval, cluster
  pixlat train method=NAME --help all     everything
"""
RUN, ALL = "run", "all"  # words of the help: the keys that are in no group, and all keys
NESTED = {
    each.name: type(each.default_factory()) for each in fields(RunConfig) if callable(each.default_factory)
}  # the groups of a run's keys
OWN = ("model", "sample")  # the groups whose keys are the method's
SYNTAX = Syntax(groups={each.name: "" for each in fields(RunConfig)})


def help_text(method: str | None = None, groups: Sequence[str] = ()) -> str:
    """Examples and methods. With a method its presets and own keys; with groups the keys of these groups instead."""
    if groups:
        return "\n\n".join(group_help(group, method) for group in dict.fromkeys(expanded(groups, method)))
    if method is not None:
        return method_help(get_spec(method))
    return "\n".join([USAGE, "Methods", *lines_of(map(method_line, sorted(registered())), METHOD_WIDTH)])


METHOD_WIDTH = 16  # columns of the methods' names in the help


def method_line(name: str) -> tuple[str, str]:
    """The method's row of the help. Of a plug-in that cannot be imported it says why."""
    try:
        return name, get_spec(name).title
    except UserError as error:
        return name, str(error)


def method_help(spec: MethodSpec) -> str:
    """Presets and keys of one method, and how to see the other keys."""
    groups = [f"{group} ({len(list(keys_of(group)))})" for group in (RUN, *NESTED)]
    parts = [
        [f"pixlat train method={spec.name}: {spec.title} ({spec.paper})"],
        ["Presets", *lines_of(preset_notes(spec.presets).items())],
        [
            "Keys of the method: key (type, default before the preset): meaning",
            *(line for group in OWN for line in lines_of(keys_of(group, spec))),
        ],
        [
            "Keys of every run, by group: " + ", ".join(groups),
            f"`pixlat train method={spec.name} --help GROUP` lists a group's keys, `--help all` everything.",
        ],
    ]
    return "\n\n".join("\n".join([filled(head), *lines]) for head, *lines in parts)


def expanded(groups: Sequence[str], method: str | None) -> list[str]:
    """The groups that are asked for, `all` spelled out; an unknown one is a UserError."""
    options = [RUN, *NESTED, *(OWN if method else ())]
    for group in groups:
        if group in OWN and not method:
            raise UserError(f"the keys of {group} are the method's: `pixlat train method=NAME --help {group}`.")
        if group not in (*options, ALL):
            raise UserError(
                f"there are no keys called {group!r}.{close_match(group, (*options, ALL))} `--help` takes "
                f"{', '.join((*options, ALL))}."
            )
    return options if ALL in groups else list(groups)


def group_help(group: str, method: str | None) -> str:
    """The keys of one group."""
    whose = (
        f"Keys of method={method}, {group}"
        if method and group in OWN
        else "Keys of every run"
        if group == RUN
        else f"Keys of every run, {group}"
    )
    return "\n".join(
        [
            f"{whose}: key (type, default before the preset): meaning",
            *lines_of(keys_of(group, get_spec(method) if method else None)),
        ]
    )


def keys_of(group: str, spec: MethodSpec | None = None) -> Iterator[tuple[str, str]]:
    """The rows of a group's keys; those of model and sample are the spec's."""
    if group in OWN and spec is not None:
        yield from key_rows(spec.config if group == "model" else spec.sample, group)
    elif group == RUN:
        yield from (row for row in key_rows(RunConfig) if "." not in row[0].partition(" ")[0])
    else:
        yield from key_rows(NESTED[group], group)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether help is wanted: without arguments, or with a word for it among them."""
    return not arguments or any(argument in HELP_WORDS for argument in arguments)


def help_for(arguments: Sequence[str]) -> str:
    """The help of the method (the first of a comma list) and of the groups of keys that the other arguments name."""
    words, given = split_words([argument for argument in arguments if argument not in HELP_WORDS])
    overrides = split_overrides(given)
    return help_text(overrides["method"][0] if "method" in overrides else None, words)


def configurations(arguments: Sequence[str]) -> list[RunConfig]:
    """The runs that the command line asks for, checked, in order."""
    if method := next((word for word in split_words(arguments)[0] if word in registered()), None):
        raise UserError(f"{method!r} is not of the form key=value. Did you mean method={method}?")
    choices = [with_site(choice) for choice in sweep(split_overrides(arguments))]
    for choice in choices:
        if "train.images" in choice and (budget := next((key for key in choice if key.startswith("budget.")), None)):
            raise UserError(
                f"train.images={choice['train.images']} and {budget}={choice[budget]} both say how long the "
                "training is. Keep one."
            )
    runs = [resolve(get_spec(choice.get("method", RunConfig.method)), choice) for choice in choices]
    if len({(run.cluster.name, run.out, run.dry_run) for run in runs}) > 1:
        raise UserError("cluster, out and dry_run cannot be swept: give the command once for each.")
    return runs


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 finished, 2 a mistake in the command or its inputs, 128 + signal when
    stopped.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
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
