"""The dialect of every command: `key=value` and plain words, checked before torch is imported.

A command's module has `SYNTAX`, which says what may stand on its command line; the parser, the help and the shell
completion read it.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pixlat.common.command_line import HELP_WORDS
from pixlat.common.config.explain import describe
from pixlat.common.config.resolve import misfit, split_overrides
from pixlat.common.config.schema import RunConfig, flatten
from pixlat.common.errors import UserError, close_match
from pixlat.common.progress import say_last

T = TypeVar("T")
WIDTH = 100  # columns of a help text
KEY_WIDTH = 34  # columns of the keys in it, their indent included


@dataclass
class NoKeys:
    """The keys of a command that takes plain words only."""


@dataclass(frozen=True)
class Syntax:
    """What may stand on a command's line.

    keys: a dataclass, whose fields are the command's own keys. A trailing underscore is not part of a key, so that
    `from_` is the key `from`.
    groups: the parts of a run's configuration that the command takes as well ("data", "sample"), each with what it
    means here.
    actions: the words that may come first, each with what follows it. An action without keys of its own takes those of
    the command.
    paths: whether other plain words are files or folders.
    """

    keys: type = NoKeys
    groups: Mapping[str, str] = field(default_factory=dict)
    actions: Mapping[str, Syntax] = field(default_factory=dict)
    paths: bool = False


def groups_of_a_run(*left_out: str) -> dict[str, str]:
    """The groups of a command that takes a run's configuration and starts no run.

    left_out: groups that are keys of the command itself.
    """
    without = ("name", "out", "dry_run", "cluster", "budget", *left_out)
    return {each.name: "as for `pixlat train`" for each in dataclasses.fields(RunConfig) if each.name not in without}


# -- arguments ---------------------------------------------------------------------------------------------------------


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether a word for help is among the arguments."""
    return any(argument in HELP_WORDS for argument in arguments)


def split_words(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the plain words, the arguments of the form key=value), each in their order."""
    words = [argument for argument in arguments if "=" not in argument and not argument.startswith("-")]
    return words, [argument for argument in arguments if argument not in words]


def action_of(command: str, actions: Iterable[str], arguments: Sequence[str]) -> tuple[str, list[str]]:
    """(the first word, the other arguments); a UserError if it is none of the command's actions."""
    options, (name, *rest) = list(actions), arguments
    if name not in options:
        raise UserError(
            f"{name!r} is not an action of `pixlat {command}`.{close_match(name, options)} Actions: "
            f"{', '.join(options)}."
        )
    return name, rest


def from_flags(keys: type, arguments: Sequence[str]) -> list[str]:
    """Turns flags into keys: `--update-readme` into `update_readme=true`, `--runs DIR` or `--runs=DIR` into `runs=DIR`.

    Some commands had such flags before they had keys. A flag that names no key is left as it is.
    """
    kinds = {each.name: str(each.type) for each in dataclasses.fields(keys)}
    given, translated = list(arguments), []
    while given:
        word = given.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in kinds:
            translated.append(word)
            continue
        if not equals and kinds[name] == "bool":
            value = "true"
        elif not equals:
            if not given:
                raise UserError(f"{flag} needs a value: {name}=VALUE.")
            value = given.pop(0)
        translated.append(f"{name}={value}")
    return translated


def parse(keys: type[T], arguments: Sequence[str], passed_on: Sequence[str] = ()) -> tuple[T, dict[str, str]]:
    """The command, and the keys below the groups in `passed_on` ("sample", "data"), which belong to a run's
    configuration.

    Unknown keys and wrong types are UserErrors with the nearest valid word.
    """
    config = OmegaConf.structured(keys)
    names = {key.removesuffix("_"): key for key, _ in flatten(OmegaConf.to_container(config)) if key}
    _check_names(arguments, names, passed_on)
    given_values = {key: ",".join(values) for key, values in split_overrides(arguments).items()}
    own = {key: value for key, value in given_values.items() if key in names}
    rest = {key: value for key, value in given_values.items() if key not in names}
    given = _values({names[key]: value for key, value in own.items()}, config)
    try:
        command: Any = OmegaConf.to_object(OmegaConf.merge(config, given))
    except OmegaConfBaseException as error:
        raise UserError(misfit(error, config, given)) from error
    return command, rest


def _check_names(arguments: Sequence[str], names: Collection[str], groups: Sequence[str]) -> None:
    """UserError for a word without a value, and for a key that the command does not take, with the nearest key."""
    keys = f"Keys: {', '.join((*names, *_patterns(groups)))}." if names or groups else "It takes no keys."
    for argument in arguments:
        key, equals, _ = argument.strip().lstrip("-").partition("=")
        if not equals:
            near = _near(key.replace("-", "_"), names, groups)
            raise UserError(f"{argument!r} is not of the form key=value.{near} {keys}")
        if key.strip() not in names and key.strip().split(".")[0] not in groups:
            raise UserError(f"unknown key {key!r}.{_near(key, names, groups)} {keys}")


def _near(key: str, names: Iterable[str], groups: Sequence[str]) -> str:
    """The nearest of the command's keys. Of a key with a dot in it, such as `trian.lr`, the group is corrected."""
    options = list(names)
    group, dot, name = key.partition(".")
    if dot and not any(option.startswith(f"{group}.") for option in options) and (near := close_match(group, groups)):
        return near.replace("'?", f".{name}'?")
    return close_match(key, [*options, *groups])


def _patterns(groups: Sequence[str]) -> list[str]:
    """ "method" and "data.*": the keys of a run that a command takes."""
    single = ("method", "preset", "seed", "name", "out", "dry_run")
    return [group if group in single else f"{group}.*" for group in groups]


def _values(own: Mapping[str, str], config: DictConfig) -> DictConfig:
    """The values as nested settings. Text stays as it was written, so that a folder may be called 007, 1e3 or [x]."""
    nested = OmegaConf.create()
    for key, value in own.items():
        try:
            read = OmegaConf.select(OmegaConf.from_dotlist([f"{key}={value}"]), key, throw_on_missing=False)
        except (
            YAMLError,
            OmegaConfBaseException,
            AssertionError,
        ):  # brackets that do not close, a colon: text, or a value that does not fit
            read = value
        text = type(_node(config, key)).__name__ == "StringNode"
        OmegaConf.update(
            nested, key, value if text and read is not None and not isinstance(read, str) else read, force_add=True
        )
    return nested


def _node(config: DictConfig, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node._get_node(part)
    return node


def needed(keys: object, command: str, *names: str) -> tuple[Any, ...]:
    """The values of the keys that a command needs, by their names on the command line. A missing one is a UserError."""
    values = tuple(getattr(keys, f"{name}_" if hasattr(keys, f"{name}_") else name) for name in names)
    for name, value in zip(names, values, strict=True):
        if value is None:
            raise UserError(f"{name}= is missing. `pixlat {command} --help` has an example.")
    return values


# -- help --------------------------------------------------------------------------------------------------------------


def help_text(introduction: str, keys: type = NoKeys, groups: Mapping[str, str] | None = None) -> str:
    """The introduction, every key with type, default and meaning, and what the groups of other keys are."""
    rows = [*key_rows(keys), *group_rows(groups or {})]
    return "\n".join(
        [filled(introduction.strip()), *(["", "Keys: key (type, default): meaning", *lines_of(rows)] if rows else [])]
    )


def filled(text: str) -> str:
    """The text with its prose wrapped. Examples, which are indented, and tables, which have gaps, stay as they are."""
    parts = text.split("\n\n")
    prose = [not any(line.startswith(" ") or "  " in line for line in part.splitlines()) for part in parts]
    return "\n\n".join(
        textwrap.fill(part, WIDTH, break_on_hyphens=False) if wraps else part
        for part, wraps in zip(parts, prose, strict=True)
    )


def group_rows(groups: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """("model.*, data.*", their meaning): groups of one meaning share a row."""
    for meaning in dict.fromkeys(groups.values()):
        yield ", ".join(_patterns([group for group, said in groups.items() if said == meaning])), meaning


def key_rows(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """("lr (float, 0.001)", its meaning) for every field of a configuration; prefix: of the keys, such as "model"."""
    for key, kind, default, meaning in describe(config, prefix):
        shown = default.lower() if default in ("True", "False") else default
        yield f"{key.removesuffix('_')} ({kind.replace(' | None', '')}, {shown})", meaning


def lines_of(rows: Iterable[tuple[str, str]], key_width: int = KEY_WIDTH) -> Iterator[str]:
    """The rows of a help text in two columns, the second one wrapped. A key that fills its column has its own line."""
    for key, meaning in rows:
        wrapped = textwrap.wrap(meaning, WIDTH - key_width, break_long_words=False, break_on_hyphens=False) or [""]
        first = f"  {key:<{key_width - 4}}  "
        if len(first) > key_width:
            yield first.rstrip()
            first = " " * key_width
        yield (first + wrapped[0]).rstrip()
        yield from (" " * key_width + line for line in wrapped[1:])


# -- main --------------------------------------------------------------------------------------------------------------


def run_command(
    arguments: Sequence[str], text: Callable[[], str], work: Callable[[Sequence[str]], str | int], alone: bool = False
) -> int:
    """Prints the help, or what the work returns. If the work returns a number, that is the exit code.

    A mistake in the command or its inputs is printed in one line, and the exit code is 2.

    alone: whether the command does its work without arguments; otherwise it prints the help.
    """
    if asks_for_help(arguments) or not (arguments or alone):
        print(text())
        return 0
    try:
        result = work(arguments)
    except UserError as error:
        say_last(f"error: {error}")
        return 2
    if isinstance(result, int):
        return result
    if result:
        print(result)
    return 0
