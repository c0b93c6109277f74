"""Which judges measure the images of a data set.

A judge is an extractor whose distance says how far generated images are from real ones. Plug-ins of other packages
(entry points of the group `pixlat.extractors`) are objects that get a device and return an extractor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from pixlat.common.config.resolve import one_of
from pixlat.common.datasets.summary import DataSummary
from pixlat.common.errors import UserError
from pixlat.common.images.emoji32 import IMAGE_SIZE
from pixlat.common.plugins import Plugin, load_plugin, plugins_of
from pixlat.evaluation.features.extractor import EmbeddedExtractor, Extractor
from pixlat.evaluation.judges.shipped import JUDGES, load_judge

EMOJI = "emoji32"
LITE0 = "embedded"  # the name of EfficientNet-Lite0 in `eval.judges`
GROUP = "pixlat.extractors"


@dataclass(frozen=True)
class Judge:
    """An extractor with its role in an evaluation."""

    extractor: Extractor
    ranks: bool  # whether it takes part in the headline, which ranks the rows of a table
    #: the data set whose classes are the extractor's logits in order; None: they are other classes, and a linear
    #: discriminant on the features tells the data's classes
    labels_of: str | None = None

    @property
    def id(self) -> str:
        return self.extractor.id


def panel(data: DataSummary, wanted: Sequence[str], device: torch.device | str) -> list[Judge]:
    """The judges of a data set, each loaded on the device.

    wanted: the value of `eval.judges`. If it is empty, emoji32 has our judges, which no method has met, beside
    EfficientNet-Lite0, which ranks nothing there; any other data set has EfficientNet-Lite0. Judges that the user
    names all rank.
    """
    check_judges(wanted, data)
    if wanted:
        return [built(name, device) for name in wanted]
    if data.name == EMOJI:
        return [*(built(name, device) for name in JUDGES), Judge(EmbeddedExtractor(device), ranks=False)]
    return [built(LITE0, device)]


def check_judges(wanted: Sequence[str], data: DataSummary) -> None:
    """Raises UserError for a name that no judge has, for one given twice, and for a judge of other images."""
    for name in wanted:
        one_of("eval.judges", name, (LITE0, *JUDGES, *plug_ins()))
        if wanted.count(name) > 1:
            raise UserError(f"eval.judges=[{','.join(wanted)}] names {name} twice. Name each judge once.")
        if name in JUDGES and data.image_size != IMAGE_SIZE:
            raise UserError(
                f"eval.judges={name}: this judge was trained on the emoji of {IMAGE_SIZE} pixels, but {data.name} has "
                f"images of {data.image_size} pixels. Leave the key out, or name {LITE0} or a judge of your own."
            )


def plug_ins() -> dict[str, Plugin]:
    """The extractors of other packages by name."""
    return plugins_of(GROUP, frozenset({LITE0, *JUDGES}), "extractor")


def built(name: str, device: torch.device | str) -> Judge:
    """The judge with this name, on the device."""
    if name == LITE0:
        return Judge(EmbeddedExtractor(device), ranks=True)
    if name in JUDGES:
        return Judge(load_judge(name, device), ranks=True, labels_of=EMOJI)
    build = cast("Callable[[torch.device], Extractor]", load_plugin(plug_ins()[name], "eval.judges"))
    return Judge(build(torch.device(device)), ranks=True)
