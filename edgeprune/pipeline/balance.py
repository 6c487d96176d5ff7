"""The balance of samples between sources and languages: which group each is of, and whose turn it is.

A group's share of the tokens grows with the square root of what it has, so that large groups lead and small ones are
heard, as languages are sampled for multilingual models (Conneau and Lample 2019, arXiv 1901.07291). It knows no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

RARE = 0.01  # of a source's characters: what is written in less is taken for a mistake
READ_CHARACTERS = 1000  # of a text, to tell its language by
OVERSHOOT = 0.5  # of the tokens that are needed, by which a document may exceed them
Group = tuple[str, str]  # source, language
Pick = Callable[[np.ndarray], int]  # of the candidates (numbers), the one to take


def languages_of(texts: Sequence[str], sources: Sequence[str], on_text: Callable[[], None] = lambda: None) -> list[str]:
    """Returns the language of each text as ISO 639-1 has it, by py3langid.

    Single words and code are mistaken for any language: one that has less than RARE of a source's characters is no
    group of its own, its texts count as the language that the source has most of.
    """
    from py3langid import classify

    languages: list[str] = []
    characters: dict[str, Counter[str]] = {source: Counter() for source in sources}
    for text, source in zip(texts, sources, strict=True):
        languages.append(classify(text[:READ_CHARACTERS])[0])
        characters[source][languages[-1]] += len(text)
        on_text()
    believed = {}
    for source, counts in characters.items():
        most = counts.most_common(1)[0][0]
        for language, count in counts.items():
            believed[source, language] = language if count >= RARE * counts.total() else most
    return [believed[pair] for pair in zip(sources, languages, strict=True)]


def shares_of(groups: Sequence[Group], tokens: np.ndarray) -> dict[Group, float]:
    """Returns each group's share of the tokens to take, of the groups and tokens (documents,) of all documents."""
    totals: Counter[Group] = Counter()
    for group, count in zip(groups, tokens, strict=True):
        totals[group] += int(count)
    roots = {group: total**0.5 for group, total in sorted(totals.items())}
    return {group: root / sum(roots.values()) for group, root in roots.items()}


def balanced(
    groups: Sequence[Group],
    tokens: np.ndarray,
    shares: dict[Group, float],
    needed: int,
    pick: Pick,
    allowed: Sequence[int] | None = None,
) -> list[int]:
    """Returns numbers of documents with `needed` tokens together, or all there are, each the pick of a group.

    The group whose turn it is has the least of its share so far. groups, tokens: (documents,) of all; allowed: the
    numbers to choose among, None for all.
    """
    numbers = np.arange(len(groups)) if allowed is None else np.asarray(allowed, dtype=np.int64)
    left = {group: np.array([n for n in numbers if groups[n] == group], dtype=np.int64) for group in shares}
    taken, chosen, total = dict.fromkeys(shares, 0), [], 0
    while total < needed:
        # A document that is far larger than the rest of the need would be cut off: it is passed over.
        most = needed - total + int(OVERSHOOT * needed)
        if not chosen and len(numbers):  # one at least is taken, however large all are
            most = max(most, int(tokens[numbers].min()))
        fitting = {group: rest[tokens[rest] <= most] for group, rest in left.items()}
        waiting = [group for group, rest in fitting.items() if len(rest)]
        if not waiting:
            break
        group = min(waiting, key=lambda group: (taken[group] / shares[group], -shares[group]))
        number = pick(fitting[group])
        left[group] = left[group][left[group] != number]
        taken[group] += int(tokens[number])
        total += int(tokens[number])
        chosen.append(number)
    return chosen
