"""A vocabulary cut down to the tokens that a corpus needs, and the tokenizer that has only those.

It starts from the tokenizer as transformers loads it, which may differ from the file (classes override
parts of tokenizer.json), and knows nothing about weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import InputError
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
CHATS = (CHAT, CHAT[1:], CHAT[1:2])  # some templates know no system, some put one in where none is given


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens kept of a larger vocabulary. kept: (size,) int64, the old ids, ascending; a new id is a position."""

    kept: np.ndarray

    def __post_init__(self) -> None:
        kept = self.kept
        if kept.ndim != 1 or kept.dtype != np.int64 or not kept.size or kept[0] < 0 or (np.diff(kept) <= 0).any():
            raise ValueError("kept are ascending int64 ids, at least one")

    @property
    def size(self) -> int:
        return len(self.kept)

    def keeps(self, ids: np.ndarray) -> np.ndarray:
        """Old ids of any shape -> bool of that shape."""
        return np.isin(ids, self.kept)

    def reduce(self, ids: np.ndarray) -> np.ndarray:
        """Old ids -> new ids, int64 of the same shape. Raises ValueError for an id that is not kept."""
        if (lost := np.asarray(ids)[~self.keeps(ids)]).size:
            raise ValueError(f"token {lost[0]} is not kept")
        return np.searchsorted(self.kept, ids).astype(np.int64)

    def restore(self, ids: np.ndarray) -> np.ndarray:
        """New ids -> old ids, int64 of the same shape. Raises ValueError for an id beyond the vocabulary."""
        ids = np.asarray(ids, dtype=np.int64)
        if ((ids < 0) | (ids >= self.size)).any():
            raise ValueError(f"ids of a vocabulary of {self.size} tokens are 0 to {self.size - 1}")
        return self.kept[ids]


def needed(directory: Path, used: np.ndarray) -> Vocabulary:
    """The smallest vocabulary with which texts made of the tokens `used` are tokenised as before, and any other
    text is still spelled without loss.

    directory: tokenizer, config.json and generation_config.json; used: ids of any shape, those that no token
    has (padded rows) are ignored. Kept are also: added, special and configured tokens, those of the chat
    template's own text, the byte alphabet, and of each kept token the parts that it is merged from.

    Why the same: let all tokens of a word's full tokenisation be kept. No merge crosses the end of such a token
    T, so those inside it are each the best of all pairs there: exactly the merges of T when it stands alone,
    whose parts are kept. The reduced tokenizer has them all, in the same order, and none that is new; so at
    each step the pair that was best is there and still the best. Where a token can be merged from
    several pairs, only the pair that this process takes is needed. Raises InputError for other tokenizers.
    """
    source = read_bpe(directory)
    names = {number: token for token, number in source.ids.items()}
    numbers = set(np.unique(used).tolist()) | _configured_ids(source, directory) | _template_ids(source.loaded)
    tokens = {names[number] for number in numbers if number in names}
    tokens |= {token for token in fixed_tokens(source) if token in source.ids}
    kept = add_with_parts({}, sorted(tokens), parts_of(source.model))
    return _of(source.ids[token] for token in kept)


def ladder(directory: Path, vocabulary: Vocabulary, sizes: Sequence[int]) -> list[Vocabulary]:
    """Larger vocabularies around this one, of these sizes: each holds the smaller ones, and merges work as before.

    The further tokens come in the order of the merges, which is roughly that of their frequency in the
    tokenizer's training; tokens that no merge makes come last. A size below the vocabulary's own gives
    it as it is, one above the tokenizer's gives all tokens. Raises InputError.
    """
    order = np.array(by_merge(read_bpe(directory)))
    further = order[~vocabulary.keeps(order)].tolist()
    return [_of([*vocabulary.kept.tolist(), *further[: max(0, size - vocabulary.size)]]) for size in sizes]


def padded(directory: Path, vocabulary: Vocabulary, multiple: int = 64) -> Vocabulary:
    """Filled up as in `ladder` to a multiple, the width that kernels like, or to all tokens where those are fewer."""
    return ladder(directory, vocabulary, [-(-vocabulary.size // multiple) * multiple])[0]


def _of(ids: Iterable[int]) -> Vocabulary:
    return Vocabulary(np.unique(np.fromiter(ids, np.int64)))


def _configured_ids(source: Bpe, directory: Path) -> set[int]:
    found: list[Any] = list(source.loaded.all_special_ids)
    for name in ("config.json", "generation_config.json"):
        for key, value in read_object(directory / name).items():
            if key.endswith("_token_id"):
                found += value if isinstance(value, list) else [value]
    map_processor(source.description.get("post_processor"), lambda number: found.append(number) or number)
    found.append((source.description.get("padding") or {}).get("pad_id"))
    return {number for number in found if isinstance(number, int)}


def _template_ids(tokenizer: Any) -> set[int]:
    """Of the chat template's own text, with and without a system's turn."""
    found: set[int] = set()
    if tokenizer.chat_template is None:
        return found
    for chat in CHATS:
        for prompted in (True, False):
            try:
                text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompted)
            except Exception:  # a template refuses roles that it does not know, by whatever error
                continue
            found |= set(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return found


def write_tokenizer_files(source_directory: Path, directory: Path, vocabulary: Vocabulary) -> None:
    """Write into `directory` what transformers needs of the tokenizer, with new ids, and generation_config.json.

    tokenizer.json is written as transformers loads it, under a class that no model_type changes;
    vocabulary.json holds the old id of each new one. vocab.json, merges.txt, added_tokens.json and
    tokenizer.model, which tokenizer.json replaces, are left out. A vocabulary that was not made by `needed`
    and `ladder` may lack a token that must stay: ValueError. Raises InputError.
    """
    source = read_bpe(source_directory)
    new = _new_ids(source, vocabulary)
    directory.mkdir(parents=True, exist_ok=True)
    names = {token: new[number] for token, number in (source.ids | source.beyond).items() if number in new}
    _write(directory / "tokenizer.json", _reduced_description(source.description, names, new))
    _write(directory / "tokenizer_config.json", _reduced_tokenizer_config(source, source_directory, new))
    for name in COPIED:
        if (source_directory / name).is_file():
            shutil.copyfile(source_directory / name, directory / name)
    if (source_directory / "generation_config.json").is_file():
        generation = _with_new_ids(read_object(source_directory / "generation_config.json"), vocabulary)
        _write(directory / "generation_config.json", generation)
    _write(directory / FILE, {"kept": vocabulary.kept.tolist()}, indent=None)
    if load_tokenizer(directory).get_vocab() != names:  # added tokens without a place of their own are appended
        raise InputError(f"transformers gives the tokens in {source_directory} other ids when reduced", REFUSED)


def _new_ids(source: Bpe, vocabulary: Vocabulary) -> dict[int, int]:
    """New id by old id, of the kept tokens and, behind them, of those that have no row in the model either."""
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
    model = description["model"]
    vocab = {token: names[token] for token in sorted(model["vocab"].keys() & names.keys(), key=names.get)}
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
    """What the class of the source would have set by itself is written out: the new class is the plain one."""
    config = read_object(directory / "tokenizer_config.json")
    config.pop("auto_map", None)
    config |= {name: token for name, token in source.loaded.special_tokens_map.items() if not config.get(name)}
    config |= {name: getattr(source.loaded, name) for name in ("padding_side", "model_input_names")}
    if isinstance(added := config.get("added_tokens_decoder"), dict):
        found = {new[int(number)]: token for number, token in added.items() if int(number) in new}
        config["added_tokens_decoder"] = {str(number): found[number] for number in sorted(found)}
    return config | {"tokenizer_class": "PreTrainedTokenizerFast"}


def reduced_config(config: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of config.json with the vocabulary's size and new token ids; an id without token becomes null."""
    return _with_new_ids(config, vocabulary) | {"vocab_size": vocabulary.size}


def _with_new_ids(config: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Every *_token_id, and generation's lists of tokens that are never drawn. Negative ids stand for none."""
    new = {old: number for number, old in enumerate(vocabulary.kept.tolist())}

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [changed for changed in map(change, value) if changed is not None]
        return new.get(value) if isinstance(value, int) and value >= 0 else value

    changed = dict(config)
    for name, value in config.items():
        if name.endswith("_token_id") or name in ("suppress_tokens", "begin_suppress_tokens"):
            changed[name] = change(value)
        elif name == "bad_words_ids" and value:
            changed[name] = [change(word) for word in value if all(number in new for number in word)] or None
    return changed


def read_vocabulary(directory: Path) -> Vocabulary | None:
    """The vocabulary that a reduced tokenizer's files were made with; None where they are not reduced.

    Raises InputError for a damaged file.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        return Vocabulary(np.array(read_object(path)["kept"], dtype=np.int64))
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{path} is no reduced vocabulary: {error}", "Restore the checkpoint's own file.") from None


def retokenized(documents: Iterable[np.ndarray], source: Path, reduced: Path) -> list[np.ndarray]:
    """Documents of the source's ids (tokens,) -> the same texts in ids of the reduced tokenizer, int64.

    A stretch of kept tokens, or of such between added tokens, has its ids renamed. Another is decoded and encoded
    anew; where that spells something else (half a character at its end, a space that the tokenizer puts in
    front), only its tokens that are not kept are spelled out, each by itself. An id that no token has is left
    out. Raises InputError where `reduced` has no vocabulary.json.
    """
    vocabulary = read_vocabulary(reduced)
    if vocabulary is None:
        raise InputError(f"{reduced} has no {FILE}", "Give a folder with a reduced tokenizer.")
    old, new = load_tokenizer(source), load_tokenizer(reduced)
    names = {number: [name] for name, number in enumerate(vocabulary.kept.tolist())}
    added = old.added_tokens_decoder.keys()

    def alone(number: int) -> list[int]:
        token = old.convert_ids_to_tokens(number)
        return [part.id for part in new.backend_tokenizer.model.tokenize(token)] if token is not None else []

    def renewed(run: list[int]) -> list[int]:
        if not names.keys() >= set(run):
            text = old.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            found = new(text, add_special_tokens=False, verbose=False)["input_ids"]
            if _spelling(new, found) == _spelling(old, run):
                return found
        return [part for number in run for part in names.get(number) or alone(number)]

    def document(ids: np.ndarray) -> np.ndarray:
        runs = groupby(np.asarray(ids).tolist(), added.__contains__)
        return np.array([number for _, run in runs for number in renewed(list(run))], dtype=np.int64)

    return [document(ids) for ids in documents]


def _spelling(tokenizer: Any, ids: list[int]) -> bytes:
    """What tokens stand for before the decoder makes a text of it, whether they are characters or bytes."""
    tokens = (token for token in tokenizer.convert_ids_to_tokens(ids) if token is not None)
    return b"".join(bytes([int(token[3:5], 16)]) if token in BYTE_TOKENS else token.encode() for token in tokens)


def _write(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
