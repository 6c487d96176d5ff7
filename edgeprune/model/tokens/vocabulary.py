"""A vocabulary reduced to the tokens that a corpus needs, and the tokenizer that has only those.

It starts from the tokenizer as transformers loads it, which may differ from the file because classes override parts of
tokenizer.json. It knows nothing about weights.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.chats import encode, render
from edgeprune.errors import InputError
from edgeprune.files import write_text
from edgeprune.model.tokens.bpe import (
    BYTE_TOKENS,
    REFUSED,
    Bpe,
    add_with_parts,
    by_merge,
    fixed_tokens,
    map_processor,
    parts_of,
    read_bpe,
    read_object,
)
from edgeprune.model.tokens.tokenizer import load_tokenizer

FILE = "vocabulary.json"
COPIED = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")
CHAT = [{"role": role, "content": "A"} for role in ("system", "user", "assistant", "user")]
CHATS = (CHAT, CHAT[1:], CHAT[1:2])  # some templates know no system role, some add a system turn where none is given


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens that are kept of a larger vocabulary.

    kept: (size,) int64, the old ids in ascending order; the new id of a token is its position.
    """

    kept: np.ndarray

    def __post_init__(self) -> None:
        kept = self.kept
        if kept.ndim != 1 or kept.dtype != np.int64 or not kept.size or kept[0] < 0 or (np.diff(kept) <= 0).any():
            raise ValueError("kept are ascending int64 ids, at least one")

    @property
    def size(self) -> int:
        return len(self.kept)

    def keeps(self, ids: np.ndarray) -> np.ndarray:
        """Returns which old ids are kept: ids of any shape -> bool of that shape."""
        return np.isin(ids, self.kept)

    def reduce(self, ids: np.ndarray) -> np.ndarray:
        """Returns the new ids of old ones, int64 of the same shape. Raises ValueError for an id that is not kept."""
        if (lost := np.asarray(ids)[~self.keeps(ids)]).size:
            raise ValueError(f"token {lost[0]} is not kept")
        return np.searchsorted(self.kept, ids).astype(np.int64)

    def restore(self, ids: np.ndarray) -> np.ndarray:
        """Returns the old ids of new ones, int64 of the same shape. Raises ValueError for one out of range."""
        ids = np.asarray(ids, dtype=np.int64)
        if ((ids < 0) | (ids >= self.size)).any():
            raise ValueError(f"ids of a vocabulary of {self.size} tokens are 0 to {self.size - 1}")
        return self.kept[ids]


def needed(directory: Path, used: np.ndarray) -> Vocabulary:
    """Returns the smallest vocabulary that tokenises texts of the tokens `used` as before.

    Any other text is still spelled without loss.

    directory: with tokenizer, config.json and generation_config.json. used: ids of any shape; those that no token has
    (padded rows) are ignored. Also kept are added, special and configured tokens, those of the chat template's own
    text, the byte alphabet, and for each kept token the parts that it is merged from. Raises InputError for a tokenizer
    that cannot be reduced.

    Why the tokens stay the same: let all tokens of a word's full tokenisation be kept. No merge crosses the end of such
    a token T, so the merges inside it are each the best of all pairs there. They are exactly the merges of T when it
    stands alone, whose parts are kept. The reduced tokenizer has all of them, in the same order, and none that is new;
    at each step, the pair that was best is there and is still the best. Where a token can be merged from several pairs,
    only the pair that this process takes is needed.
    """
    source = read_bpe(directory)
    names = {number: token for token, number in source.ids.items()}
    # Tokens of the texts, the configuration and the chat template, and those that are always kept.
    numbers = set(np.unique(used).tolist()) | _configured_ids(source, directory) | _template_ids(source.loaded)
    tokens = {names[number] for number in numbers if number in names}
    tokens |= {token for token in fixed_tokens(source) if token in source.ids}
    kept = add_with_parts({}, sorted(tokens), parts_of(source.model))
    return _vocabulary(source.ids[token] for token in kept)


def ladder(directory: Path, vocabulary: Vocabulary, sizes: Sequence[int]) -> list[Vocabulary]:
    """Returns larger vocabularies around this one, of the given sizes.

    Each holds the smaller ones, and merges work as before.

    The further tokens come in the order of the merges, which is roughly that of their frequency in the tokenizer's
    training; tokens that no merge makes come last. A size below the vocabulary's own gives the vocabulary as it is, one
    above the tokenizer's gives all tokens. Raises InputError for a tokenizer that cannot be reduced.
    """
    ids_by_merge = np.array(by_merge(read_bpe(directory)))
    further = ids_by_merge[~vocabulary.keeps(ids_by_merge)].tolist()
    return [_vocabulary([*vocabulary.kept.tolist(), *further[: max(0, size - vocabulary.size)]]) for size in sizes]


def padded(directory: Path, vocabulary: Vocabulary, multiple: int = 64) -> Vocabulary:
    """Returns the vocabulary filled up, as in `ladder`, to a multiple of tokens, a width that suits the kernels.

    Where the tokenizer has fewer tokens than that, the result holds all of them.
    """
    return ladder(directory, vocabulary, [-(-vocabulary.size // multiple) * multiple])[0]


def _vocabulary(ids: Iterable[int]) -> Vocabulary:
    return Vocabulary(np.unique(np.fromiter(ids, np.int64)))


def _configured_ids(source: Bpe, directory: Path) -> set[int]:
    """Returns the ids of tokens that the tokenizer and the configuration files name."""
    ids: list[Any] = list(source.loaded.all_special_ids)
    for name in ("config.json", "generation_config.json"):
        for key, value in read_object(directory / name).items():
            if key.endswith("_token_id"):
                ids += value if isinstance(value, list) else [value]
    map_processor(source.description.get("post_processor"), lambda number: ids.append(number) or number)
    ids.append((source.description.get("padding") or {}).get("pad_id"))
    return {number for number in ids if isinstance(number, int)}


def _template_ids(tokenizer: Any) -> set[int]:
    """Returns the ids of the chat template's own text, with and without a system turn."""
    ids: set[int] = set()
    if tokenizer.chat_template is None:
        return ids
    for chat in CHATS:
        for prompted in (True, False):
            with contextlib.suppress(InputError):  # a template refuses roles that it does not know
                ids |= set(encode(tokenizer, render(tokenizer, chat, prompted=prompted), special=False))
    return ids


def write_tokenizer_files(source_directory: Path, directory: Path, vocabulary: Vocabulary) -> None:
    """Writes the files that transformers needs of the tokenizer, with new ids, and generation_config.json.

    tokenizer.json is written as transformers loads it, under a class that no model_type changes; vocabulary.json holds
    the old id of each new one. vocab.json, merges.txt, added_tokens.json and tokenizer.model, which tokenizer.json
    replaces, are left out. Raises ValueError for a vocabulary that was not made by `needed` or `ladder` and lacks a
    token that must stay; InputError for a tokenizer that cannot be reduced.
    """
    # Number the kept tokens anew.
    source = read_bpe(source_directory)
    new = _new_ids(source, vocabulary)
    directory.mkdir(parents=True, exist_ok=True)
    names = {token: new[number] for token, number in (source.ids | source.beyond).items() if number in new}
    # The tokenizer, its configuration and what goes with them.
    _write(directory / "tokenizer.json", _reduced_description(source.description, names, new))
    _write(directory / "tokenizer_config.json", _reduced_tokenizer_config(source, source_directory, new))
    for name in COPIED:
        if (source_directory / name).is_file():
            shutil.copyfile(source_directory / name, directory / name)
    if (source_directory / "generation_config.json").is_file():
        generation = _with_new_ids(read_object(source_directory / "generation_config.json"), vocabulary)
        _write(directory / "generation_config.json", generation)
    _write(directory / FILE, {"kept": vocabulary.kept.tolist()}, indent=None)
    # Read it back.
    if load_tokenizer(directory).get_vocab() != names:  # added tokens without a place of their own are appended
        raise InputError(f"transformers gives the tokens in {source_directory} other ids when reduced", REFUSED)


def _new_ids(source: Bpe, vocabulary: Vocabulary) -> dict[int, int]:
    """Returns the new id by old id of the kept tokens and, after them, of the tokens that have no row in the model."""
    kept = set(vocabulary.kept.tolist())
    if not kept <= set(source.ids.values()):
        raise ValueError("the vocabulary keeps an id that no token has")
    if lost := [
        token
        for token in source.description["added_tokens"]
        if token["content"] in source.ids and token["id"] not in kept
    ]:
        raise ValueError(f"the vocabulary does not keep the added token {lost[0]['content']}")
    return {old: new for new, old in enumerate([*sorted(kept), *sorted(source.beyond.values())])}


def _reduced_description(description: dict[str, Any], names: dict[str, int], new: dict[int, int]) -> dict[str, Any]:
    """Returns the content of tokenizer.json for the kept tokens: vocabulary, merges and ids."""
    model = description["model"]
    vocab = {token: names[token] for token in sorted(model["vocab"].keys() & names.keys(), key=names.get)}
    # A merge stays where both of its tokens and the one that it makes are kept.
    merges = [pair for pair in model["merges"] if all(token in vocab for token in (*pair, "".join(pair)))]
    reduced = description | {
        "model": model | {"vocab": vocab, "merges": merges},
        "added_tokens": [token | {"id": new[token["id"]]} for token in description["added_tokens"]],
        "post_processor": map_processor(description.get("post_processor"), new.__getitem__),
    }
    if padding := description.get("padding"):
        reduced["padding"] = padding | {"pad_id": new[padding["pad_id"]]}
    return reduced


def _reduced_tokenizer_config(source: Bpe, directory: Path, new: dict[int, int]) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json with new ids, for the plain class.

    What the source's own class would set by itself is written out.
    """
    config = read_object(directory / "tokenizer_config.json")
    config.pop("auto_map", None)
    config |= {name: token for name, token in source.loaded.special_tokens_map.items() if not config.get(name)}
    config |= {name: getattr(source.loaded, name) for name in ("padding_side", "model_input_names")}
    if isinstance(added := config.get("added_tokens_decoder"), dict):
        renumbered = {new[int(number)]: token for number, token in added.items() if int(number) in new}
        config["added_tokens_decoder"] = {str(number): renumbered[number] for number in sorted(renumbered)}
    return config | {"tokenizer_class": "PreTrainedTokenizerFast"}


def reduced_config(config: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns config.json's content with the vocabulary's size and new token ids; the id of a lost token is null."""
    return _with_new_ids(config, vocabulary) | {"vocab_size": vocabulary.size}


def _with_new_ids(config: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns a configuration with every *_token_id, and generation's lists of tokens that are never drawn, renumbered.

    Negative ids stand for no token and stay.
    """
    new = {old: number for number, old in enumerate(vocabulary.kept.tolist())}

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [changed for changed in map(change, value) if changed is not None]
        return new.get(value) if isinstance(value, int) and value >= 0 else value

    changed = dict(config)
    for name, value in config.items():
        if name.endswith("_token_id") or name in ("suppress_tokens", "begin_suppress_tokens"):
            changed[name] = change(value)
        elif name == "bad_words_ids" and isinstance(value, list):
            words = [word for word in value if isinstance(word, list)]
            known = [word for word in words if all(isinstance(number, int) and number in new for number in word)]
            changed[name] = [change(word) for word in known] or None
    return changed


def read_vocabulary(directory: Path) -> Vocabulary | None:
    """Returns the vocabulary with which a reduced tokenizer's files were made; None where they are not reduced.

    Raises InputError for a damaged file.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        return Vocabulary(np.array(read_object(path)["kept"], dtype=np.int64))
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{path} is not a reduced vocabulary: {error}", "Restore the checkpoint's own file.") from None


def retokenized(documents: Iterable[np.ndarray], source: Path, reduced: Path) -> list[np.ndarray]:
    """Returns documents of the source's ids, each (tokens,), as the same texts in ids of the reduced tokenizer, int64.

    A stretch of kept tokens, or such a stretch between added tokens, has its ids renamed. Any other stretch is decoded
    and encoded anew; where that spells something else (half a character at its end, a space that the tokenizer puts in
    front), only the tokens that are not kept are spelled out, each by itself. An id that no token has is left out.
    Raises InputError where `reduced` has no vocabulary.json.
    """
    vocabulary = read_vocabulary(reduced)
    if vocabulary is None:
        raise InputError(f"{reduced} has no {FILE}", "Give a folder with a reduced tokenizer.")
    # Both tokenizers, and the new id of each kept token.
    old, new = load_tokenizer(source), load_tokenizer(reduced)
    names = {number: [name] for name, number in enumerate(vocabulary.kept.tolist())}
    added = old.added_tokens_decoder.keys()

    def alone(number: int) -> list[int]:
        """Returns the new ids that spell a token which is not kept."""
        token = old.convert_ids_to_tokens(number)
        return [part.id for part in new.backend_tokenizer.model.tokenize(token)] if token is not None else []

    def renewed(run: list[int]) -> list[int]:
        """Returns the new ids of a stretch between added tokens, or of added tokens."""
        if not names.keys() >= set(run):
            text = old.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            encoded = encode(new, text, special=False)
            if _spelling(new, encoded) == _spelling(old, run):
                return encoded
        return [part for number in run for part in names.get(number) or alone(number)]

    def document(ids: np.ndarray) -> np.ndarray:
        # Added tokens are never merged with their neighbours.
        runs = groupby(np.asarray(ids).tolist(), added.__contains__)
        return np.array([number for _, run in runs for number in renewed(list(run))], dtype=np.int64)

    return [document(ids) for ids in documents]


def _spelling(tokenizer: Any, ids: list[int]) -> bytes:
    """Returns the bytes that tokens stand for, be they characters or bytes, before the decoder makes a text of them."""
    tokens = (token for token in tokenizer.convert_ids_to_tokens(ids) if token is not None)
    return b"".join(bytes([int(token[3:5], 16)]) if token in BYTE_TOKENS else token.encode() for token in tokens)


def _write(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
