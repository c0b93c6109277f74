"""Defines a claim: a statement of a paper, its criteria, a measurement with error bars, and the resulting verdict.

A claim is a module of `studies/claims/` that defines `CLAIM`. It measures with the methods, losses and samplers of
this suite. Its author writes the criteria before the first run. If the author changes something after seeing numbers,
the field `amended` says what and why.

The numbers alone decide the verdict. Each criterion bounds one estimate. A criterion is met or missed if the whole
95 % interval of the estimate lies on one side of the bound.
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

from pixlat.common.cache import PRIVATE
from pixlat.common.errors import UserError, close_match
from pixlat.evaluation.records.claims import ClaimRecord, validate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The 97.5 % quantiles of Student's t distribution by degrees of freedom. Above 9 we use the normal distribution's.
T_QUANTILES = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NORMAL_QUANTILE = 1.96


class Verdict(StrEnum):
    """The result of checking a statement."""

    HOLDS = "holds"
    FAILS = "does not hold at this scale"
    OPEN = "inconclusive"


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error over `n` seeds. A number that depends on no seed has n = 0 and no error."""

    value: float
    se: float
    n: int

    @classmethod
    def over(cls, values: Sequence[float]) -> Estimate:
        """The mean over seeds. Raises ValueError for fewer than two seeds, because they give no error bar."""
        if len(values) < 2:
            raise ValueError("an error bar needs at least two seeds")
        return cls(fmean(values), stdev(values) / math.sqrt(len(values)), len(values))

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A number that involves no randomness."""
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

    estimate: str  # the estimate's name in Evidence.estimates
    text: str  # describes the estimate, so that "TEXT is at most BOUND" is a sentence
    sense: Literal["at most", "at least"]
    bound: float
    # If a needed criterion is not met, the other criteria mean nothing and the claim stays inconclusive. An example
    # is a criterion which checks that the networks have learned something.
    needed: bool = False

    def verdict_on(self, estimate: Estimate) -> Verdict:
        """HOLDS or FAILS if the whole interval is on one side of the bound, else OPEN. NaN is always FAILS."""
        distance = estimate.value - self.bound if self.sense == "at least" else self.bound - estimate.value
        if math.isnan(distance) or distance < -estimate.margin:
            return Verdict.FAILS
        return Verdict.HOLDS if distance >= estimate.margin else Verdict.OPEN

    def __str__(self) -> str:
        return f"{self.text} is {self.sense} {self.bound:g}" + (", or nothing was tested" if self.needed else "")


@dataclass(frozen=True)
class Budget:
    """How much computation a claim may use."""

    quick: bool
    seeds: tuple[int, ...]
    cache: Path = Path("runs/claims") / PRIVATE  # for the features of real images

    def choose(self, quick: int, full: int) -> int:
        """Returns `quick` in a quick run and `full` in a full run."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Evidence:
    """The results of a measurement."""

    estimates: Mapping[str, Estimate]  # one for each criterion, keyed by `Criterion.estimate`
    headers: Sequence[str]  # column names of the table of all measured numbers
    rows: Sequence[Sequence[str]]
    figure: Figure
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Claim:
    """A statement and how we check it."""

    name: str
    paper: str  # with the section or figure
    statement: str
    setting: str  # how we check it here, and what differs from the paper
    criteria: tuple[Criterion, ...]
    measure: Callable[[Budget], Evidence]
    minutes: tuple[float, float]  # quick and full, on one core
    num_seeds: tuple[int, int] = field(default=(3, 3))  # quick and full; 0 if nothing is random
    # what the author changed (criteria, budget, measurement) after seeing numbers, and why; "" for no change
    amended: str = ""

    def budget(self, quick: bool, cache: Path = Budget.cache) -> Budget:
        """The quick or the full budget."""
        return Budget(quick, tuple(range(self.num_seeds[0 if quick else 1])), cache)


def verdicts_of(claim: Claim, evidence: Evidence) -> tuple[Verdict, list[Verdict]]:
    """The verdict of the claim and the verdict of each criterion.

    The claim is OPEN if a needed criterion is not met. Otherwise it FAILS if one criterion is missed, HOLDS if all
    criteria are met, and is OPEN in all other cases.
    """
    by_criterion = [criterion.verdict_on(evidence.estimates[criterion.estimate]) for criterion in claim.criteria]
    pairs = zip(claim.criteria, by_criterion, strict=True)
    if any(criterion.needed and verdict != Verdict.HOLDS for criterion, verdict in pairs):
        return Verdict.OPEN, by_criterion
    if Verdict.FAILS in by_criterion:
        return Verdict.FAILS, by_criterion
    all_met = all(verdict == Verdict.HOLDS for verdict in by_criterion)
    return (Verdict.HOLDS if all_met else Verdict.OPEN), by_criterion


def build_record(claim: Claim, evidence: Evidence, quick: bool, seconds: float, device: str) -> ClaimRecord:
    """Builds and validates the record of a measured claim."""
    verdict, by_criterion = verdicts_of(claim, evidence)
    criteria = []
    for criterion, outcome in zip(claim.criteria, by_criterion, strict=True):
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
    """The module of every claim, keyed by the claim's name: the name of its file with hyphens for underscores.

    This reads the files and does not import them, because most of them import torch.
    """
    folder = Path(__file__).parent.with_name("claims")
    files = sorted(file for file in folder.glob("*.py") if "\nCLAIM = " in file.read_text(encoding="utf-8"))
    return {file.stem.replace("_", "-"): f"pixlat.evaluation.studies.claims.{file.stem}" for file in files}


def all_claims() -> dict[str, Claim]:
    """Every claim by name."""
    return {claim.name: claim for claim in find([])}


def find(names: Sequence[str]) -> list[Claim]:
    """The claims with these names, or all claims if no name is given.

    Raises UserError for an unknown name before it imports any claim.
    """
    known = claim_modules()
    for name in names:
        if name not in known:
            raise UserError(f"{name!r} is not a claim.{close_match(name, known)} Claims: {', '.join(known)}.")
    return [import_module(known[name]).CLAIM for name in names or known]
