"""JiT, table 3: more noise in training (a lower mu) helps x-prediction.

It does not help if the network cannot predict its target.
"""

from __future__ import annotations

from pixlat.evaluation.studies.claim_tools.emoji_runs import LEARNED, SAMPLES, jit_distance, ratio
from pixlat.evaluation.studies.claim_tools.framework import Budget, Claim, Criterion, Estimate, Evidence
from pixlat.evaluation.studies.claim_tools.training import line, panels

BEST, NONE = -0.8, 0.0  # the paper's choice; no shift
PREDICTIONS = ("x", "eps")


def means(prediction: str, quick: bool) -> tuple[float, ...]:
    """The values of mu to try."""
    if not quick:
        return (-1.2, BEST, -0.4, NONE)
    return (-1.6, BEST, NONE) if prediction == "x" else (-1.6, NONE)


def measure(budget: Budget) -> Evidence:
    """The distance for every mu and prediction."""
    images, found = budget.choose(4800, 32_000), {}
    for prediction in PREDICTIONS:
        for mean in means(prediction, budget.quick):
            changes = {"model.prediction": prediction, "model.time_mean": str(mean)}
            found[prediction, mean] = [jit_distance(changes, images, seed, budget.cache) for seed in budget.seeds]
    figure, [[axes]] = panels(1, 1, (5.0, 3.4))
    for color, prediction in enumerate(PREDICTIONS):
        values = [Estimate.over(found[prediction, mean]) for mean in means(prediction, budget.quick)]
        line(axes, means(prediction, budget.quick), values, color, f"{prediction}-prediction")
    axes.set(
        xlabel="mu (lower: more noise in training)", ylabel=f"Fréchet distance ({SAMPLES} samples)", ylim=(0, None)
    )
    axes.legend(frameon=False)
    best_eps = [min(each) for each in zip(*(found["eps", mean] for mean in means("eps", budget.quick)), strict=True)]
    worst_x = [max(each) for each in zip(*(found["x", mean] for mean in means("x", budget.quick)), strict=True)]
    return Evidence(
        estimates={
            "learned": Estimate.over(found["x", BEST]),
            "shift": ratio(found["x", NONE], found["x", BEST]),
            "rescue": ratio(best_eps, worst_x),
        },
        headers=["prediction", "mu", "Fréchet distance"],
        rows=[[prediction, f"{mean:g}", str(Estimate.over(values))] for (prediction, mean), values in found.items()],
        figure=figure,
    )


CLAIM = Claim(
    name="jit-noise",
    paper="JiT (arXiv 2511.13720), section 4.2 and table 3",
    statement=(
        "Times shifted to more noise (mu = -0.8 against 0) improve x-prediction; "
        "no shift makes eps-prediction of large patches work."
    ),
    setting=(
        "The JiT of jit-combinations on emoji of 32 pixels, patches of 192 numbers and 64 units, v-loss (the paper: "
        "ImageNet 256, 768 numbers and 768 units); 32,000 images (quick: 4,800)."
    ),
    amended="The first criterion was added after a quick run whose networks had learned nothing.",
    criteria=(
        Criterion("learned", "the distance of x-prediction with mu = -0.8", "at most", LEARNED, needed=True),
        Criterion("shift", "the distance of x-prediction with mu = 0 over that with mu = -0.8", "at least", 1.0),
        Criterion(
            "rescue",
            "the distance of eps-prediction at its best mu over that of x-prediction at its worst",
            "at least",
            1.3,
        ),
    ),
    measure=measure,
    minutes=(1.2, 7.0),
)
