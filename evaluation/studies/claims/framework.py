"""What a claim is: a statement of a paper, criteria, a measurement with error bars, and the verdict that follows.

Criteria are written before the first run. What was changed after numbers had been seen, a claim tells as `amended`.

A claim is one module of this package with a `CLAIM`. It measures with the suite's own methods, losses and samplers.
Nobody decides a verdict: each criterion bounds one estimate, and it is met or missed where the estimate's 95 %
interval lies on one side of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal

from pixlat.common.errors import UserError, close_match
from pixlat.evaluation.records.claims import ClaimRecord, validate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Student's t at 97.5 % by degrees of freedom; beyond, the normal's.
T_QUANTILES = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NORMAL_QUANTILE = 1.96


class Verdict(StrEnum):
    """What a measurement says of a statement."""

    HOLDS = "holds"
    FAILS = "does not hold at this scale"
    OPEN = "inconclusive"


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error over `n` seeds; a count that depends on none has n = 0 and no error."""

    value: float
    se: float
    n: int

    @classmethod
    def over(cls, values: Sequence[float]) -> Estimate:
        """The mean over seeds. One seed has no error bar, which is a ValueError."""
        if len(values) < 2:
            raise ValueError("an error bar needs at least two seeds")
        return cls(fmean(values), stdev(values) / math.sqrt(len(values)), len(values))

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A number without chance in it."""
        return cls(value, 0.0, 0)

    @property
    def margin(self) -> float:
        """Half of the 95 % interval."""
        return self.se * T_QUANTILES.get(self.n - 1, NORMAL_QUANTILE)

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.se:.2g}" if self.n else f"{self.value:.4g}"


@dataclass(frozen=True)
class Criterion:
    """A bound on one estimate."""

    estimate: str  # its name in Evidence.estimates
    text: str  # what it is, so that "TEXT is at most BOUND" is a sentence
    sense: Literal["at most", "at least"]
    bound: float
    # where it is not met, what the others say means nothing, and the claim stays open:
    # networks that have learned nothing, say
    needed: bool = False

    def verdict_on(self, estimate: Estimate) -> Verdict:
        """HOLDS or FAILS where the whole interval is on one side of the bound. What is not a number met no bound."""
        distance = estimate.value - self.bound if self.sense == "at least" else self.bound - estimate.value
        if math.isnan(distance) or distance < -estimate.margin:
            return Verdict.FAILS
        return Verdict.HOLDS if distance >= estimate.margin else Verdict.OPEN

    def __str__(self) -> str:
        return f"{self.text} is {self.sense} {self.bound:g}" + (", or nothing was tested" if self.needed else "")


@dataclass(frozen=True)
class Budget:
    """How much is spent on a claim."""

    quick: bool
    seeds: tuple[int, ...]
    # for what several claims compute alike, such as the features of real images
    cache: Path = Path("runs/claims/.references")

    def choose(self, quick: int, full: int) -> int:
        """One number for the quick run, another for the full one."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Evidence:
    """What a measurement found."""

    estimates: Mapping[str, Estimate]  # one for each criterion, by its name
    headers: Sequence[str]  # of the table of everything that was measured
    rows: Sequence[Sequence[str]]
    figure: Figure
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Claim:
    """A statement and how it is checked."""

    name: str
    paper: str  # with the section or figure
    statement: str
    setting: str  # how it is checked here, and what differs from the paper
    criteria: tuple[Criterion, ...]
    measure: Callable[[Budget], Evidence]
    minutes: tuple[float, float]  # quick and full, on one core
    num_seeds: tuple[int, int] = field(default=(3, 3))  # quick and full; 0 where nothing is random
    # what of criteria, budget or measurement was changed after numbers had been seen, and why; "" where nothing was
    amended: str = ""

    def budget(self, quick: bool, cache: Path = Budget.cache) -> Budget:
        """The quick or the full budget."""
        return Budget(quick, tuple(range(self.num_seeds[0 if quick else 1])), cache)


def verdicts_of(claim: Claim, evidence: Evidence) -> tuple[Verdict, list[Verdict]]:
    """The verdict and that of each criterion: all met, or one missed; inconclusive where neither is so,
    and where one that is needed is not met.
    """
    each = [criterion.verdict_on(evidence.estimates[criterion.estimate]) for criterion in claim.criteria]
    if any(
        criterion.needed and verdict != Verdict.HOLDS for criterion, verdict in zip(claim.criteria, each, strict=True)
    ):
        return Verdict.OPEN, each
    if Verdict.FAILS in each:
        return Verdict.FAILS, each
    return (Verdict.HOLDS if all(verdict == Verdict.HOLDS for verdict in each) else Verdict.OPEN), each


def build_record(claim: Claim, evidence: Evidence, quick: bool, seconds: float, device: str) -> ClaimRecord:
    """The record of a measured claim, validated."""
    verdict, each = verdicts_of(claim, evidence)
    criteria = []
    for criterion, outcome in zip(claim.criteria, each, strict=True):
        estimate = evidence.estimates[criterion.estimate]
        criteria.append(
            {
                "text": str(criterion),
                "value": estimate.value,
                "se": estimate.se,
                "n": estimate.n,
                "verdict": outcome.value,
            }
        )
    record: ClaimRecord = {
        "schema": "claim.v1",
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "name": claim.name,
        "paper": claim.paper,
        "statement": claim.statement,
        "setting": claim.setting,
        "amended": claim.amended,
        "verdict": verdict.value,
        "criteria": criteria,
        "table": {"headers": list(evidence.headers), "rows": [list(row) for row in evidence.rows]},
        "remarks": list(evidence.remarks),
        "quick": quick,
        "seeds": list(claim.budget(quick).seeds),
        "seconds": seconds,
        "device": device,
    }
    validate(record)
    return record


def claim_modules() -> dict[str, str]:
    """The module of every claim by its name, which is the file's with hyphens.

    Files are read and not imported, as most of them need torch.
    """
    files = sorted(
        file for file in Path(__file__).parent.glob("*.py") if "\nCLAIM = " in file.read_text(encoding="utf-8")
    )
    return {file.stem.replace("_", "-"): f"pixlat.evaluation.studies.claims.{file.stem}" for file in files}


def all_claims() -> dict[str, Claim]:
    """Every claim by name: those modules of this package that have a `CLAIM`."""
    return {claim.name: claim for claim in find([])}


def find(names: Sequence[str]) -> list[Claim]:
    """The claims of these names, all of them for no name;
    an unknown one is a UserError before any claim is imported.
    """
    known = claim_modules()
    for name in names:
        if name not in known:
            raise UserError(f"{name!r} is not a claim.{close_match(name, known)} Claims: {', '.join(known)}.")
    return [import_module(known[name]).CLAIM for name in names or known]
