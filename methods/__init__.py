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
    """A run that must come first: `model.<key>` names its run folder (or a released file),
    and "train" trains it before.

    shipped: weights of such a run that are part of the package, by the value of `model.<key>`,
    with the file of their card, which tells their cost.
    """

    key: str
    method: str
    shipped: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class MethodSpec:
    """A method as the command line sees it.

    The module that holds it must not import torch: `--help` answers in under a second.
    """

    name: str
    title: str  # one line for --help
    paper: str  # title and arXiv id
    implementation: str  # "module:Class", imported when the method is built
    config: type  # dataclass of the method's own settings (`model.*`)
    sample: type  # dataclass of its sampler's settings (`sample.*`)
    presets: str  # path of presets.yaml
    stages: tuple[Stage, ...] = ()  # runs whose weights this method uses
    released: str = ""  # "module:function" that opens a file of the authors (`base.Released`); "" where there is none


def registered() -> dict[str, str]:
    """All methods, built in and from other packages' entry points, name -> "module:attribute"; a built-in name cannot
    be taken.
    """
    return {**{name: plugin.value for name, plugin in plugins().items()}, **METHODS}


def plugins() -> dict[str, Plugin]:
    """The methods of other packages. What they register wrongly is left out with a warning."""
    return plugins_of(ENTRY_POINT_GROUP, frozenset(METHODS), "method")


def load_object(path: str) -> object:
    """The object that "module:attribute" names."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def get_spec(name: str) -> MethodSpec:
    """The spec of a registered method. An unknown name, and a plug-in that cannot be loaded, are UserErrors."""
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
