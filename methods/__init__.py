"""The registry of methods. Importing it imports neither torch nor any method."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from pixlat.common.errors import UserError, close_match
from pixlat.common.plugins import Plugin, load_plugin, plugins_of

if TYPE_CHECKING:
    from pixlat.common.method import Method

ENTRY_POINT_GROUP = "pixlat.methods"

# name -> "module:attribute" of a MethodSpec.
# Another package registers its method through an entry point of the group above.
METHODS: dict[str, str] = {
    "jit": "pixlat.methods.jit.config:SPEC",
    "rae": "pixlat.methods.rae.config:SPEC",
    "rae_decoder": "pixlat.methods.rae.config:DECODER_SPEC",
    "dsd": "pixlat.methods.dsd.config:SPEC",
    "dit": "pixlat.methods.reg.config:DIT",
    "sit": "pixlat.methods.reg.config:SIT",
    "repa": "pixlat.methods.reg.config:REPA",
    "reg": "pixlat.methods.reg.config:REG",
    "vae": "pixlat.methods.vae.config:SPEC",
    "pmf": "pixlat.methods.pmf.config:SPEC",
}


@dataclass(frozen=True)
class Stage:
    """An earlier run whose weights a method needs.

    `model.<key>` names its run folder or a released file; the value "train" trains that run first.
    shipped: values of `model.<key>` that select weights inside the package, each with the file of its card,
    which holds the cost of their training.
    """

    key: str
    method: str
    shipped: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class MethodSpec:
    """The facts that the command line needs about a method.

    The module that defines it must not import torch, so that `--help` answers in under a second.
    """

    name: str
    title: str  # one line for --help
    paper: str  # title and arXiv id
    implementation: str  # "module:Class", imported when the method is built
    config: type  # dataclass of the method's own settings (`model.*`)
    sample: type  # dataclass of its sampler's settings (`sample.*`)
    presets: str  # path of presets.yaml
    stages: tuple[Stage, ...] = ()  # runs whose weights this method uses
    released: str = ""  # "module:function" that opens a file which the authors released (`base.Released`); "" for none


def registered() -> dict[str, str]:
    """All methods, built in or from the entry points of other packages, name -> "module:attribute".

    A plug-in cannot replace a built-in method.
    """
    return {**{name: plugin.value for name, plugin in plugins().items()}, **METHODS}


def plugins() -> dict[str, Plugin]:
    """The methods of other packages; a wrong registration is skipped with a warning."""
    return plugins_of(ENTRY_POINT_GROUP, frozenset(METHODS), "method")


def load_object(path: str) -> object:
    """The object that "module:attribute" names."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def get_spec(name: str) -> MethodSpec:
    """The spec of a registered method; UserError if the name is unknown or the plug-in cannot be loaded."""
    options = registered()
    if name not in options:
        raise UserError(
            f"method={name!r} is not registered.{close_match(name, options)} Methods: {', '.join(sorted(options))}."
        )
    plugin = plugins().get(name)
    spec = load_plugin(plugin, "method") if plugin else load_object(options[name])
    package = f" by the package {plugin.package}" if plugin else ""
    if not isinstance(spec, MethodSpec):
        raise UserError(
            f"method={name!r} is registered{package} as {options[name]!r}, which is a {type(spec).__name__} and "
            "not a MethodSpec."
        )
    if spec.name != name:
        raise UserError(
            f"method={name!r} is registered{package} as {options[name]!r}, whose spec has the name {spec.name!r}. "
            "Both must be the same."
        )
    return spec


def get_class(name: str) -> type[Method]:
    """The Method subclass behind a name. Imports torch."""
    return cast("type[Method]", load_object(get_spec(name).implementation))
