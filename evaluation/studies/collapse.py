"""The collapse study: whether the latents of a method that trains its own encoder collapse, under each of its losses.

  pixlat study collapse method=NAME out=runs/collapse seeds=[0,1,2]

Each preset is trained from each seed with the suite's trainer. Its raw weights are measured on
held-out images before the training and at every `train.preview_images`: effective rank and spread of
the latents, and the share of the pixels' variance that encoding and decoding loses. With four presets
it checks the claims of the method that avoids collapse, in this order: naive joint training,
+ stop-gradient, + clean-latent loss, + average and masking. Writes collapse.json, collapse.md and
collapse.png. OUT/rows keeps the measurements of every trained run, so that no run is repeated.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixlat.common.command_line import as_command
from pixlat.common.config.identity import identity
from pixlat.common.config.resolve import resolve
from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.common.files import read_rows, write_whole
from pixlat.evaluation.command import Syntax, help_text, parse, run_command
from pixlat.methods import get_spec

if TYPE_CHECKING:
    from torch import Tensor

    from pixlat.common.datasets.load import DataSource
    from pixlat.common.images.image_set import ImageSet
    from pixlat.methods.base import Method


Row = dict[str, float]
Runs = dict[str, dict[int, list[Row]]]  # preset -> seed -> measurements in the order of the steps
PRESETS = ["collapse-naive", "collapse-stopgrad", "collapse-clean", "collapse-full"]
TITLES = ("naive", "+ stop-gradient", "+ clean-latent loss", "+ average and masking")


@dataclass
class Keys:
    """The command's keys."""

    method: str | None = None  # a method with the presets below
    out: str = "runs/collapse"  # folder for the results
    presets: list[str] = field(default_factory=lambda: list(PRESETS))  # the four losses, in the order of the claims
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # seeds of weights, data order and noise
    heldout: int = 500  # number of held-out images to measure, drawn from all classes


GROUPS = dict.fromkeys(("data", "train", "model"), "over the presets, as for `pixlat train`")
SYNTAX = Syntax(Keys, GROUPS)


def study(run: RunConfig, heldout: int) -> list[Row]:
    """Trains one run in a temporary folder.

    Returns its measurements, each with "step", "images" and, from the training batches, "erank_predicted".
    """
    import torch

    from pixlat.common.datasets.batches import TrainingPlan, training_batches
    from pixlat.common.datasets.load import load_data
    from pixlat.common.seeds import derive
    from pixlat.common.training.loop import train
    from pixlat.common.training.setup import make_accelerator
    from pixlat.common.training.state import TrainState
    from pixlat.methods import get_class
    from pixlat.methods.base import DataInfo

    source = load_data(run.data)
    torch.manual_seed(derive("init", run.seed))
    method = get_class(run.method)(run.model, DataInfo.of(source.info))
    method.load_external()
    rows = [{"step": 0, "images": 0, **measure(method, held_out(source), heldout)}]
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(run.train, Path(folder))

        def preview(state: TrainState) -> None:
            with state.weights("raw") as current:
                rows.append(
                    {
                        "step": state.step,
                        "images": state.step * run.train.batch,
                        **measure(current, held_out(source), heldout),
                    }
                )

        plan = TrainingPlan(
            source.train.labels, run.train.batch, run.seed, source.balanced, run.data.flip, run.data.crop == "random"
        )

        def batches(start_step: int, accumulation: int) -> Iterator[list[dict[str, Tensor]]]:
            place = (accelerator.process_index, accelerator.num_processes)
            return training_batches(
                source.train,
                plan,
                start_step,
                plan.batch // (accumulation * accelerator.num_processes),
                accumulation,
                *place,
            )

        train(
            method,
            run.train,
            batches,
            Path(folder),
            run.seed,
            identity(run),
            accelerator,
            [(run.train.preview_images, preview)],
        )
        logged = {row["step"]: row for row in read_rows(Path(folder) / "metrics.jsonl")}
    return [
        row | {key: value for key, value in logged.get(row["step"], {}).items() if key == "erank_predicted"}
        for row in rows
    ]


def held_out(source: DataSource) -> ImageSet:
    """The images to measure: the held-out images, or the training images if none are held out."""
    return source.heldout if len(source.heldout) else source.train


def measure(method: Method, images: ImageSet, count: int, batch: int = 100) -> Row:
    """Statistics of the latents of `count` images (a fixed random draw), and "unexplained".

    "unexplained" is the squared error of the reconstructions divided by that of the mean image.
    """
    import torch

    from pixlat.common.images.splits import fixed_draw
    from pixlat.common.maths.spectrum import latent_health

    device = next(method.parameters()).device
    pixels = torch.from_numpy(images.fetch(fixed_draw(len(images), count))).to(device).float() / 127.5 - 1
    was_training = method.training
    method.eval()
    with torch.no_grad():
        latents = torch.cat([method.encode(part) for part in pixels.split(batch)])
        rebuilt = torch.cat([method.decode(part) for part in latents.split(batch)])
    method.train(was_training)
    error, spread = (rebuilt - pixels).square().sum(), (pixels - pixels.mean(dim=0)).square().sum()
    health = latent_health(latents.flatten(2).transpose(1, 2))
    return {name: value.item() for name, value in {**health, "unexplained": error / spread}.items()}


@dataclass(frozen=True)
class Claim:
    """A statement about one seed, with the numbers that decide it."""

    text: str
    seed: int
    measured: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the measured value lies within its bounds."""
        return (self.at_least is None or self.measured >= self.at_least) and (
            self.at_most is None or self.measured <= self.at_most
        )


def claims(runs: Runs, presets: Sequence[str]) -> list[Claim]:
    """The claims about the order of the four presets, for each seed that all of them share.

    `kept` is the last effective rank divided by the effective rank before training.
    """
    found = []
    for seed in sorted(set.intersection(*(set(runs[preset]) for preset in presets))):
        first = [runs[preset][seed][0] for preset in presets]
        naive, stopped, clean, full = last = [runs[preset][seed][-1] for preset in presets]
        kept = [end["erank"] / start["erank"] for start, end in zip(first, last, strict=True)]
        channels = naive["erank"] / naive["erank_share"]
        found += [
            Claim("naive: share of the rank that is kept", seed, kept[0], at_most=0.50),
            Claim("naive: std between images", seed, naive["std_between"], at_most=0.15),
            Claim("naive: directions above unit noise", seed, naive["edof"], at_most=0.1),
            Claim("stop-gradient: rank gained over naive", seed, stopped["erank"] - naive["erank"], at_least=0.5),
            Claim("stop-gradient: share of the rank that is kept", seed, kept[1], at_most=0.75),
            Claim(
                "clean-latent loss: rank gained over stop-gradient",
                seed,
                clean["erank"] - stopped["erank"],
                at_least=0.6,
            ),
            Claim("clean-latent loss: share of the rank that is kept", seed, kept[2], at_least=0.70),
            Claim("all: share of the rank that is kept", seed, kept[3], at_least=0.85),
            Claim("all: std between images", seed, full["std_between"], at_least=0.4),
            Claim("all: directions above unit noise", seed, full["edof"], at_least=1.3),
            Claim("all: pixels' variance lost in reconstruction", seed, full["unexplained"], at_most=0.35),
            Claim("all: the same over naive's", seed, full["unexplained"] / naive["unexplained"], at_most=1.0),
            *(
                Claim(
                    f"{name}: rank of the prediction, of {channels:.0f}",
                    seed,
                    row["erank_predicted"],
                    at_least=7 / 8 * channels,
                )
                for name, row in (("naive", naive), ("stop-gradient", stopped))
            ),
            *(
                Claim(
                    f"{name}: rank of the prediction, of {channels:.0f}",
                    seed,
                    row["erank_predicted"],
                    at_most=5.5 / 8 * channels,
                )
                for name, row in (("clean-latent loss", clean), ("all", full))
            ),
        ]
    return found


COLUMNS = {
    "erank": "effective rank",
    "std_between": "std between images",
    "edof": "edof",
    "erank_predicted": "rank of the prediction",
    "unexplained": "variance lost",
}


def table(runs: Runs, presets: Sequence[str]) -> str:
    """A Markdown table: for each preset the effective rank before training and the last measurements.

    Cells show the mean and the range over seeds.
    """
    from tabulate import tabulate

    def cell(values: Sequence[float]) -> str:
        return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    lines = []
    for title, preset in zip(titles(presets), presets, strict=True):
        by_seed = list(runs[preset].values())
        ends = [[rows[-1][key] for rows in by_seed] for key in COLUMNS]
        lines.append([title, cell([rows[0]["erank"] for rows in by_seed]), *map(cell, ends)])
    return tabulate(lines, ["", "rank at the start", *COLUMNS.values()], tablefmt="pipe", disable_numparse=True)


def titles(presets: Sequence[str]) -> Sequence[str]:
    """The names of the presets in tables and pictures."""
    return TITLES if len(presets) == len(TITLES) else presets


def claims_table(found: Sequence[Claim]) -> str:
    """A Markdown table: each claim with its bound, the values of all seeds, and for how many seeds it holds."""
    from tabulate import tabulate

    lines = []
    for text in dict.fromkeys(claim.text for claim in found):
        same = [claim for claim in found if claim.text == text]
        bound = f"at most {same[0].at_most:g}" if same[0].at_least is None else f"at least {same[0].at_least:g}"
        lines.append(
            [
                text,
                bound,
                ", ".join(f"{claim.measured:.3g}" for claim in same),
                f"{sum(claim.holds for claim in same)} of {len(same)}",
            ]
        )
    return tabulate(lines, ["claim", "bound", "measured", "holds"], tablefmt="pipe", disable_numparse=True)


def draw(runs: Runs, presets: Sequence[str], path: Path) -> None:
    """Plots effective rank and std between images over the steps.

    A line shows the mean over a preset's seeds, a band their range.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for number, key in enumerate(("erank", "std_between"), 1):
        axes = figure.add_subplot(1, 2, number)
        for color, (title, preset) in enumerate(zip(titles(presets), presets, strict=True)):
            steps = [row["step"] for row in next(iter(runs[preset].values()))]
            values = np.array([[row[key] for row in rows] for rows in runs[preset].values()])
            axes.plot(steps, values.mean(axis=0), color=f"C{color}", linewidth=1.8, label=title)
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=f"C{color}", alpha=0.15, linewidth=0)
        axes.set_title(f"{COLUMNS[key]} of held-out images' latents", fontsize=10)
        axes.set_xlabel("steps", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(presets), fontsize=9, frameon=False
    )
    figure.savefig(path)


def usage() -> str:
    """Example and keys."""
    return help_text(str(__doc__), Keys, GROUPS)


def trained(run: RunConfig, heldout: int, file: Path) -> list[Row]:
    """The measurements of a run: read from its file, or made by training. Raises UserError for other settings."""
    # Files of early versions lack the word "drawn". They measured the first images, which show a few classes only.
    mark = f"{identity(run)}/{heldout} drawn"
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["identity"] != mark:
            raise UserError(
                f"{file} was measured with other settings ({kept['identity']}, now {mark}). "
                "Choose another out=, or remove it."
            )
        return list(kept["rows"])
    print(file.stem, file=sys.stderr)
    rows = study(run, heldout)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({"identity": mark, "rows": rows}) + "\n")
    return rows


def work(arguments: Sequence[str]) -> str:
    """Trains the runs that have no measurements yet, writes the results, and returns the tables."""
    keys, passed = parse(Keys, arguments, tuple(GROUPS))
    if keys.method is None or not keys.presets or not keys.seeds:
        raise UserError(
            f"give method=, and at least one preset and one seed; now method={keys.method}, "
            f"presets={keys.presets}, seeds={keys.seeds}."
        )
    spec, folder = get_spec(keys.method), Path(keys.out).expanduser()
    settings = {
        preset: {seed: resolve(spec, {"preset": preset, "seed": str(seed), **passed}) for seed in keys.seeds}
        for preset in keys.presets
    }
    runs: Runs = {
        preset: {
            seed: trained(run, keys.heldout, folder / "rows" / f"{preset}-seed{seed}.json")
            for seed, run in by_seed.items()
        }
        for preset, by_seed in settings.items()
    }
    found = claims(runs, keys.presets) if len(keys.presets) == len(TITLES) else []
    text = "\n\n".join([table(runs, keys.presets), *([claims_table(found)] if found else [])]) + "\n"
    write_whole(folder / "collapse.md", text)
    write_whole(folder / "collapse.json", json.dumps(report(runs, found), indent=1) + "\n")
    draw(runs, keys.presets, folder / "collapse.png")
    return f"{text}\n{folder / 'collapse.png'}"


def report(runs: Runs, found: Sequence[Claim]) -> Mapping[str, Any]:
    """The contents of collapse.json: all measurements and claims."""
    return {"runs": runs, "claims": [vars(claim) | {"holds": claim.holds} for claim in found]}


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(sys.argv[1:] if arguments is None else arguments, usage, work)
