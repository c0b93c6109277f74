"""Measures the features of a generator's blocks: CKNNA with a frozen encoder, and a linear probe of the classes.

  pixlat study hidden-states run=runs/NAME
  pixlat study hidden-states run=runs/NAME time=0.3 images=1000 encoder=embedded

Prints one JSON object with both numbers for every block of `method.blocks()`. The held-out images are
a fixed draw from all classes. They are noised to `time`, and the method does not get their class. A
block's features are the mean of its image tokens (arXiv 2410.06940, section 3 and appendix). CKNNA
compares them with the mean of the encoder's tokens. The probe learns on a fixed draw of training images.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixlat.common.command_line import as_command
from pixlat.common.config.resolve import require
from pixlat.evaluation.command import Syntax, groups_of_a_run, help_text, needed, parse, run_command


@dataclass
class Keys:
    """The command's keys."""

    run: str | None = None  # a run folder
    encoder: str = "embedded"  # the frozen encoder that the blocks are compared with
    time: float = 0.5  # how much noise the images get: 0 is data, 1 is noise
    images: int = 2000  # number of images of each split
    neighbours: int = 10  # number of nearest neighbours for CKNNA
    batch: int = 50  # images per batch


GROUPS = groups_of_a_run()
SYNTAX = Syntax(Keys, GROUPS)


def measure(folder: Path, keys: Keys, overrides: dict[str, str]) -> dict[str, Any]:
    """Both measures for every block of a run's network."""
    import torch

    from pixlat.common.datasets.load import load_data
    from pixlat.common.frozen.encoders import build_encoder
    from pixlat.common.images.splits import fixed_draw
    from pixlat.evaluation.score.models import load_run
    from pixlat.evaluation.studies.block_features import block_features, cknna, encoder_features, linear_probe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_run(folder, overrides, None, device)
    method, source = model.method, load_data(model.run.data)
    encoder = build_encoder(keys.encoder)
    encoder.load()
    encoder = encoder.to(device)
    features, labels = {}, {}
    for part, images in (("train", source.train), ("heldout", source.heldout)):
        positions = fixed_draw(len(images), keys.images)
        features[part] = block_features(method, images, positions, keys.time, keys.batch, device)
        labels[part] = torch.from_numpy(images.labels[positions]).to(device)
    reference = encoder_features(encoder, source.heldout, positions, keys.batch, device)
    blocks = [
        {
            "block": number,
            "cknna": cknna(heldout, reference, keys.neighbours),
            "probe_accuracy": linear_probe(
                (train, labels["train"]), (heldout, labels["heldout"]), source.info.num_classes
            ),
        }
        for number, (train, heldout) in enumerate(zip(features["train"], features["heldout"], strict=True), 1)
    ]
    return {
        "run": folder.name,
        "encoder": keys.encoder,
        "time": keys.time,
        "neighbours": keys.neighbours,
        "images": len(reference),
        "blocks": blocks,
    }


def work(arguments: Sequence[str]) -> str:
    """Returns the measurements as JSON."""
    keys, overrides = parse(Keys, arguments, tuple(GROUPS))
    (folder,) = needed(keys, "study hidden-states", "run")
    require(0 <= keys.time <= 1, "time", keys.time, "must be between 0 (data) and 1 (noise)")
    for key in ("images", "neighbours", "batch"):
        require(getattr(keys, key) >= 1, key, getattr(keys, key), "must be at least 1")
    return json.dumps(measure(Path(folder).expanduser(), keys, overrides), indent=1)


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements as JSON. Returns the exit code, which is 2 for a mistake in the command."""
    return run_command(
        sys.argv[1:] if arguments is None else arguments, lambda: help_text(str(__doc__), Keys, GROUPS), work
    )


if __name__ == "__main__":
    sys.exit(main())
