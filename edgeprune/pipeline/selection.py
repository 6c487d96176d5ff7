"""The choice among samples: balanced, some held out at random, what covers the moments of the whole, how many do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.files import printable
from edgeprune.model.model import Model
from edgeprune.model.tokens.chat import check_ids
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
    shares, needed = shares_of(groups, tokens), count * length
    pick = _random(len(samples), seed)
    # Held out before all else and at random, so that nothing was chosen by them.
    held_out: list[int] = []
    if is_held_out or model is not None:
        most = HELD_OUT_TOKENS if is_held_out else CURVE_HELD_OUT * length
        held_out = balanced(groups, tokens, shares, most, pick, _spare(groups, pick))
    rest = sorted(set(range(len(samples))) - set(held_out))
    if model is None:
        chosen = balanced(groups, tokens, shares, needed, pick, rest)
        return Selection(chosen, held_out, int(tokens[chosen].sum()), _counts(groups, tokens, shares, chosen))
    pool = balanced(groups, tokens, shares, CANDIDATES * 2 * needed, pick, rest)
    if not pool:
        raise InputError("nothing is left to choose from once some is held out", "Give more text.")
    return _covering(samples, groups, tokens, shares, pool, held_out, count, length, model, seed, progress)


def _covering(
    samples: Sequence[Sample],
    groups: Sequence[Group],
    tokens: np.ndarray,
    shares: dict[Group, float],
    pool: list[int],
    held_out: list[int],
    count: int,
    length: int,
    model: Model,
    seed: int,
    progress: Progress,
) -> Selection:
    """Chooses among the pool by the model's moments; arguments as in `select`, held_out and pool numbers of samples."""
    from edgeprune.pruning.coverage import Herd, distance, sketches
    from edgeprune.pruning.learning_curve import enough, learning_curve
    from edgeprune.pruning.probes import layers_visited

    tokenizer, limit, needed = load_tokenizer(model.directory), model.decoder.max_position_embeddings, count * length
    numbers = [*held_out, *pool]
    ids = dict(zip(numbers, _tokenized([samples[number] for number in numbers], tokenizer, model), strict=True))
    ids = {number: row[:limit] for number, row in ids.items()}
    tokens = tokens.copy()
    tokens[numbers] = [len(ids[number]) for number in numbers]
    # The moments of each candidate, from one pass over the model.
    layers = layers_visited(model.decoder)
    progress.note(
        f"coverage: {len(pool):,} of {len(samples):,} documents, {int(tokens[pool].sum()):,} tokens, "
        f"through {layers} of {len(model.decoder.layers)} layers"
    )
    features = sketches(model, [ids[number] for number in pool], seed, progress.stage("moments of candidates", layers))
    own_groups, own_tokens = [groups[number] for number in pool], tokens[pool]
    own_shares = {group: share for group, share in shares.items() if group in own_groups}
    # One choice for all sizes: what is chosen for few samples is the beginning of what is chosen for more.
    order = balanced(own_groups, own_tokens, own_shares, 2 * needed, Herd(features, own_tokens))
    reached = np.cumsum(own_tokens[order])
    first = order[: int(np.searchsorted(reached, needed)) + 1]
    draws = [
        distance(
            features, own_tokens, balanced(own_groups, own_tokens, own_shares, needed, _random(len(pool), (seed, draw)))
        )
        for draw in range(RANDOM_DRAWS)
    ]
    coverage = Coverage(
        len(pool), distance(features, own_tokens, first), float(np.mean(draws)), float(min(draws)), float(max(draws))
    )
    # How the error on what was held out falls with the samples.
    judges = [ids[number] for number in held_out]
    enough_judges = int(np.searchsorted(np.cumsum([len(row) for row in judges]), CURVE_HELD_OUT * length)) + 1
    curve = []
    if judges and reached[-1] >= 2 * length:
        advance = progress.stage("learning curve", layers)
        ordered = [ids[pool[number]] for number in order]
        curve = learning_curve(model, judges[:enough_judges], ordered, length, advance)
    chosen = [pool[number] for number in first]
    counts = _counts(groups, tokens, shares, chosen)
    total = int(tokens[chosen].sum())
    return Selection(chosen, held_out, total, counts, coverage, tuple(curve), enough(curve))


def _spare(groups: Sequence[Group], pick: Pick) -> list[int]:
    """Returns the documents that may be held out: of each group one in HELD_OUT_EVERY, one at least, never the last."""
    spare = []
    for group in sorted(set(groups)):
        own = np.array([number for number, other in enumerate(groups) if other == group])
        for _ in range(min(len(own) - 1, max(1, len(own) // HELD_OUT_EVERY))):
            spare.append(pick(own))
            own = own[own != spare[-1]]
    return spare


def _random(count: int, seed: Any) -> Pick:
    """Returns a pick of the candidate that comes first in a drawn order of so many documents."""
    rank = np.random.default_rng(seed).permutation(count)
    return lambda candidates: int(candidates[int(np.argmin(rank[candidates]))])


def _tokenized(samples: Sequence[Sample], tokenizer: Any, model: Model) -> list[np.ndarray]:
    """Returns the token ids of samples. Raises InputError, with the place of the sample."""
    rows = []
    for sample in samples:
        try:
            (row,) = tokenize([sample.document], tokenizer)
            check_ids([row], model.decoder.vocab_size, tokenizer, "it")
        except InputError as error:
            raise InputError(f"{printable(sample.place)}: {error.message}", error.remedy) from None
        rows.append(row)
    return rows


def _counts(
    groups: Sequence[Group], tokens: np.ndarray, shares: dict[Group, float], chosen: Sequence[int]
) -> list[GroupCount]:
    """Returns each group with what it has and what was chosen of it."""
    counts = []
    for group, share in shares.items():
        own = [number for number, other in enumerate(groups) if other == group]
        taken = sum(int(tokens[number]) for number in chosen if groups[number] == group)
        counts.append(GroupCount(*group, len(own), int(tokens[own].sum()), share, taken))
    return counts
