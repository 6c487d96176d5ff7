"""Odd input: the held-out text as users really write it, short and long, and what that costs the fitted model.

Both models read a few windows of each variant; their intervals are wide, and the figures are for comparing variants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.chats import encode
from edgeprune.model.model import Model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.pipeline.evaluation import compared, kept_losses, windows_in_tokens_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeprune.evaluate.perplexity import Losses
    from edgeprune.pipeline.results import Candidate
    from edgeprune.pipeline.stages import Run

WINDOWS, TOKENS = 8, 96  # of a variant, at most
LONG_WINDOWS, LONG_TOKENS = 2, 1024  # of the very long ones, at most
CLEAN, LONG = "unchanged", "long"


@dataclass(frozen=True)
class Variant:
    """A form of the held-out text: windows (tokens,) int64 in the dense model's tokens, each a document of its own."""

    name: str
    words: str
    windows: list[np.ndarray]


def read_tokens(others: int) -> int:
    """Returns about how many tokens a model reads for all variants, with so many other texts beside the first."""
    from edgeprune.evaluate.perturb import PERTURBATIONS

    return (1 + len(PERTURBATIONS) + others) * WINDOWS * TOKENS + LONG_WINDOWS * LONG_TOKENS


def variants_of(model: Model, texts: dict[str, list[np.ndarray]], context: int, seed: int) -> list[Variant]:
    """Returns the variants of the first of the texts, the unchanged one first, and some of the other texts.

    texts: the held-out documents (tokens,) by name; context: the tokens that are deployed, which a long window has.
    Perturbed texts are tokenised again and cut to as many tokens as the others have; a window of one token says nothing
    and is left out, and so is a variant without any.
    """
    from edgeprune.evaluate.perturb import PERTURBATIONS

    tokenizer, vocab_size = load_tokenizer(model.directory), model.decoder.vocab_size
    (name, documents), *others = texts.items()
    passages = [tokenizer.decode(window, skip_special_tokens=True) for window in _evenly(documents)]

    def windows(passages: Sequence[str]) -> list[np.ndarray]:
        rows = (np.asarray(encode(tokenizer, passage), np.int64) for passage in passages)
        return [row[row < vocab_size][:TOKENS] for row in rows]  # an odd text may hold tokens without an embedding

    variants = [Variant(CLEAN, f"{name}, as it is", windows(passages))]
    for number, change in enumerate(PERTURBATIONS):
        generator = np.random.default_rng([seed, number])
        changed = [change.function(passage, generator) for passage in passages]
        variants.append(Variant(change.name, change.words, windows(changed)))
    variants += [Variant(f"text {other}", "another text, as it is", _evenly(of)) for other, of in others]
    if long := _long(documents, min(context, model.decoder.max_position_embeddings, LONG_TOKENS)):
        variants.append(Variant(LONG, f"{len(long[0]):,} tokens of it in one context", long))
    kept = (Variant(of.name, of.words, [row for row in of.windows if len(row) > 1]) for of in variants)
    return [variant for variant in kept if variant.windows]


def _evenly(documents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns windows of at most TOKENS tokens: beginnings of documents all over the text; where these are few, any of
    their windows."""
    from edgeprune.evaluate.perplexity import cut

    windows = [document[:TOKENS] for document in documents if len(document) > 1]
    if len(windows) < WINDOWS:
        windows = [window for document in cut(documents, TOKENS) for window in document]
    picks = np.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).round().astype(int)
    return [windows[pick] for pick in picks]


def _long(documents: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Returns windows of so many tokens of the joined documents; none where that is no longer than other windows."""
    joined = np.concatenate(documents)
    length = min(length, len(joined))
    if length < 2 * TOKENS:
        return []
    return [joined[start : start + length] for start in range(0, len(joined) - length + 1, length)][:LONG_WINDOWS]


def judged(
    dense: Model,
    before: Mapping[str, Losses],
    fitted: Model,
    variants: Sequence[Variant],
    seed: int,
    on_layer: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Returns name, words and what results.Quality holds of a text, for each variant.

    before: what `variant_losses` gives of the dense model; fitted: as it is deployed; where it has a vocabulary of its
    own, it gets the same windows in its own tokens.
    """
    from edgeprune.model.tokens.vocabulary import read_vocabulary

    windows = _windows(variants)
    vocabulary, own = read_vocabulary(fitted.directory), windows
    if vocabulary is not None:
        own = windows_in_tokens_of(fitted, windows, dense)
    after = _losses(fitted, own, on_layer)
    rows = []
    for name, words in ((variant.name, variant.words) for variant in variants):
        quality = compared(before[name], after[name], seed, windows[name], own[name], vocabulary)
        rows.append({"name": name, "words": words, **quality})
    return rows


def variant_losses(
    model: Model, variants: Sequence[Variant], on_layer: Callable[[], None] = lambda: None
) -> dict[str, Losses]:
    """Returns the losses of a model, whose tokens the windows are in, by variant."""
    return _losses(model, _windows(variants), on_layer)


def robustness(run: Run, rungs: Sequence[Candidate]) -> list[list[dict[str, Any]] | None]:
    """Returns what `judged` does of each rung of a run: the stage `odd input of rung K`, behind the dense model's
    `dense-odd-input`.

    None for rungs of an image generator, and for those where nothing was removed or rounded.
    """
    setup = run.setup

    def advance(model: Model) -> Callable[[], None]:
        passes = 1 + any(variant.name == LONG for variant in variants())
        return run.progress.stage("evaluate on odd input", passes * len(model.decoder.layers))

    @cache
    def variants() -> list[Variant]:
        return variants_of(setup.model, run.samples.evaluation, setup.workload.context, setup.request.seed)

    @cache
    def before() -> dict[str, Losses]:
        return kept_losses(
            run.journal,
            "dense-odd-input",
            _windows(variants()),
            lambda: variant_losses(setup.model, variants(), advance(setup.model)),
            run.parts.evaluation,
        )

    def rows(chosen: Candidate) -> list[dict[str, Any]]:
        dense, seed = before(), setup.request.seed
        return judged(setup.model, dense, chosen.deployed, variants(), seed, advance(chosen.model))

    def has_changed(chosen: Candidate) -> bool:
        return setup.kind.writes_text and bool(chosen.records)

    return [
        run.journal.stage(f"odd input of rung {index}", lambda: rows(chosen)) if has_changed(chosen) else None  # noqa: B023
        for index, chosen in enumerate(rungs)
    ]


def _windows(variants: Sequence[Variant]) -> dict[str, list[list[np.ndarray]]]:
    return {variant.name: [[row] for row in variant.windows] for variant in variants}


def _losses(model: Model, texts: dict[str, list[list[np.ndarray]]], on_layer: Callable[[], None]) -> dict[str, Losses]:
    """Returns the losses by variant; the long one has a pass of its own, so that the others are not padded to it."""
    from edgeprune.evaluate.perplexity import text_losses
    from edgeprune.model.forward import weight_stream

    losses: dict[str, Losses] = {}
    for group in ([name for name in texts if name != LONG], [name for name in texts if name == LONG]):
        documents = {name: [row for document in texts[name] for row in document] for name in group}
        if documents:
            longest = max(len(row) for rows in documents.values() for row in rows)
            losses |= text_losses(model.decoder, weight_stream(model), documents, longest, on_layer)
    return losses
