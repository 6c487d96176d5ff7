"""The fields of a GGUF file that describe a checkpoint's tokenizer, as tokenizer_read.py reads them.

It knows no weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import scratch_folder
from edgeprune.model.gguf.cuts import check_pieces, names, other_cut, tell_cut
from edgeprune.model.gguf.pretokenizers import TEXT, pre_tokenizer_name
from edgeprune.model.gguf.tokenizer_read import (
    BYTE,
    BYTE_LEVEL,
    CONTROL,
    NORMAL,
    REFUSED,
    ROLES,
    SENTENCEPIECE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    write_tokenizer,
)
from edgeprune.model.tokens.bpe import BYTE_TOKENS
from edgeprune.model.tokens.generation import configured_ends
from edgeprune.model.tokens.tokenizer import load_tokenizer

LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>")
"""Added tokens that llama.cpp's converter treats as special although their files do not mark them so."""


def tokenizer_fields(directory: Path, rows: int, reduced: bool = False, name: str = "") -> dict[str, Any]:
    """Returns the fields of the tokenizer in a checkpoint's directory, and `general.name`.

    rows: of the embedding. reduced: the vocabulary will be cut down, and the fields must suit the smaller one too.
    name: of the model, by which llama.cpp knows some tokenizers; it may come back changed. The fields are read back and
    must make the same tokens of a text of many scripts. Raises InputError for a tokenizer for which llama.cpp has no
    kind or no pre-tokenizer, or of which it would cut other tokens.
    """
    # Only a plain BPE has a form in GGUF.
    loaded = load_tokenizer(directory)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"the tokenizer in {directory} has no tokenizer.json", REFUSED)
    description = json.loads(backend.to_str())
    model = description["model"]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("end_of_word_suffix"):
        kind = model.get("type")
        raise InputError(f"the tokenizer in {directory} is of kind {kind}, GGUF export needs a plain BPE", REFUSED)
    # Tokens, then the order of the merges: by score for SentencePiece, as pairs for byte-level BPE.
    fields = _tokens(loaded, description, rows)
    if model.get("byte_fallback"):
        fields |= _sentencepiece(backend, model, fields)
        check_pieces(model, fields)
    elif not model["merges"]:
        raise InputError(f"the tokenizer in {directory} has no merges, and llama.cpp loads none without them", REFUSED)
    else:
        fields |= {
            "tokenizer.ggml.model": BYTE_LEVEL,
            "tokenizer.ggml.pre": pre_tokenizer_name(loaded, description, reduced),
            "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        }
    # Special tokens; then the check that nothing was lost.
    fields |= _special(loaded, directory, rows)
    return fields | {"general.name": _verified_name(loaded, fields, name)}


def _tokens(loaded: Any, description: dict[str, Any], rows: int) -> dict[str, Any]:
    """Returns every token by its id, with its type; an id without a token gets a name that no text makes."""
    vocabulary = loaded.backend_tokenizer.get_vocab(with_added_tokens=True)
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    for token, index in vocabulary.items():
        if index < rows:  # a padding token beyond the embedding is no token of the model
            tokens[index], types[index] = token, NORMAL
    for added in description["added_tokens"]:
        if added["id"] < rows:
            special = added["special"] or LOOKS_SPECIAL.fullmatch(added["content"]) is not None
            types[added["id"]] = CONTROL if special else USER_DEFINED
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}


def _sentencepiece(backend: Any, model: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a BPE with byte fallback; the score of a piece is its rank, negated."""
    # Added tokens have no merges of their own.
    tokens, types = fields["tokenizer.ggml.tokens"], list(fields["tokenizer.ggml.token_type"])
    added = {token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)}
    ranks = _ranks([m.replace(" ", "", 1) if isinstance(m, str) else "".join(m) for m in model["merges"]], added)
    # Bytes and the unknown token have types of their own.
    for index, token in enumerate(tokens):
        if token in BYTE_TOKENS:
            types[index] = BYTE
        if token == model.get("unk_token"):
            types[index] = UNKNOWN
    # Whether a space is put in front of a text shows in the tokens of one.
    start = backend.encode("a", add_special_tokens=False).tokens[0]
    return {
        "tokenizer.ggml.model": SENTENCEPIECE,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(ranks.get(token, len(model["merges"]))) for token in tokens],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": start.startswith("▁"),
    }


def _ranks(pieces: list[str], added: set[str]) -> dict[str, int]:
    """Returns the rank of every piece, given the piece that each merge makes, in the order of the merges.

    llama.cpp knows no other order of merges than one of pieces. Where the merges come from such an order, all merges
    that make a piece stand together; pieces of equal rank, such as runs of spaces, may be mixed. Raises InputError for
    merges in another order.
    """
    # Where the merges of each piece begin and end.
    first = {piece: index for index, piece in reversed(list(enumerate(pieces)))}
    last = {piece: index for index, piece in enumerate(pieces)}
    ranks: dict[str, int] = {}
    # A group: pieces whose merges overlap. All of a group have the rank of its first merge.
    start, end, group = 0, -1, []
    for piece in sorted(first, key=first.__getitem__):
        if first[piece] > end:
            start, group = first[piece], []
        group.append(piece)
        end = max(end, last[piece])
        if len(group) > 1 and not all(len(set(member)) == 1 or member in added for member in group):
            raise InputError("the tokenizer's merges are not in an order of pieces, as SentencePiece's are", REFUSED)
        ranks[piece] = start
    return ranks


def _special(loaded: Any, directory: Path, rows: int) -> dict[str, Any]:
    """Returns special tokens by role, whether a text starts or ends with them, and the chat template."""
    fields: dict[str, Any] = {}
    # Tokens by role; those beyond the embedding are not part of the model.
    ids = {name: getattr(loaded, f"{name}_token_id", None) for name in ROLES}
    for name, index in ids.items():
        if index is not None and index < rows:
            fields[f"tokenizer.ggml.{ROLES[name]}_token_id"] = index
    # What an encoded text begins and ends with.
    encoded = loaded("a")["input_ids"]
    fields["tokenizer.ggml.add_bos_token"] = ids["bos"] is not None and encoded[0] == ids["bos"]
    fields["tokenizer.ggml.add_eos_token"] = ids["eos"] is not None and encoded[-1] == ids["eos"]
    # A chat may end its turns with another token than its texts.
    ends = configured_ends(directory)
    if turn := [index for index in ends if index != ids["eos"] and index < rows]:
        fields["tokenizer.ggml.eot_token_id"] = turn[0]
    template = getattr(loaded, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        fields["tokenizer.chat_template"] = template
    return fields


def _verified_name(loaded: Any, fields: dict[str, Any], name: str) -> str:
    """Returns the name under which the fields, read back, make the same tokens of TEXT and around added tokens.

    Warns where added tokens differ under each name. Raises InputError where TEXT does, or flags of added tokens do.
    """
    cuts = {}
    for candidate in names(name, loaded.backend_tokenizer):
        with scratch_folder() as folder:
            write_tokenizer(fields | {"general.name": candidate}, 0, folder)
            restored = load_tokenizer(folder)
        if restored(TEXT)["input_ids"] != loaded(TEXT)["input_ids"]:
            raise InputError(
                "a GGUF file cannot describe this tokenizer: read back, it makes other tokens of a text", REFUSED
            )
        cuts[candidate] = other_cut(loaded.backend_tokenizer, restored.backend_tokenizer)
        if cuts[candidate] is None:
            return candidate
    first = next(iter(cuts))
    tell_cut(cuts[first])
    return first
