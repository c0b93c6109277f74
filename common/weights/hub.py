"""Finds files in the caches of Hugging Face and torch, or at a given path. Downloads nothing and writes nothing.

Every error names the repository and file, the place where pixlat looked, the licence of the weights,
and the command or key that solves it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from pixlat.common.errors import UserError
from pixlat.common.weights import checkpoint
from pixlat.common.weights.tensors import listed

HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the usual names in a Hugging Face repository, best first


def hub_files(
    repository: str, files: Sequence[str], given: str | None = None, key: str = "", licence: str = ""
) -> list[Path]:
    """The files of a Hugging Face repository in the local cache (newest `main`), or in the folder `given`.

    Raises UserError if a file is missing. Its message uses `key`, the configuration key that sets `given`,
    and `licence`, the licence of the weights.
    """
    return [hub_file(repository, [file], given, key, licence) for file in files]


def hub_file(
    repository: str,
    alternatives: Sequence[str] = HUB_WEIGHTS,
    given: str | None = None,
    key: str = "",
    licence: str = "",
) -> Path:
    """The first of `alternatives` that is in the cache of a repository.

    If `given` is set, it is the file, or a folder with one of the alternatives.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if given is not None:
        return _given(given, alternatives, f"{repository} on Hugging Face", licence)
    cached = [try_to_load_from_cache(repository, file, cache_dir=constants.HF_HUB_CACHE) for file in alternatives]
    if path := next((path for path in cached if isinstance(path, str)), None):
        return Path(path)
    raise UserError(
        f"{' or '.join(alternatives)} of {repository} is needed and not in the Hugging Face cache "
        f"{constants.HF_HUB_CACHE}. Nothing is downloaded silently; get it with: "
        f"hf download {repository} {alternatives[0]}{_or_key(key)}{_licence(licence)}"
    )


def hub_checkpoint_file(name: str, url: str, given: str | None = None, key: str = "", licence: str = "") -> Path:
    """A file of torch's hub cache (`torch.hub.get_dir()`/checkpoints), or `given`, which is the file or its folder.

    A name such as vgg16-397923af.pth contains the beginning of the file's sha256. UserError if it does not match.
    """
    if given is not None:
        return _given(given, [name], url, licence)
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise UserError(
            f"{name} is needed and not in torch's hub cache {path.parent}. Nothing is downloaded silently; "
            f"get it with: curl -L --create-dirs -o {path} {url}{_or_key(key)}{_licence(licence)}"
        )
    expected = re.search(r"-([0-9a-f]{8,})\.", name)
    if expected and not (digest := checkpoint.sha256_of(path)).startswith(expected[1]):
        raise UserError(
            f"{path} has sha256 {digest}, which does not begin with the {expected[1]} of its name. "
            f"Download it again from {url}"
        )
    return path


def _given(given: str, names: Sequence[str], origin: str, licence: str) -> Path:
    """The file at the path that the user gave, or the first of `names` if the path is a folder."""
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if file := next((path / name for name in names if (path / name).is_file()), None):
        return file
    state = (
        f"the folder holds {listed(sorted(p.name for p in path.iterdir()))}"
        if path.is_dir()
        else "there is no such file or folder"
    )
    raise UserError(f"{path}: pixlat needs {' or '.join(names)} of {origin}, but {state}.{_licence(licence)}")


def _or_key(key: str) -> str:
    return f" (or give its path as {key}=)" if key else ""


def _licence(licence: str) -> str:
    return f" Licence of the weights: {licence}." if licence else ""
