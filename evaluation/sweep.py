"""Tries sampling settings of one checkpoint and evaluates the best one in full, with the number of tries in its record.

  pixlat sweep run=runs/my-run sample.guidance=1,1.5,2,3 ema=0.999,0.9999 tries=1000 num_images=5000

Comma lists are tried in every combination, each on `tries` images, and the lowest distance wins.
The best of many settings scores better than it will again. Therefore the full evaluation uses other
seeds than the tries, and its record says how many settings were tried on how many samples.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixlat.common.cache import features_folder
from pixlat.common.command_line import as_command
from pixlat.common.config.resolve import split_overrides, sweep
from pixlat.common.errors import UserError
from pixlat.common.files import write_whole
from pixlat.evaluation.command import Syntax, help_text, parse, run_command
from pixlat.evaluation.protocols.identity import protocol_name
from pixlat.evaluation.protocols.named import EMBEDDED, check_request
from pixlat.evaluation.records.selection import EVALUATIONS
from pixlat.evaluation.run import sampling_keys
from pixlat.evaluation.score.outcome import keep, record_of_model, table

if TYPE_CHECKING:
    from pixlat.evaluation.score.assess import Request

RANKING = ("fid", "fd_dinov2", "fd_ratio", "fd")  # the first of these metrics that a protocol has ranks the settings
SWEPT_GROUPS = ("sample",)


@dataclass
class Keys:
    """The command's keys."""

    run: str | None = None  # a run folder
    ema: str | None = None  # averages to try; none: the one it was evaluated with
    protocol: str = EMBEDDED  # as for `pixlat evaluate`
    tries: int = 1000  # images a setting
    try_seed: int = 1_000_000  # of the tries
    num_images: int | None = None  # of the full evaluation; none: as the protocol says
    seeds: list[int] = field(default_factory=lambda: [0])  # of the full evaluation
    precision: str | None = None  # auto, bf16, tf32 or fp32; none: the run's eval.precision
    uint8: str | None = None  # round or truncate; none: the run's eval.uint8
    batch: int = 50  # images at once
    weights: str | None = None  # the extractor's file
    reference: str | None = None  # the file of reference statistics
    device: str = "auto"  # auto or cpu


GROUPS = {
    "sample": "the method's sampler, as for `pixlat train`; comma lists are tried",
    "data": "the data set",
    "model": "the method, for instance where an earlier stage lies",
}
SYNTAX = Syntax(Keys, GROUPS)


def usage() -> str:
    """Example and keys."""
    return help_text(str(__doc__), Keys, GROUPS)


def work(arguments: Sequence[str]) -> str:
    """Tries all settings, evaluates the best one, writes its record, and returns the text to print."""
    lists = {
        key: values
        for key, values in split_overrides(arguments).items()
        if key == "ema" or key.split(".")[0] in SWEPT_GROUPS
    }
    rest = [argument for argument in arguments if argument.partition("=")[0].strip().lstrip("-") not in lists]
    keys, passed = parse(Keys, rest, ("data", "model"))
    swept = [key for key, values in lists.items() if len(values) > 1]
    check(keys, swept)
    from pixlat.common.processes import join_processes

    state = join_processes(cpu=keys.device == "cpu")
    folder = Path(str(keys.run)).expanduser()
    passed |= sampling_keys(keys.precision, keys.uint8)
    trial = make_request(keys, folder, state.device, keys.tries, (keys.try_seed,))
    settings = list(sweep(lists))
    scores = [attempt(folder, {**passed, **setting}, trial) for setting in settings]
    best = min(range(len(settings)), key=scores.__getitem__)
    selection = {"n_configs": len(settings), "n_samples": keys.tries, "swept": swept}
    final = make_request(keys, folder, state.device, keys.num_images, tuple(keys.seeds))
    record = finish(folder, {**passed, **settings[best]}, final, selection)
    if not state.is_main_process:
        return ""
    path = keep(
        record, folder / EVALUATIONS, {**settings[best], "swept": lists, "seeds": keys.seeds, "tries": keys.tries}
    )
    tried = [{"setting": setting, "score": score} for setting, score in zip(settings, scores, strict=True)]
    write_whole(path.with_name("sweep.json"), json.dumps({"selection": selection, "tries": tried}, indent=1) + "\n")
    return "\n".join(
        [
            *_ranked(settings, scores),
            "",
            f"{record['name']}: {protocol_name(record['protocol'])}",
            table(record),
            str(path),
        ]
    )


def check(keys: Keys, swept: Sequence[str]) -> None:
    """Raises UserError for keys that cannot work with any files."""
    if keys.run is None:
        raise UserError("give run=, the folder of the run whose settings are tried.")
    if not swept:
        raise UserError("no key has several values. Give a list, such as sample.guidance=1,2,3 or ema=0.999,0.9999.")
    if keys.protocol == "rfid":
        raise UserError("protocol=rfid: reconstructions have no sampling settings to try.")
    check_request(keys.protocol, None, keys.uint8, keys.precision, keys.seeds)
    if keys.try_seed in keys.seeds:
        raise UserError(
            f"try_seed={keys.try_seed} is among seeds={keys.seeds}: "
            "the chosen setting would be scored on the samples that chose it."
        )
    if keys.tries < 20:
        raise UserError(f"tries={keys.tries} is too small; it must be at least 20.")


def make_request(keys: Keys, folder: Path, device: Any, num_images: int | None, seeds: tuple[int, ...]) -> Request:
    """The command's settings for evaluation/score/assess.py."""
    from pixlat.evaluation.score.assess import Request

    cache = features_folder(folder.parent)
    return Request(
        keys.protocol,
        num_images,
        seeds,
        keys.batch,
        None,
        keys.uint8,
        keys.precision,
        keys.weights,
        keys.reference,
        cache,
        device,
    )


def attempt(folder: Path, setting: dict[str, str], request: Request) -> float:
    """The distance of one setting. All settings have the same bias, so we compare values without bias correction."""
    metrics = _evaluate(folder, setting, request)[1].metrics
    return float(next(metrics[name]["value"] for name in RANKING if name in metrics))


def finish(folder: Path, setting: dict[str, str], request: Request, selection: dict[str, Any]) -> dict[str, Any]:
    """The record of the chosen setting."""
    model, evaluation = _evaluate(folder, setting, request)
    return record_of_model(model, evaluation, request, selection)


def _evaluate(folder: Path, setting: dict[str, str], request: Request) -> tuple[Any, Any]:
    from pixlat.evaluation.score.assess import assess_model
    from pixlat.evaluation.score.models import load_run

    overrides = {key: value for key, value in setting.items() if key != "ema"}
    model = load_run(folder, overrides, setting.get("ema"), request.device)
    if model.method.task != "generation":
        raise UserError(f"{folder} reconstructs images and has no sampling settings to try.")
    return model, assess_model(model, request)


def _ranked(settings: Sequence[dict[str, str]], scores: Sequence[float]) -> list[str]:
    pairs = sorted(zip(scores, settings, strict=True), key=lambda pair: pair[0])
    return [
        f"  {score:10.5g}  {' '.join(f'{key}={value}' for key, value in setting.items())}" for score, setting in pairs
    ]


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(sys.argv[1:] if arguments is None else arguments, usage, work)


if __name__ == "__main__":
    sys.exit(main())
