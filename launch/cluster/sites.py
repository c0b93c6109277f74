"""A site's file: the cluster settings that all runs on a site share.

`cluster=NAME` reads launch/clusters/NAME.yaml, and `cluster=FILE.yaml` reads any file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Container, Mapping
from pathlib import Path

from omegaconf import OmegaConf

from pixlat.common.config.schema import ClusterConfig
from pixlat.common.errors import UserError, close_match

BUILT_IN = ("here", "local", "slurm")
FOLDER = Path(__file__).resolve().parent.parent / "clusters"
KEY = "cluster.name"


def with_site(overrides: Mapping[str, str]) -> dict[str, str]:
    """The command line and a site's settings, of which the command line wins; unchanged if `cluster` names no site."""
    name = overrides.get(KEY, ClusterConfig.name)
    if name in BUILT_IN:
        return dict(overrides)
    return {
        **overrides,
        **site_settings(name, overrides),
        **{key: value for key, value in overrides.items() if key != KEY},
    }


def site_settings(name: str, given: Container[str] = ()) -> dict[str, str]:
    """The settings of a site as `cluster.<key>` -> value.

    UserError for a wrong file or key, and for a key that has a value neither in the file nor in `given`.
    """
    sites = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    file = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not file.is_file():
        options = (*BUILT_IN, *sites)
        raise UserError(
            f"cluster={name!r} is not known.{close_match(name, options)} Choose {', '.join(options)}, "
            "or give a site's own file.yaml."
        )
    content = OmegaConf.to_container(OmegaConf.load(file))
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no settings. See {FOLDER / 'README.md'}.")
    known = [field.name for field in dataclasses.fields(ClusterConfig)]
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{file}: unknown key {key!r}.{close_match(str(key), known)} Keys: {', '.join(known)}.")
        if value == "???" and f"cluster.{key}" not in given:
            raise UserError(
                f"{file}: {key} has no value yet. Write yours into {_place(file)}, "
                f"or give cluster.{key}= on the command line."
            )
    return {f"cluster.{key}": json.dumps(value) for key, value in {"name": "slurm", **content}.items()}


def _place(file: Path) -> str:
    """Where the user should write a value. Not into example.yaml: it is in the package, and an update replaces it."""
    return f"a copy of the file and give cluster=path/to/{file.name}" if file == FOLDER / "example.yaml" else "the file"
