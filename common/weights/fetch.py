"""Files of a Hugging Face repository that the user names as hf:owner/name or hf:owner/name@revision. Imports no torch.

Naming a repository is the user's consent to fetch from it; pixlat fetches nothing else. Only text and safetensors are
fetched, never anything that could be executed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixlat.common.errors import UserError

PREFIX = "hf:"
ALLOWED = (".safetensors", ".json", ".yaml")
FORM = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class HubFolder:
    """Files of one revision of a repository, in the local cache."""

    pinned: str  # hf:owner/name@COMMIT: names the same files whatever is pushed later
    repository: str
    revision: str  # the commit
    folder: Path


def is_hub_name(place: str) -> bool:
    """Whether a source is the name of a repository on the hub."""
    return place.startswith(PREFIX)


def fetch(place: str, files: Sequence[str], optional: Sequence[str] = ()) -> HubFolder:
    """Returns the folder of a repository's files, from the local cache or from the hub. `optional` ones may be missing.

    A repository, revision or file that does not exist is a UserError. If the hub cannot be reached, the UserError says
    which files are wanted and how to get them.
    """
    match = FORM.fullmatch(place)
    if match is None:
        raise UserError(
            f"{place!r} is not a name on the hub. Write hf:owner/name or hf:owner/name@revision, "
            "for example hf:me/my-model@main."
        )
    repository, revision = match[1], match[2]
    if refused := [file for file in (*files, *optional) if not file.endswith(ALLOWED)]:
        raise ValueError(f"{refused[0]} could hold code")
    paths = [_fetch_file(repository, revision, file, [*files, *optional]) for file in files]
    for file in optional:
        _fetch_optional(repository, revision, file)
    commit = paths[0].parent.name
    return HubFolder(f"{PREFIX}{repository}@{commit}", repository, commit, paths[0].parent)


def _fetch_file(repository: str, revision: str | None, file: str, wanted: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{repository}{f'@{revision}' if revision else ''}"
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except LocalEntryNotFoundError as error:
        reason = f"{file} of {name} is not in the local cache, and the hub cannot be reached"
        raise UserError(f"{reason}. {_remedy(repository, revision, wanted)}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: the hub has no such repository, or it is private and you are not logged in (`hf auth login`)."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name}: the repository has no such revision. Give one of its branches, tags or commits."
        ) from error
    except EntryNotFoundError as error:
        raise UserError(
            f"{name} has no {file}, so it is not what `pixlat export` writes. It must hold {', '.join(wanted)}."
        ) from error
    except HfHubHTTPError as error:
        reason = f"{name}: the hub answers {str(error).splitlines()[0]}"
        raise UserError(f"{reason}. {_remedy(repository, revision, wanted)}") from error


def _fetch_optional(repository: str, revision: str | None, file: str) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    try:
        hf_hub_download(repository, file, revision=revision)
    except EntryNotFoundError:  # its subclass LocalEntryNotFoundError is raised offline
        return


def _remedy(repository: str, revision: str | None, wanted: Sequence[str]) -> str:
    chosen = f" --revision {revision}" if revision else ""
    return f"Where there is a connection, get the files with: hf download {repository} {' '.join(wanted)}{chosen}"
