"""A BPE tokenizer as transformers loads it: what its merges need, and whether few tokens can spell every text.

It knows no corpus and no weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import read_json
from edgeprune.model.tokens.tokenizer import load_tokenizer

BYTE_TOKENS = frozenset(f"<0x{value:02X}>" for value in range(256))  # of byte_fallback
RESTORE = "Restore the checkpoint's own file."
REFUSED = "Keep the whole vocabulary. Byte-level BPE and BPE with byte_fallback can be reduced."


@dataclass(frozen=True)
class Bpe:
    """A BPE tokenizer with its description.

    loaded: the tokenizer of transformers. description: the content of its tokenizer.json. ids: of every token that has
    a row in the model. beyond: of added tokens that have none, such as a padding token that only a
    tokenizer_config.json names.
    """

    loaded: Any
    description: dict[str, Any]
    ids: dict[str, int]
    beyond: dict[str, int]

    @property
    def model(self) -> dict[str, Any]:
        return self.description["model"]


def read_bpe(directory: Path) -> Bpe:
    """Reads the tokenizer of a directory. Raises InputError for one that cannot be reduced."""
    # Load the tokenizer, and refuse one that cannot be reduced.
    loaded = load_tokenizer(directory)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"the tokenizer in {directory} is a {type(loaded).__name__} without tokenizer.json", REFUSED)
    description = json.loads(backend.to_str())
    if (reason := _unfit(description)) is not None:
        raise InputError(f"the vocabulary of the tokenizer in {directory} cannot be reduced: {reason}", REFUSED)
    # Separate the tokens that have no row in the model; only added ones may have none.
    rows = read_object(directory / "config.json").get("vocab_size")
    ids = backend.get_vocab(with_added_tokens=True)
    beyond = {token: number for token, number in ids.items() if rows is not None and number >= rows}
    if lost := beyond.keys() & description["model"]["vocab"].keys():
        raise InputError(
            f"the tokenizer in {directory} has {len(lost)} tokens beyond the model's {rows} rows",
            "Restore the checkpoint's own files.",
        )
    return Bpe(loaded, description, {token: ids[token] for token in ids.keys() - beyond.keys()}, beyond)


def _unfit(description: dict[str, Any]) -> str | None:
    """Returns why a smaller vocabulary would not spell every text, or only by chance; None where it would."""
    model = description["model"]
    if model.get("type") != "BPE":
        return f"it is of kind {model.get('type')}"
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            return f"it is a BPE with {name}"
    if _is_byte_level(description):
        return None
    if not model.get("byte_fallback"):
        return "it is a BPE without byte level and byte_fallback"
    missing = len(BYTE_TOKENS - model["vocab"].keys())
    return f"it is a BPE with byte_fallback that lacks {missing} of the 256 bytes" if missing else None


def _nodes(part: Any) -> Iterable[dict[str, Any]]:
    """Yields every object of a JSON document."""
    if isinstance(part, dict):
        yield part
        part = list(part.values())
    if isinstance(part, list):
        for child in part:
            yield from _nodes(child)


def _is_byte_level(description: dict[str, Any]) -> bool:
    steps = [description.get("normalizer"), description.get("pre_tokenizer")]
    return any(node.get("type") == "ByteLevel" for node in _nodes(steps))


def fixed_tokens(bpe: Bpe) -> set[str]:
    """Returns the tokens that every vocabulary of this tokenizer keeps; some of them may not exist."""
    from tokenizers.pre_tokenizers import ByteLevel

    # Added and unknown tokens, and all that bytes are spelled with.
    model, description = bpe.model, bpe.description
    tokens = {token["content"] for token in description["added_tokens"]} | {model.get("unk_token")}
    if _is_byte_level(description):
        alphabet = set(ByteLevel.alphabet())
        tokens |= alphabet
        if model.get("ignore_merges"):  # whole words may hold a byte that is not a token of its own
            unknown = alphabet - model["vocab"].keys()
            tokens |= {token for token in model["vocab"] if not unknown.isdisjoint(token)}
    if model.get("byte_fallback"):
        tokens |= BYTE_TOKENS
    for node in _nodes([description.get("normalizer"), description.get("pre_tokenizer")]):
        # What stands for a space becomes a space again only where it is a token, not where it is bytes.
        for key in ("replacement", "content", "prepend"):
            tokens |= set(text) if isinstance(text := node.get(key), str) else set()
    return tokens


def parts_of(model: dict[str, Any]) -> Callable[[str], tuple[str, ...]]:
    """Returns a function that gives the two tokens that a token is merged from when it stands alone.

    It gives none for a token that no merge makes.
    """
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    pairs: dict[str, list[tuple[str, str]]] = {}
    for left, right in ranks:
        pairs.setdefault(left + right, []).append((left, right))

    @cache
    def parts(token: str) -> tuple[str, ...]:
        known = pairs.get(token, [])
        return _last_merge(token, ranks) if len(known) > 1 else known[0] if known else ()

    return parts


def _last_merge(token: str, ranks: dict[tuple[str, ...], int]) -> tuple[str, ...]:
    """Returns the two halves that BPE merges last, by its definition, or none where it does not reach the token.

    The pair of neighbours with the first merge is merged first, the leftmost of equal pairs before the others.
    """
    symbols = list(token)
    while len(symbols) > 1:
        ranked = [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:], strict=False)) if pair in ranks]
        if not ranked:
            return ()
        _, position = min(ranked)
        pair = tuple(symbols[position : position + 2])
        if len(symbols) == 2:
            return pair
        symbols[position : position + 2] = ["".join(pair)]
    return ()


def add_with_parts(
    kept: dict[str, None], tokens: Iterable[str], parts: Callable[[str], tuple[str, ...]]
) -> dict[str, None]:
    """Adds tokens to `kept`, each after the parts that it is merged from, and returns `kept`."""
    for token in tokens:
        waiting = [token]
        while waiting:
            missing = [part for part in parts(waiting[-1]) if part not in kept]
            waiting += missing
            if not missing:
                kept[waiting.pop()] = None
    return kept


def by_merge(bpe: Bpe) -> list[int]:
    """Returns the ids of all tokens in the order of the merges that first make them, each after its parts.

    Tokens that no merge makes come last, by id.
    """
    merged = dict.fromkeys(left + right for left, right in bpe.model["merges"])
    order = add_with_parts({}, merged, parts_of(bpe.model))
    return [bpe.ids[token] for token in [*order, *sorted(bpe.ids.keys() - order.keys(), key=bpe.ids.get)]]


def map_processor(processor: Any, change: Callable[[int], int]) -> Any:
    """Returns the post-processor with `change` applied to each of its token ids."""
    match processor:
        case {"type": "Sequence", "processors": steps}:
            return processor | {"processors": [map_processor(step, change) for step in steps]}
        case {"type": "TemplateProcessing", "special_tokens": tokens}:
            changed = {name: token | {"ids": [change(n) for n in token["ids"]]} for name, token in tokens.items()}
            return processor | {"special_tokens": changed}
        case {"sep": [sep, sep_id], "cls": [cls, cls_id]}:
            return processor | {"sep": [sep, change(sep_id)], "cls": [cls, change(cls_id)]}
    return processor


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, an empty one where there is no file. Raises InputError otherwise."""
    return read_json(path, remedy=RESTORE) if path.is_file() else {}
