"""The choice among samples: balanced, some held out at random, what covers the moments of the whole, how many do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.chats import check_ids
from edgeprune.errors import InputError
from edgeprune.files import printable
from edgeprune.model.model import Model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.pipeline.balance import Group, Pick, balanced, shares_of
from edgeprune.pipeline.kit import BYTES_PER_TOKEN, Sample
from edgeprune.pipeline.packing import HELD_OUT_EVERY, HELD_OUT_TOKENS, tokenize
from edgeprune.progress import Progress

if TYPE_CHECKING:
    from edgeprune.pruning.learning_curve import CurvePoint

CANDIDATES = 4  # times the tokens of the curve's last point, among which the subset is chosen
CURVE_HELD_OUT = 16  # samples that the curve's errors are measured on
RANDOM_DRAWS = 20  # subsets of equal size and balance that the chosen one is compared with


@dataclass(frozen=True)
class Coverage:
    """The distance of the chosen subset's moments from those of all candidates (see pruning/coverage.py).

    random, least_random, most_random: the mean, least and largest distance of random subsets of equal size and balance.
    """

    candidates: int
    chosen: float
    random: float
    least_random: float
    most_random: float


@dataclass(frozen=True)
class GroupCount:
    """A source in one language: its documents and tokens, its share of the balance, and the tokens that were chosen."""

    source: str
    language: str
    documents: int
    tokens: int
    share: float
    chosen_tokens: int


@dataclass(frozen=True)
class Selection:
    """The choice, in the order in which it was made: the first n samples are the choice of n.

    chosen, held_out: numbers of samples; tokens: of the chosen together, about where no model counted them; coverage,
    curve: None and empty where no model was given; enough: samples, None where the curve has not flattened.
    """

    chosen: list[int]
    held_out: list[int]
    tokens: int
    groups: list[GroupCount]
    coverage: Coverage | None = None
    curve: tuple[CurvePoint, ...] = ()
    enough: int | None = None

    def as_json(self) -> dict[str, Any]:
        document = asdict(self)
        del document["chosen"], document["held_out"]
        return document


@dataclass(frozen=True)
class Balance:
    """Documents by their groups and tokens (documents,) int64, and each group's share of what is taken."""

    groups: list[Group]
    tokens: np.ndarray
    shares: dict[Group, float]

    def take(self, needed: int, pick: Pick, allowed: Sequence[int] | None = None) -> list[int]:
        """Returns the numbers of documents with so many tokens, in the order in which they were taken."""
        return balanced(self.groups, self.tokens, self.shares, needed, pick, allowed)

    def of(self, numbers: Sequence[int]) -> Balance:
        """Returns the balance of some of the documents alone, with the shares of all."""
        groups = [self.groups[number] for number in numbers]
        return Balance(groups, self.tokens[numbers], {g: share for g, share in self.shares.items() if g in groups})

    def counts(self, chosen: Sequence[int]) -> list[GroupCount]:
        """Returns each group with what it has and what was chosen of it."""
        has, tokens, taken = Counter(self.groups), Counter[Group](), Counter[Group]()
        for number, group in enumerate(self.groups):
            tokens[group] += int(self.tokens[number])
        for number in chosen:
            taken[self.groups[number]] += int(self.tokens[number])
        return [GroupCount(*g, has[g], tokens[g], share, taken[g]) for g, share in self.shares.items()]


def select(
    samples: Sequence[Sample],
    count: int,
    length: int,
    model: Model | None,
    is_held_out: bool,
    seed: int,
    progress: Progress,
) -> Selection:
    """Chooses samples of `count` * `length` tokens, or all there are, and random ones to hold out before.

    model: whose moments are covered; None: the choice is random, and four bytes are a token. is_held_out: some are held
    out where no curve asks for it. Raises InputError where the tokenizer refuses a sample.
    """
    groups = [sample.group for sample in samples]
    tokens = np.array([-(-sample.bytes // BYTES_PER_TOKEN) for sample in samples], dtype=np.int64)
    balance, needed = Balance(groups, tokens, shares_of(groups, tokens)), count * length
    rank = _drawn(len(samples), seed)
    # Held out before all else and at random, so that nothing was chosen by them.
    held_out: list[int] = []
    if is_held_out or model is not None:
        most = HELD_OUT_TOKENS if is_held_out else CURVE_HELD_OUT * length
        held_out = balance.take(most, _first(rank), _spare(groups, rank))
    rest = sorted(set(range(len(samples))) - set(held_out))
    if model is None:
        chosen = balance.take(needed, _first(rank), rest)
        return Selection(chosen, held_out, int(tokens[chosen].sum()), balance.counts(chosen))
    # Candidates, and their tokens as the model counts them.
    pool = balance.take(CANDIDATES * 2 * needed, _first(rank), rest)
    numbers = [*held_out, *pool]
    ids = dict(zip(numbers, _tokenized(samples, numbers, model), strict=True))
    pool, held_out = ([number for number in part if len(ids[number])] for part in (pool, held_out))
    if not pool:
        raise InputError("the samples hold no token", "Give more text.")
    tokens[numbers] = [len(ids[number]) for number in numbers]
    progress.note(
        f"coverage: chosen among {len(pool):,} of {len(samples):,} documents, {int(tokens[pool].sum()):,} tokens"
    )
    order, chosen, coverage = _covering([ids[n] for n in pool], balance.of(pool), needed, model, seed, progress)
    curve, enough = _curve([ids[n] for n in held_out], [ids[pool[place]] for place in order], length, model, progress)
    chosen = [pool[place] for place in chosen]
    counts, total = balance.counts(chosen), int(tokens[chosen].sum())
    return Selection(chosen, held_out, total, counts, coverage, curve, enough)


def _covering(
    ids: Sequence[np.ndarray], balance: Balance, needed: int, model: Model, seed: int, progress: Progress
) -> tuple[list[int], list[int], Coverage]:
    """Returns documents of twice the tokens that are needed in the order of their choice, the first of them, which are
    enough, and how these cover all.

    ids: (tokens,) int64 of each document of the balance. One choice serves all sizes: that of few is the beginning of
    that of more.
    """
    from edgeprune.pruning.coverage import Herd, distance, sketches
    from edgeprune.pruning.probes import layers_visited

    advance = progress.stage("moments of candidates", layers_visited(model.decoder))
    features, tokens = sketches(model, ids, seed, advance), balance.tokens
    order = balance.take(2 * needed, Herd(features, tokens))
    chosen = order[: int(np.searchsorted(np.cumsum(tokens[order]), needed)) + 1]
    draws = [
        distance(features, tokens, balance.take(needed, _first(_drawn(len(ids), (seed, draw)))))
        for draw in range(RANDOM_DRAWS)
    ]
    own = distance(features, tokens, chosen)
    return order, chosen, Coverage(len(ids), own, float(np.mean(draws)), min(draws), max(draws))


def _curve(
    held_out: Sequence[np.ndarray], documents: Sequence[np.ndarray], length: int, model: Model, progress: Progress
) -> tuple[tuple[CurvePoint, ...], int | None]:
    """Returns the learning curve of documents in their order, on CURVE_HELD_OUT samples of those held out, and how many
    samples are enough by it."""
    from edgeprune.pruning.learning_curve import enough, learning_curve
    from edgeprune.pruning.probes import layers_visited

    if not held_out or sum(map(len, documents)) < 2 * length:
        return (), None
    judges = int(np.searchsorted(np.cumsum([len(row) for row in held_out]), CURVE_HELD_OUT * length)) + 1
    advance = progress.stage("learning curve", layers_visited(model.decoder))
    curve = learning_curve(model, held_out[:judges], documents, length, advance)
    return tuple(curve), enough(curve)


def _spare(groups: Sequence[Group], rank: np.ndarray) -> list[int]:
    """Returns the documents that may be held out: of each group one in HELD_OUT_EVERY, one at least, never the last."""
    spare: list[int] = []
    for group in sorted(set(groups)):
        own = np.array([number for number, other in enumerate(groups) if other == group])
        count = min(len(own) - 1, max(1, len(own) // HELD_OUT_EVERY))
        spare += own[np.argsort(rank[own])][:count].tolist()
    return spare


def _drawn(count: int, seed: Any) -> np.ndarray:
    """Returns the places (count,) of documents in a drawn order."""
    return np.random.default_rng(seed).permutation(count)


def _first(rank: np.ndarray) -> Pick:
    """Returns the pick of the candidate that has the first place."""
    return lambda candidates: int(candidates[int(np.argmin(rank[candidates]))])


def _tokenized(samples: Sequence[Sample], numbers: Sequence[int], model: Model) -> list[np.ndarray]:
    """Returns the token ids of some samples, as many as the model has positions. Raises InputError with the place."""
    tokenizer, rows = load_tokenizer(model.directory), []
    for sample in (samples[number] for number in numbers):
        try:
            (row,) = tokenize([sample.document], tokenizer)
            check_ids([row], model.decoder.vocab_size, tokenizer, "it")
        except InputError as error:
            raise InputError(f"{printable(sample.place)}: {error.message}", error.remedy) from None
        rows.append(row[: model.decoder.max_position_embeddings])
    return rows
