"""The one command: `pixlat COMMAND key=value ...`.

It imports the module of a command once the command is known, so that help and mistakes answer at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pixlat import __version__
from pixlat.common.command_line import HELP_WORDS, as_command

if TYPE_CHECKING:
    from pixlat.evaluation.command import Syntax

USAGE = 2  # the exit code of a mistake in the command line


@dataclass(frozen=True)
class Command:
    """A command: where its `main(arguments) -> exit code` is, as "module:function", and its line in the list."""

    main: str
    about: str
    group: str = ""  # commands without a group are not listed
    syntax: str = ""  # "module:attribute" of its Syntax; empty: SYNTAX of the module of `main`

    def run(self, arguments: Sequence[str]) -> int:
        """Imports the command and runs it. Returns its exit code."""
        main: Callable[[Sequence[str]], int] = load(self.main)
        return main(arguments)

    def load_syntax(self) -> Syntax | None:
        """What may stand on the command's line, or None if the command does not say it."""
        syntax: Syntax | None = load(self.syntax or f"{self.main.partition(':')[0]}:SYNTAX")
        return syntax


COMMANDS: dict[str, Command] = {
    "train": Command("pixlat.launch.run:main", "train a method, then sample, score and rank it", "runs"),
    "sample": Command("pixlat.launch.sample:main", "images from a trained model, as files", "runs"),
    "evaluate": Command("pixlat.evaluation.run:main", "score a run, a checkpoint or finished images", "runs"),
    "sweep": Command("pixlat.evaluation.sweep:main", "try sampling settings, score the best one", "runs"),
    "plan": Command("pixlat.launch.plan:main", "memory, days and GPU-hours of a run on a cluster", "runs"),
    "status": Command("pixlat.launch.status:main", "state, progress, time left and log of all runs", "runs"),
    "leaderboard": Command("pixlat.evaluation.leaderboard:main", "all records as tables and as one page", "results"),
    "compare": Command("pixlat.evaluation.compare:main", "what methods gain, with error bars", "results"),
    "study": Command("pixlat.cli:study", "experiments that look into trained networks", "results"),
    "claims": Command(
        "pixlat.evaluation.studies.claim_tools.command:main", "the papers' statements that a CPU can check", "results"
    ),
    "prepare": Command("pixlat.launch.prepare:main", "images or latents, made once for many runs", "files"),
    "import": Command(
        "pixlat.launch.prepare:main_import", "a released file as a run folder", "files", "pixlat.launch.prepare:IMPORT"
    ),
    "export": Command(
        "pixlat.launch.prepare:main_export",
        "a run's weights, config and model card",
        "files",
        "pixlat.launch.prepare:EXPORT",
    ),
    "reference": Command("pixlat.evaluation.reference:main", "statistics of real images, files of protocols", "files"),
    "bench": Command("pixlat.evaluation.speed:main", "speed and memory of a method on this machine", "machine"),
    "doctor": Command("pixlat.launch.doctor:main", "will pixlat work here, and how fast?", "machine"),
    "completion": Command("pixlat.completion:main", "a script for bash or zsh"),
    "complete": Command("pixlat.completion:main_complete", "what may follow a line; the script asks it"),
}
STUDIES: dict[str, Command] = {
    "collapse": Command(
        "pixlat.evaluation.studies.collapse:main", "do the latents of a method collapse that trains its own encoder?"
    ),
    "hidden-states": Command(
        "pixlat.evaluation.studies.hidden_states:main", "what do a generator's blocks know of the classes?"
    ),
}
# Words that are no commands, with what was probably meant.
MEANT = {
    "run": "train", "eval": "evaluate", "generate": "sample", "speed": "bench", "benchmark": "bench",
    "rank": "leaderboard", "images": "prepare images", "latents": "prepare latents", "tokenizer": "prepare tokenizer",
    "collapse": "study collapse", "hidden-states": "study hidden-states",
}  # fmt: skip

EXAMPLES = """\
  pixlat train method=jit                   a demo: train, sample, score, rank
  pixlat sample run=runs/NAME to=images/    images of what has been trained
  pixlat leaderboard runs=runs              its scores as tables and as one page
"""
STUDY_USAGE = """\
pixlat study: experiments that look into trained networks

  pixlat study collapse method=dsd
  pixlat study hidden-states run=runs/NAME
"""


def load(path: str) -> Any:
    """The object that "module:attribute" names; None if the module has no such attribute."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute, None)


def help_text() -> str:
    """All commands in their groups, on one screen."""
    lines, before = [f"pixlat {__version__}: pixel space against latent space in image generation", "", EXAMPLES], ""
    for name, command in COMMANDS.items():
        if command.group:
            lines.append(f"{command.group if command.group != before else '':<9} {name:<12} {command.about}")
            before = command.group
    return "\n".join([*lines, "", "`pixlat COMMAND --help` explains a command. Settings are written as key=value."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `pixlat`. Returns the command's exit code, or 2 if there is no such command.

    `pixlat method=jit` is `pixlat train method=jit`, and `pixlat help train` is `pixlat train --help`.
    """
    return as_command(answer)(sys.argv[1:] if arguments is None else arguments)


def answer(arguments: Sequence[str]) -> int:
    """Runs the command that the first word names."""
    if not arguments:
        return say(help_text())
    name, *rest = arguments
    if name in HELP_WORDS:
        return answer([*rest, "--help"]) if rest else say(help_text())
    if name in ("--version", "-V", "version"):
        return say(f"pixlat {__version__}")
    if "=" in name:
        return COMMANDS["train"].run(arguments)
    if name not in COMMANDS:
        return refuse(
            f"{name!r} is not a command of pixlat.", name, [each for each, command in COMMANDS.items() if command.group]
        )
    return COMMANDS[name].run(rest)


def study(arguments: Sequence[str]) -> int:
    """`pixlat study NAME ...`: runs one of the studies."""
    name, *rest = arguments or HELP_WORDS[:1]
    if name in HELP_WORDS:
        return say("\n".join([STUDY_USAGE, *(f"{each:<14} {command.about}" for each, command in STUDIES.items())]))
    if name not in STUDIES:
        return refuse(f"{name!r} is not a study.", name, list(STUDIES))
    return STUDIES[name].run(rest)


def say(text: str) -> int:
    """Prints the text. Returns the exit code 0."""
    print(text)
    return 0


def refuse(mistake: str, word: str, options: Sequence[str]) -> int:
    """Prints the mistake with the option that was probably meant, and all options. Returns the exit code 2."""
    from pixlat.common.errors import close_match

    meant = f" Did you mean {MEANT[word]!r}?" if word in MEANT else close_match(word, options)
    print(f"error: {mistake}{meant} `pixlat --help` shows them: {', '.join(options)}.", file=sys.stderr)
    return USAGE
