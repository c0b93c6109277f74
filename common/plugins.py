"""Finds the plug-ins that other installed packages register as entry points, such as "pixlat.methods".

Imports none of these packages. A faulty package gets one warning that names it and is left out; all others work.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from pixlat.common.errors import UserError

log = logging.getLogger("pixlat")


@dataclass(frozen=True)
class Plugin:
    """An entry point: its name, the object as "module:attribute", and the package that registers it."""

    name: str
    value: str
    package: str


@functools.cache  # the installed packages of a process do not change, and each warning is given once
def plugins_of(group: str, built_in: frozenset[str], what: str) -> dict[str, Plugin]:
    """The plug-ins of a group by name.

    Leaves out plug-ins that have a built-in name, and all plug-ins that share a name; a warning names them.
    what: the noun for a plug-in of this group in the warnings, such as "method".
    """
    candidates: dict[str, list[Plugin]] = defaultdict(list)
    for plugin in registered_in(group):
        candidates[plugin.name].append(plugin)
    kept = {}
    for name, same in candidates.items():
        owners = " and ".join(f"the package {plugin.package} (entry point {plugin.value})" for plugin in same)
        if name in built_in:
            reason = f"is ignored, because a built-in {what} has that name: it must be renamed."
            log.warning("The %s %r of %s %s", what, name, owners, reason)
        elif len(same) > 1:
            reason = "and none of them is used: uninstall all but one."
            log.warning("The %s %r is registered by %s, %s", what, name, owners, reason)
        else:
            kept[name] = same[0]
    return kept


def registered_in(group: str) -> Iterator[Plugin]:
    """Yields every entry point of a group, in the order of the packages' names.

    If a package is installed twice on the path, the first one counts, as in an import. Leaves out a package whose
    entry_points.txt is not readable, with a warning; `importlib.metadata.entry_points` would fail for all packages.
    """
    by_package: dict[str, list[Plugin]] = {}
    for distribution in distributions():
        try:
            if group not in (distribution.read_text("entry_points.txt") or ""):
                continue
            package = package_name(distribution)
            if package not in by_package:
                points = [point for point in distribution.entry_points if point.group == group]
                by_package[package] = [
                    Plugin(point.name, point.value.partition("[")[0].strip(), package) for point in points
                ]
        except (
            OSError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:  # a file of another package, which may hold anything
            log.warning(
                "The package %s is ignored, because its entry_points.txt cannot be read: %s.",
                package_name(distribution),
                error,
            )
    for _, plugins in sorted(by_package.items()):
        yield from plugins


def package_name(distribution: Distribution) -> str:
    """The name of an installed package, from its METADATA, or from its .dist-info folder if METADATA is damaged."""
    try:
        name = distribution.metadata["Name"]
    except (OSError, TypeError, ValueError):
        name = None
    return str(name or Path(str(getattr(distribution, "_path", "unknown"))).name.partition("-")[0])


def load_plugin(plugin: Plugin, what: str) -> object:
    """Imports a plug-in's object. If that fails, raises UserError with the names of the package and the entry point."""
    module, _, attribute = plugin.value.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the code of another package, which may raise anything
        raise UserError(
            f"{what}={plugin.name!r} is a plug-in of the package {plugin.package} that cannot be loaded from its "
            f"entry point {plugin.value} "
            f"({type(error).__name__}: {error}). Install that package again, or uninstall it."
        ) from error
