"""The pruning methods by name: the score, and how the kept weights make up for the removed ones.

It does not know the model, nor the widths that it is cut to.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from edgeprune.errors import InputError
from edgeprune.pruning import score
from edgeprune.pruning.score import Score


class Recovery(Enum):
    """The ways in which the kept weights make up for the removed ones."""

    NONE = "none"
    BIAS = "bias"  # the mean output of the removed features on the dense model, as a bias of the projection (FLAP)
    LEAST_SQUARES = "least squares"


@dataclass(frozen=True)
class Method:
    """A score and a recovery.

    standardised: the scores of different modules compare, so that one cut over all modules allocates the widths.
    """

    score: Score
    recovery: Recovery
    standardised: bool = False

    @property
    def cut_score(self) -> Score:
        """Returns the score of one cut over all modules: its own where it is standardised, else FLAP's metric."""
        return self.score if self.standardised else score.fluctuation

    @property
    def words(self) -> str:
        """Returns in a line which units go first, and what the kept weights do about them."""
        return f"{SCORE_WORDS[self.score]}{RECOVERY_WORDS[self.recovery]}"


SCORE_WORDS = {
    score.obs: "least cost of removal (Optimal Brain Surgeon)",
    score.numerical: "least mask, unbounded (Shen et al. 2025)",
    score.numerical_box: "least mask in 0 to 1 (Shen et al. 2025)",
    score.flap: "least fluctuation in the dense model (FLAP)",
    score.fluctuation: "least fluctuation (FLAP's score)",
    score.wanda: "least weight times input (Wanda-sp)",
    score.magnitude: "smallest weights",
    score.random: "random units: what a score has to beat",
}
RECOVERY_WORDS = {Recovery.NONE: "", Recovery.BIAS: "; mean kept as bias", Recovery.LEAST_SQUARES: "; rest refitted"}
DEFAULT = "default"
METHODS = {
    DEFAULT: Method(score.numerical_box, Recovery.LEAST_SQUARES),
    "numerical": Method(score.numerical, Recovery.NONE),
    "numerical+ls": Method(score.numerical, Recovery.LEAST_SQUARES),
    "numerical-box": Method(score.numerical_box, Recovery.NONE),
    "numerical-box+ls": Method(score.numerical_box, Recovery.LEAST_SQUARES),
    "obs": Method(score.obs, Recovery.NONE),
    "obs+ls": Method(score.obs, Recovery.LEAST_SQUARES),
    "flap": Method(score.flap, Recovery.BIAS, standardised=True),
    "flap+ls": Method(score.fluctuation, Recovery.LEAST_SQUARES, standardised=True),
    "wanda": Method(score.wanda, Recovery.NONE),
    "wanda+ls": Method(score.wanda, Recovery.LEAST_SQUARES),
    "magnitude": Method(score.magnitude, Recovery.NONE),
    "magnitude+ls": Method(score.magnitude, Recovery.LEAST_SQUARES),
    "random": Method(score.random, Recovery.NONE),
    "random+ls": Method(score.random, Recovery.LEAST_SQUARES),
}


def method_named(name: str) -> Method:
    """Returns the method of a name; raises InputError with the known names."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}", f"Methods are: {', '.join(METHODS)}.")
    return METHODS[name]
