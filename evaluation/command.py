"""Strict `key=value` commands: each is a dataclass whose fields are its keys, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pixlat.common.config.explain import describe
from pixlat.common.config.resolve import misfit, split_overrides
from pixlat.common.errors import UserError, close_match
from pixlat.common.progress import say_last

T = TypeVar("T")


def parse(keys: type[T], arguments: Sequence[str], passed_on: Sequence[str] = ()) -> tuple[T, dict[str, str]]:
    """The command, and the keys below the groups in `passed_on` ("sample", "data"),
    which belong to a run's configuration.

    Unknown keys and wrong types are UserErrors with the nearest valid word.
    """
    overrides = split_overrides(arguments)
    rest = {key: ",".join(values) for key, values in overrides.items() if key.split(".")[0] in passed_on}
    own = {key: ",".join(values) for key, values in overrides.items() if key not in rest}
    config = OmegaConf.structured(keys)
    for key in own:
        if key not in config:
            groups = "".join(f", {group}.*" for group in passed_on)
            raise UserError(f"unknown key {key!r}.{close_match(key, list(config))} Keys: {', '.join(config)}{groups}.")
    given = OmegaConf.from_dotlist([f"{key}={value}" for key, value in own.items()])
    try:
        merged = OmegaConf.merge(config, given)
    except OmegaConfBaseException as error:
        raise UserError(misfit(error, config, given)) from error
    command: Any = OmegaConf.to_object(merged)
    return command, rest


def help_text(introduction: str, keys: type, groups: Mapping[str, str]) -> str:
    """The introduction, every key with type, default and meaning, and what the groups of other keys are."""
    lines = [introduction.strip(), "", "Keys: key (type, default): meaning"]
    lines += [f"  {f'{key} ({kind}, {default})':<44} {meaning}" for key, kind, default, meaning in describe(keys)]
    return "\n".join([*lines, *(f"  {f'{group}.*':<44} {meaning}" for group, meaning in groups.items())])


def run_command(arguments: Sequence[str], text: Callable[[], str], work: Callable[[Sequence[str]], str]) -> int:
    """Prints what the work returns, or help; the exit code is 2 for a mistake in the command or its inputs."""

    if not arguments or any(argument in ("-h", "--help", "help") for argument in arguments):
        print(text())
        return 0
    try:
        if told := work(arguments):
            print(told)
    except UserError as error:
        say_last(f"error: {error}")
        return 2
    return 0
