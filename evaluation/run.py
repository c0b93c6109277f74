"""Evaluates a run, a released checkpoint, a folder of images or an .npz of samples under any protocol, and writes a
record.

  pixlat evaluate run=runs/my-run                                the embedded protocol again
  pixlat evaluate run=runs/my-run protocol=adm256 seeds=[0,1,2]  ImageNet 256 as in the papers, mean
                                                                 and spread of three seeds
  pixlat evaluate run=runs/my-run sample.guidance=2 ema=0.9996   other sampling settings and average
  pixlat evaluate run=runs/a against=runs/b seeds=[0,1,2]        how two models differ on the same
                                                                 seeds and labels
  pixlat evaluate checkpoint=weights.pth method=... preset=imagenet256-b protocol=jit256 \\
                  data=folder data.num_classes=1000 data.image_size=256
  pixlat evaluate npz=samples.npz protocol=adm256 labels=balanced uint8=truncate
  pixlat evaluate images=folder protocol=clean

`pixlat reference fetch-plan protocol=adm256` lists the files that a protocol needs. pixlat does not
download them. With several processes (`torchrun --nproc-per-node 8 -m pixlat evaluate ...`) each makes
its share of the images.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pixlat.common.cache import features_folder
from pixlat.common.command_line import as_command
from pixlat.common.config.resolve import one_of, require
from pixlat.common.config.schema import DataConfig
from pixlat.common.errors import UserError
from pixlat.evaluation.command import Syntax, help_text, lines_of, parse, run_command
from pixlat.evaluation.protocols.identity import protocol_name
from pixlat.evaluation.protocols.named import EMBEDDED, PROTOCOLS, RECONSTRUCTIONS, check_request
from pixlat.evaluation.records.record import RESULT, Record
from pixlat.evaluation.records.selection import EVALUATIONS, recorded
from pixlat.evaluation.score.outcome import SPACES, UNKNOWN, keep, record_of_images, record_of_model, table
from pixlat.evaluation.score.sample_facts import SampleFacts, facts_of

if TYPE_CHECKING:
    import torch

    from pixlat.evaluation.score.assess import Request
    from pixlat.evaluation.score.models import Model

GROUPS = {
    "sample": "the method's sampler, as for `pixlat train`",
    "data": "the data set",
    "model": "the method, for instance where an earlier stage lies",
}


@dataclass
class Keys:
    """The command's keys."""

    run: str | None = None  # a run folder
    checkpoint: str | None = None  # a released file, with method= and preset=
    images: str | None = None  # a folder of generated images
    npz: str | None = None  # an .npz with arr_0, uint8 (number, height, width, 3)
    against: str | None = None  # a second run folder to compare with
    protocol: str = EMBEDDED  # how to measure; see below
    method: str | None = None  # of the released checkpoint, or what made the finished images
    #: where the method of finished images denoises: pixel, latent_vae, latent_rae or latent_self; none: unknown
    space: str | None = None
    preset: str | None = None  # of the released checkpoint
    ema: str | None = None  # which average of the run; none: the one it was evaluated with; raw: the raw weights
    num_images: int | None = None  # none: as the protocol says, or all finished images; fewer of these are a fixed draw
    seeds: list[int] = field(default_factory=lambda: [0])  # sampling seeds; several give mean and spread
    #: balanced or random; none: as the protocol says; of finished images: as samples.json says, or unknown
    labels: str | None = None
    #: auto, bf16, tf32 or fp32: what a model samples in; none: its eval.precision.
    #: Of finished images: what they were made in
    precision: str | None = None
    #: round or truncate: how samples become uint8; none: the model's eval.uint8, or unknown for finished images
    uint8: str | None = None
    #: judges of the embedded protocol, e.g. [embedded]; none: a run's eval.judges, or those of the data set
    judges: list[str] = field(default_factory=list)
    batch: int = 50  # images at once
    weights: str | None = None  # the extractor's file; none: looked for by its name
    reference: str | None = None  # the file of reference statistics; none: looked for by its name
    name: str | None = None  # of the record, for finished images
    out: str = "runs"  # where records of finished images and released files go; a run's go into its own folder
    device: str = "auto"  # auto or cpu; auto: the accelerator where there is one


SYNTAX = Syntax(Keys, GROUPS)


def usage() -> str:
    """Examples, keys and protocols."""
    about = {EMBEDDED: "the extractor in the package, against the run's own data"}
    about |= {name: protocol.about for name, protocol in PROTOCOLS.items()}
    return "\n".join([help_text(str(__doc__), Keys, GROUPS), "", "Protocols", *lines_of(about.items())])


def work(arguments: Sequence[str]) -> str:
    """Evaluates, writes the record and returns the text to print."""
    keys, rest = parse(Keys, arguments, tuple(GROUPS))
    check(keys, rest)
    from pixlat.common.processes import join_processes

    state = join_processes(cpu=keys.device == "cpu")
    request = make_request(keys, state.device)
    if keys.run is None and keys.checkpoint is None:
        records = [images_record(keys, rest, request)]
    else:
        folders = [keys.run, *([keys.against] if keys.against else [])]
        records = [model_record(keys, folder, rest, request) for folder in folders]
    if not state.is_main_process:
        return ""
    folders = [keys.run, keys.against]
    messages = [save(keys, rest, record, folder) for record, folder in zip(records, folders, strict=False)]
    return "\n\n".join(messages + ([differences(records)] if keys.against else []))


def check(keys: Keys, rest: dict[str, str]) -> None:
    """Raises UserError for keys that cannot work with any files. Runs before the import of torch."""
    given = [key for key in ("run", "checkpoint", "images", "npz") if getattr(keys, key) is not None]
    if len(given) != 1:
        raise UserError(
            "give exactly one of run=, checkpoint=, images= and npz=; "
            f"you gave {' and '.join(given) or 'none of them'}."
        )
    if keys.checkpoint is not None and (keys.method is None or keys.preset is None):
        raise UserError("checkpoint= needs method= and preset=, which say what network the file belongs to.")
    if keys.against is not None and keys.run is None:
        raise UserError("against= compares two runs: give the first as run=.")
    finished = given[0] in ("images", "npz")
    if not finished and keys.labels is not None and keys.protocol == EMBEDDED:
        raise UserError(
            f"labels={keys.labels}: under the {EMBEDDED} protocol a model's images get the labels of held-out images. "
            "Leave the key out, or choose another protocol."
        )
    if finished and (unused := [key for key in rest if not key.startswith("data.")]):
        raise UserError(f"{unused[0]} is a setting of a model, but finished images have no model. Leave the key out.")
    if keys.space is not None:
        require(finished, "space", keys.space, "is known of models; give it with images= or npz= only")
        one_of("space", keys.space, SPACES)
    if finished and keys.precision == "auto":
        raise UserError(
            "precision=auto: finished images were computed in bf16, tf32 or fp32. Say which, "
            "or leave the key out where that is unknown."
        )
    if finished and keys.protocol not in (EMBEDDED, RECONSTRUCTIONS) and rest:
        raise UserError(
            f"{next(iter(rest))}: protocol={keys.protocol} compares with its own reference and reads "
            "no data set. Leave the key out."
        )
    refuse_ignored(keys, given[0])
    one_of("device", keys.device, ("auto", "cpu"))
    check_request(keys.protocol, keys.labels, keys.uint8, keys.precision, keys.seeds)
    for key, lowest in (("batch", 1), ("num_images", 20)):
        if (value := getattr(keys, key)) is not None and value < lowest:
            raise UserError(f"{key}={value} is too small; it must be at least {lowest}.")


IGNORED = {
    "run": ("method", "preset", "name"),
    "checkpoint": ("ema", "name"),
    "images": ("preset", "ema", "seeds"),
    "npz": ("preset", "ema", "seeds"),
}
IGNORED_BY_PROTOCOL = {EMBEDDED: ("weights", "reference"), RECONSTRUCTIONS: ("reference", "labels", "seeds", "judges")}


def refuse_ignored(keys: Keys, source: str) -> None:
    """Raises UserError for a key that this evaluation would silently ignore.

    source: run, checkpoint, images or npz.
    """
    untouched = Keys()
    for reason, ignored in (
        (f"{source}=", IGNORED[source]),
        (f"protocol={keys.protocol}", IGNORED_BY_PROTOCOL.get(keys.protocol, ("judges",))),
    ):
        for key in ignored:
            if getattr(keys, key) != getattr(untouched, key):
                raise UserError(
                    f"{key}={getattr(keys, key)} is not read with {reason}. Leave it out. "
                    "`pixlat evaluate --help` says what each key is for."
                )


def make_request(keys: Keys, device: torch.device) -> Request:
    """The command's settings for evaluation/score/assess.py."""
    from pixlat.evaluation.score.assess import Request

    cache = features_folder(Path(keys.run).expanduser().parent if keys.run else Path(keys.out))
    shared = (keys.labels, keys.uint8, keys.precision, keys.weights, keys.reference)
    seeds, judges = tuple(keys.seeds), tuple(keys.judges)
    return Request(keys.protocol, keys.num_images, seeds, keys.batch, *shared, cache, device, judges=judges)


def model_record(keys: Keys, folder: str | None, rest: dict[str, str], request: Request) -> Record:
    """Samples from a run or a released checkpoint."""
    from pixlat.evaluation.score.assess import assess_model
    from pixlat.evaluation.score.models import load_released, load_run

    settings = rest | sampling_keys(keys.precision, keys.uint8, keys.judges)
    if folder is not None:
        model = load_run(Path(folder).expanduser(), settings, keys.ema, request.device)
    else:
        model = load_released(
            Path(str(keys.checkpoint)).expanduser(), str(keys.method), str(keys.preset), settings, request.device
        )
    return record_of_model(model, assess_model(model, request), request, earlier=earlier_records(keys, folder, model))


def earlier_records(keys: Keys, folder: str | None, model: Model) -> list[Record]:
    """The records of the same run, or of the same released file, that `save` and the training wrote."""
    if folder is not None:
        return recorded(Path(folder).expanduser())
    return recorded(Path(keys.out) / model.name, (f"*/{RESULT}",))


def sampling_keys(precision: str | None, uint8: str | None, judges: Sequence[str] = ()) -> dict[str, str]:
    """The settings of a run that the keys replace."""
    given = {"precision": precision, "uint8": uint8, "judges": f"[{','.join(judges)}]" if judges else None}
    return {f"eval.{key}": value for key, value in given.items() if value is not None}


def images_record(keys: Keys, rest: dict[str, str], request: Request) -> Record:
    """Measures finished images."""
    from pixlat.common.files import sha256_of
    from pixlat.evaluation.features.samples import open_samples
    from pixlat.evaluation.score.assess import assess_images

    place = Path(str(keys.npz or keys.images)).expanduser().absolute()
    samples = open_samples(keys.images, keys.npz)
    npz = None if keys.npz is None else sha256_of(place)
    facts = None if npz is None else facts_of(place, npz)
    data, _ = parse(DataConfig, [f"{key.removeprefix('data.')}={value}" for key, value in rest.items()])
    name, method, space = place.stem, keys.method or UNKNOWN, keys.space or UNKNOWN
    if facts is not None:
        request = as_made(request, facts, keys)
        data, method, space = data if rest else facts.data, facts.method, facts.space
        name = place.parent.name  # every .npz of `pixlat sample` has the same name
    made_with = facts.made_with if facts else None
    met = (made_with["pretrained_components"], made_with["parents"]) if made_with else None
    found = assess_images(samples, request, data, met)
    return record_of_images(keys.name or name, samples.resolution, found, npz, method, space, made_with)


def as_made(request: Request, facts: SampleFacts, keys: Keys) -> Request:
    """The request with what is known of images of `pixlat sample`; a UserError if a key says otherwise."""
    stated = {key: getattr(keys, key) for key in ("labels", "uint8", "precision", "method", "space")}
    facts.check(**stated)
    return dataclasses.replace(
        request,
        labels=facts.labels,
        uint8=facts.uint8,
        precision=facts.precision,
        in_random_order=facts.labels is not None,
    )


def save(keys: Keys, rest: dict[str, str], record: Record, folder: str | None) -> str:
    """Writes one record and returns its table."""
    parent = Path(keys.out) / record["name"] if folder is None else Path(folder).expanduser() / EVALUATIONS
    settings = {**rest, "ema": keys.ema, "seeds": keys.seeds, "n": keys.num_images}
    path = keep(record, parent, settings)
    return f"{record['name']}: {protocol_name(record['protocol'])}\n{table(record)}\n{path}"


def differences(records: Sequence[Record]) -> str:
    """The paired differences of two records."""
    from pixlat.evaluation.metrics.spread import paired_differences

    first, second = records
    found = paired_differences(first, second)
    lines = [
        (
            f"  {d.metric:<20} {d.value:+.5g} ± {d.se:.2g} (bias-corrected {d.value_bc:+.5g}, "
            f"{d.deviations:+.1f} standard errors)"
        )
        for d in found
    ]
    return "\n".join([f"{first['name']} minus {second['name']}, same seeds and labels, paired jackknife", *lines])


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(sys.argv[1:] if arguments is None else arguments, usage, work)


if __name__ == "__main__":
    sys.exit(main())
