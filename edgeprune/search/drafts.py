"""The choice of a draft: how many tokens it should guess at a time, and how much faster its target becomes.

Pure: it knows what was guessed right and what steps take, no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_GAIN = 1.05  # of the target's speed, from which a draft is worth its memory


@dataclass(frozen=True)
class Plan:
    """A number of guesses at a time, and what it gives: tokens of a round, and its tokens' speed over the target's."""

    count: int
    tokens_per_round: float
    speed: float


def accepted_runs(matches: Sequence[bool] | np.ndarray, count: int) -> tuple[int, int]:
    """Returns the rounds of speculative decoding over an answer, and the guesses in them that were accepted.

    matches (tokens,): whether the draft's guess of each token, behind the answer before it, is the one that the target
    draws. A round accepts guesses up to the first that is not, at most `count`, and the target's own token follows.
    """
    rounds = accepted = place = 0
    while place < len(matches):
        run = 0
        while run < count and place + run < len(matches) and matches[place + run]:
            run += 1
        rounds, accepted, place = rounds + 1, accepted + run, place + run + 1
    return rounds, accepted


def best_plan(
    answers: Sequence[Sequence[bool] | np.ndarray], draft_step: float, target_steps: Mapping[int, float]
) -> Plan:
    """Returns the number of guesses at which answers come fastest.

    answers: of each answer its matches, as accepted_runs takes them; draft_step: time of a step of the draft;
    target_steps: times of a step of the target by the tokens that it reads, 1 among them, in the same unit. A round of
    n guesses takes n steps of the draft and one of the target on n + 1 tokens.
    """
    tokens = sum(map(len, answers))
    plans = []
    for read, step in target_steps.items():
        if read > 1:
            rounds = sum(accepted_runs(matches, read - 1)[0] for matches in answers)
            per_round = tokens / rounds
            plans.append(Plan(read - 1, per_round, per_round * target_steps[1] / (step + (read - 1) * draft_step)))
    return max(plans, key=lambda plan: plan.speed)
