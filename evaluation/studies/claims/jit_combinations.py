"""JiT, table 2: nine combinations of prediction and loss.

The choice of the prediction is decisive if a patch has more numbers than the network has units.
"""

from __future__ import annotations

from pixlat.common.maths.flow import SPACES
from pixlat.evaluation.studies.claim_tools.emoji_runs import LEARNED, SAMPLES, jit_distance, ratio
from pixlat.evaluation.studies.claim_tools.framework import Budget, Claim, Criterion, Estimate, Evidence
from pixlat.evaluation.studies.claim_tools.training import bars, panels

SMALL, LARGE = 16, 32  # image sizes in pixels; their patches of 4 and 8 pixels have 48 and 192 numbers
Combination = tuple[int, str, str]  # image size, prediction, loss space


def combinations(quick: bool) -> list[Combination]:
    """All 18 combinations; in a quick run only v-loss, and for x-prediction with large patches every loss."""
    every = [(size, prediction, loss) for size in (SMALL, LARGE) for prediction in SPACES for loss in SPACES]
    return [each for each in every if not quick or each[2] == "v" or each[:2] == (LARGE, "x")]


def distance(combination: Combination, images: int, seed: int, budget: Budget) -> float:
    """The distance after training with this combination."""
    size, prediction, loss = combination
    return jit_distance({"model.prediction": prediction, "model.loss_space": loss}, images, seed, budget.cache, size)


def measure(budget: Budget) -> Evidence:
    """The distances of all combinations."""
    images = budget.choose(4800, 40_000)
    found = {
        each: [distance(each, images, seed, budget) for seed in budget.seeds] for each in combinations(budget.quick)
    }

    def by_seed(chosen: list[Combination]) -> list[tuple[float, ...]]:
        return list(zip(*(found[each] for each in chosen), strict=True))

    others = [
        by_seed([(size, prediction, "v") for prediction in SPACES if prediction != "x"]) for size in (SMALL, LARGE)
    ]
    losses = by_seed([(LARGE, "x", loss) for loss in SPACES])
    figure, [axes] = panels(1, 2, (4.6, 3.2))
    for axis, size in zip(axes, (SMALL, LARGE), strict=True):
        shown = [each for each in found if each[0] == size]
        names = [f"{prediction}\n{loss}-loss" for _, prediction, loss in shown]
        colors = [f"C{SPACES.index(prediction)}" for _, prediction, _ in shown]
        bars(
            axis,
            names,
            [Estimate.over(found[each]) for each in shown],
            f"patches of {3 * (size // 4) ** 2} numbers, 64 units",
            colors,
        )
    axes[0].set_ylabel(f"Fréchet distance ({SAMPLES} samples)")
    return Evidence(
        estimates={
            "learned": Estimate.over(found[LARGE, "x", "v"]),
            "small": ratio([max(pair) for pair in others[0]], found[SMALL, "x", "v"]),
            "large": ratio([min(pair) for pair in others[1]], found[LARGE, "x", "v"]),
            "loss": ratio([max(each) for each in losses], [min(each) for each in losses]),
        },
        headers=["numbers a patch", "prediction", "loss", "Fréchet distance"],
        rows=[
            [str(3 * (size // 4) ** 2), prediction, loss, str(Estimate.over(values))]
            for (size, prediction, loss), values in found.items()
        ],
        figure=figure,
        remarks=[
            (
                "A network that has learned nothing samples noise, whose distance is about 2,240 at 32 pixels: "
                "distances near it and above show no success."
            )
        ],
    )


CLAIM = Claim(
    name="jit-combinations",
    paper="JiT (arXiv 2511.13720), section 4.1 and table 2",
    statement=(
        "Where a patch has fewer numbers than the network has units, every prediction works; where it has more, "
        "only x-prediction does. The space of the loss is secondary."
    ),
    setting=(
        "JiT of 2 blocks of width 64 without a bottleneck; emoji of 16 pixels in patches of 48 numbers and of 32 "
        "pixels in patches of 192 (the paper: ImageNet at 64 and 256, patches of 48 and 768, width 768), 16 tokens "
        "either way; 40,000 images (quick: 4,800; v-loss only, and every loss for x-prediction of large patches), "
        "no guidance. Distance: embedded Fréchet distance of 200 samples to 1,533 training images of that size."
    ),
    amended=(
        "The full budget was chosen after a pilot: one seed, 32,000 images, large patches, 1,921 with x-prediction and "
        "2,374 with eps-prediction. The first criterion was added after a quick run whose networks had learned nothing."
    ),
    criteria=(
        Criterion(
            "learned", "with large patches, x-prediction and v-loss, the distance", "at most", LEARNED, needed=True
        ),
        Criterion(
            "small",
            "with small patches and v-loss, the distance of the worse of eps- and v-prediction "
            "over that of x-prediction",
            "at most",
            1.5,
        ),
        Criterion(
            "large",
            "with large patches and v-loss, the distance of the better of eps- and v-prediction "
            "over that of x-prediction",
            "at least",
            1.3,
        ),
        Criterion(
            "loss",
            "with large patches and x-prediction, the distance of the worst loss over that of the best",
            "at most",
            1.5,
        ),
    ),
    measure=measure,
    minutes=(1.8, 23.0),
)
