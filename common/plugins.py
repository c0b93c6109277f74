"""What other installed packages register in a group of entry points, such as "pixlat.methods". Imports none of them.

A package that registers something wrongly is named in one warning and left out. All others work.
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
    """An entry point: the name that it registers, "module:attribute" of the object, and the installed package."""

    name: str
    value: str
    package: str


@functools.cache  # the installed packages of a process do not change, and each warning is given once
def plugins_of(group: str, built_in: frozenset[str], what: str) -> dict[str, Plugin]:
    """The plug-ins of a group by name. A warning names those that are left out.

    Left out are plug-ins with a built-in name, and all plug-ins that share one name.

    what: how one of them is called in the warnings, such as "method".
    """
    found: dict[str, list[Plugin]] = defaultdict(list)
    for plugin in registered_in(group):
        found[plugin.name].append(plugin)
    kept = {}
    for name, same in found.items():
        said = " and ".join(f"the package {each.package} (entry point {each.value})" for each in same)
        if name in built_in:
            reason = f"is ignored, because a built-in {what} has that name: it must be renamed."
            log.warning("The %s %r of %s %s", what, name, said, reason)
        elif len(same) > 1:
            reason = "and none of them is used: uninstall all but one."
            log.warning("The %s %r is registered by %s, %s", what, name, said, reason)
        else:
            kept[name] = same[0]
    return kept


def registered_in(group: str) -> Iterator[Plugin]:
    """Every entry point of a group, in the order of the packages' names.

    Where a package is found twice on the path, its first place counts, as in an import. A package whose
    entry_points.txt cannot be read is left out with a warning; `importlib.metadata.entry_points` would fail for all.
    """
    found: dict[str, list[Plugin]] = {}
    for distribution in distributions():
        try:
            if group not in (distribution.read_text("entry_points.txt") or ""):
                continue
            package = package_name(distribution)
            if package not in found:
                points = [point for point in distribution.entry_points if point.group == group]
                found[package] = [
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
    for _, plugins in sorted(found.items()):
        yield from plugins


def package_name(distribution: Distribution) -> str:
    """The name of an installed package; where its METADATA is missing or damaged, as its .dist-info folder has it."""
    try:
        name = distribution.metadata["Name"]
    except (OSError, TypeError, ValueError):
        name = None
    return str(name or Path(str(getattr(distribution, "_path", "unknown"))).name.partition("-")[0])


def load_plugin(plugin: Plugin, what: str) -> object:
    """The object of a plug-in. If its package cannot be imported, a UserError names the package and the entry point."""
    module, _, attribute = plugin.value.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the code of another package, which may raise anything
        raise UserError(
            f"{what}={plugin.name!r} is a plug-in of the package {plugin.package} that cannot be loaded from its "
            f"entry point {plugin.value} "
            f"({type(error).__name__}: {error}). Install that package again, or uninstall it."
        ) from error
