"""What is prepared once for many runs. `python launch/prepare.py COMMAND key=value ...`

  images     the training and held-out images, decoded and cropped once, in files that a later run reads
             with data=shards data.path=FOLDER. Takes data.* keys, and to=FOLDER, workers=N (processes; all cores),
             shard_images=8192 (a file). With data.crop=random the files also hold the whole training images,
             of data.resize pixels, of which a run with the same two keys cuts
                 python launch/prepare.py images data=tar data.path=/data/imagenet-wds \\
                     data.image_size=256 to=/scratch/imagenet256
  latents    the moments of every training image's latents, in files that a later run reads with data.latents=FOLDER.
             Takes the keys of launch/run.py, and to=FOLDER, batch=64, dtype=float32 (or float16), device=auto
                 python launch/prepare.py latents method=reg preset=imagenet256-xl \\
                     data.path=/data/imagenet/train to=/scratch/latents
  import     a run folder of a file that a method's authors released, for evaluation/run.py. Takes method=,
             file= (or a folder), and name=, out=runs, preset= (none: the one with the file's architecture),
             weights= (which of the file's), licence=, and keys of launch/run.py
                 python launch/prepare.py import method=jit file=JiT-B-16/checkpoint-last.pth name=jit-b16-released
  export     weights as safetensors, config and a model card of a run: from=, to=, ema=, licence=
                 python launch/prepare.py export from=runs/my-run to=my-run-released licence=MIT
  tokenizer  one file with the weights and one with the facts of an autoencoder that was trained here
                 python launch/prepare.py tokenizer from=runs/my-autoencoder to=autoencoder.safetensors

The same command again goes on where it was stopped, or finds everything there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pixlat.common.command_line import as_command
from pixlat.common.config.resolve import resolve, split_overrides
from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError, close_match
from pixlat.methods import get_spec


def images(options: dict[str, str]) -> str:
    """Decodes and crops a data set."""
    folder, workers = Path(_take(options, "to")), int(options.pop("workers", str(os.cpu_count() or 1)))
    shard_images = int(options.pop("shard_images", "8192"))
    if odd := [key for key in options if not key.startswith("data.")]:
        raise UserError(f"unknown keys: {', '.join(odd)}. {__doc__}")
    data = resolve(get_spec(RunConfig.method), options).data
    from pixlat.common.datasets.load import load_data
    from pixlat.common.datasets.write_shards import write_shards

    source, start = load_data(data), time.perf_counter()
    card = write_shards(folder, source, workers, shard_images, source.train.resize if data.crop == "random" else None)
    seconds, count = time.perf_counter() - start, source.info.num_train + source.info.num_heldout
    skipped = [reason for part in card.parts.values() for reason in part.skipped.values()]
    told = [f"  {reason}" for reason in skipped]
    made = (
        f"{count} images of {card.image_size} px under {folder}, {count / seconds:.0f} images/s on {max(1, workers)} "
        f"processes; {len(skipped)} skipped"
    )
    crops = f" data.crop=random data.resize={card.resize}" if card.resize else ""
    return "\n".join([made, *told, f"Use them with data=shards data.path={folder}{crops}"])


def latents(options: dict[str, str]) -> str:
    """Encodes a training set and its mirror images."""
    folder, batch = Path(_take(options, "to")), int(options.pop("batch", "64"))
    dtype, device_name = options.pop("dtype", "float32"), options.pop("device", "auto")
    run = resolve(get_spec(options.get("method", RunConfig.method)), options)
    if not hasattr(run.model, "tokenizer"):
        raise UserError(f"method={run.method} has no tokenizer, so it has no latents to prepare.")
    import torch

    from pixlat.common.datasets.load import load_data
    from pixlat.common.frozen.store_latents import write_latents
    from pixlat.common.frozen.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(run.model.tokenizer, run.model.tokenizer_path)
    source = load_data(run.data)
    tokenizer.load()
    device = device_name if device_name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    card = write_latents(folder, source.train, tokenizer.to(device), batch, dtype)
    made = (
        f"{card.images} images and their mirror images, moments {card.shape}, "
        f"in {len(card.shards)} files under {folder}."
    )
    return f"{made} Use them with data.latents={folder}"


def tokenizer(options: dict[str, str]) -> str:
    """Writes the weights of a run's autoencoder and what they do with the held-out images."""
    folder, file = Path(_take(options, "from")), Path(_take(options, "to"))
    _refuse(options)
    from pixlat.common.config.saved import read_config
    from pixlat.common.frozen.export_tokenizer import export_tokenizer
    from pixlat.evaluation.records.record import RESULT, read_record

    read_config(folder)  # refuses what is not a run folder
    if not (folder / RESULT).is_file():
        raise UserError(
            f"from={folder} has no {RESULT}, so what its training cost is not known. "
            "Give the folder of a finished run of method=vae."
        )
    card = export_tokenizer(folder, file, read_record(folder / RESULT))
    return (
        f"{file} ({card['bytes']:,} bytes, sha256 {card['sha256']}), {card['psnr_heldout']:.2f} dB on held-out images"
    )


def import_file(options: dict[str, str]) -> str:
    """Makes a run folder of a released file, or of what `export` wrote."""
    file, method = Path(_take(options, "file")).expanduser(), _take(options, "method")
    name, out = options.pop("name", file.stem), options.pop("out", RunConfig.out)
    weights, preset, licence = (options.pop(key, None) for key in ("weights", "preset", "licence"))
    from pixlat.launch.released import import_released

    return import_released(file, Path(out) / name, method, weights, preset, licence, options)


def export(options: dict[str, str]) -> str:
    """Writes what can be given away of a run."""
    folder, to = Path(_take(options, "from")), Path(_take(options, "to"))
    ema, licence = options.pop("ema", None), options.pop("licence", "")
    _refuse(options)
    from pixlat.launch.export import export_run

    return export_run(folder, to, ema, licence)


COMMANDS: dict[str, Callable[[dict[str, str]], str]] = {
    "images": images,
    "latents": latents,
    "import": import_file,
    "export": export,
    "tokenizer": tokenizer,
}


def _take(options: dict[str, str], key: str) -> str:
    if key not in options:
        raise UserError(f"{key}= is missing. {__doc__}")
    return options.pop(key)


def _refuse(options: dict[str, str]) -> None:
    if options:
        raise UserError(f"unknown keys: {', '.join(options)}. {__doc__}")


@as_command
def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit code: 0 finished, 2 a mistake in the command or its inputs."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise UserError(
                f"{arguments[0]!r} is not a command.{close_match(arguments[0], COMMANDS)} "
                f"Commands: {', '.join(COMMANDS)}."
            )
        given = split_overrides(arguments[1:])
        if swept := [key for key, values in given.items() if len(values) > 1]:
            raise UserError(f"{', '.join(swept)}: one value each; nothing is swept here.")
        print(COMMANDS[arguments[0]]({key: values[0] for key, values in given.items()}))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
