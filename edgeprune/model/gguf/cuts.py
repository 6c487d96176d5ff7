"""The texts that llama.cpp cuts into other tokens than the tokenizer which a GGUF file describes.

The file has no place for the flags of added tokens, and llama.cpp joins any two pieces whose join is one. The rules are
those of src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.files import printable
from edgeprune.model.gguf.tokenizer_read import NORMAL, PHI3, REFUSED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
AROUND = ("{}", "a {} the", "a{}the", " {} ", "a\n{}\nthe", "the{} a", "{}{}", "A  {}  The")  # texts with a token
PHI3_NEEDS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}  # without them llama.cpp loads no model of this name


def names(name: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields names under which llama.cpp loads a model with this tokenizer, its own first, and one of the other kind.

    llama.cpp knows the tokenizer of Phi-3 by the model's name.
    """
    as_phi3 = name if PHI3.search(name) else f"Phi-3 {name}"
    others = PHI3.sub(r"\1 \2", name)
    can_be_phi3 = all(tokenizer.token_to_id(token) is not None for token in PHI3_NEEDS)
    yield from [each for each in (as_phi3, others) if each == name and (each == others or can_be_phi3)]
    yield from [each for each in (others, as_phi3) if each != name and (each == others or can_be_phi3)]


def other_cut(ours: Tokenizer, theirs: Tokenizer) -> dict[str, Any] | None:
    """Returns an added token around which texts are cut into other tokens, with its flags; None where there is none.

    ours: the checkpoint's tokenizer; theirs: the one that the file describes, which finds an added token wherever its
    text stands and begins anew behind it, as llama.cpp does. One with flags comes before the others.
    """
    added = [token for token in json.loads(ours.to_str())["added_tokens"] if theirs.id_to_token(token["id"])]
    added.sort(key=lambda token: not _flags(token))
    return next((t for t in added if any(_ids(ours, text) != _ids(theirs, text) for text in _texts(t))), None)


def tell_cut(token: dict[str, Any]) -> None:
    """Warns of an added token of other_cut; raises InputError where it has flags, which a GGUF file cannot say."""
    shown = printable(token["content"], 60)
    if flags := _flags(token):
        raise InputError(
            f"the added token {shown!r} is {flags}, which a GGUF file cannot say: "
            "llama.cpp cuts other tokens around it",
            REFUSED,
        )
    logging.getLogger(__name__).warning(
        "llama.cpp cuts texts with added tokens such as %r into other tokens: it puts a space behind them that the "
        "tokenizer does not",
        shown,
    )


def _texts(token: dict[str, Any]) -> Iterator[str]:
    """Yields texts with an added token, also in other spellings, of which a normalizer may make the token's own."""
    content = token["content"]
    for spelling in sorted({content, content.lower(), content.upper()} if token["normalized"] else {content}):
        yield from (around.replace("{}", spelling) for around in AROUND)


def _flags(token: dict[str, Any]) -> str:
    return ", ".join(flag for flag in FLAGS if token.get(flag))


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def check_pieces(model: dict[str, Any], fields: dict[str, Any]) -> None:
    """Raises InputError for two pieces of a SentencePiece whose join is a piece, but that no merge joins.

    model: of a tokenizer.json; fields: the tokens of the file and their types. llama.cpp joins any two such pieces.
    """
    merges = {tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]}
    pieces = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    known = {token for token, kind in pieces if kind == NORMAL}
    for piece in sorted(known):
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece))):
            if left in known and right in known and (left, right) not in merges:
                raise InputError(
                    f"no merge of the tokenizer makes its piece {printable(piece, 60)!r} of "
                    f"{printable(left, 60)!r} and {printable(right, 60)!r}, but llama.cpp would",
                    REFUSED,
                )
