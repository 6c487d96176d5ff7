"""Checks that llama.cpp cuts a text into the tokens of the tokenizer that a GGUF file describes.

The file has no place for the flags of added tokens, and llama.cpp joins any two pieces whose join is one. The rules are
those of src/llama-vocab.cpp.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import printable
from edgeprune.model.gguf.tokenizer_read import NORMAL, REFUSED

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
AROUND = ("{}", "a {} the", "a{}the", " {} ", "a\n{}\nthe", "the{} a", "{}{}", "A  {}  The")  # texts with a token
PHI3, PHI3_WHOLE, PHI3_CUT = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>"), ("</s>",)


def check_added(description: dict[str, Any], name: str) -> None:
    """Raises InputError where an added token takes other text with it than llama.cpp lets it.

    description: of a tokenizer.json; name: of the model in the file. llama.cpp finds an added token wherever its text
    stands and takes it alone; of a model by the name of Phi-3 the special ones take the space after them.
    """
    from tokenizers import Tokenizer

    flagged = [token for token in description["added_tokens"] if any(token.get(flag) for flag in FLAGS)]
    if not flagged:
        return
    # The same tokenizer by llama.cpp's rules.
    there = copy.deepcopy(description)
    is_phi3 = any(part in name.lower() for part in PHI3)
    for token in there["added_tokens"]:
        token.update(dict.fromkeys(FLAGS, False))
        special = token["special"] and token["content"] not in PHI3_WHOLE
        token["rstrip"] = is_phi3 and (special or token["content"] in PHI3_CUT)
    ours, theirs = (Tokenizer.from_str(json.dumps(each)) for each in (description, there))
    for token in flagged:
        spellings = {token["content"], token["content"].lower(), token["content"].upper()}  # a normalizer may join them
        for text in (around.format(content, content) for content in sorted(spellings) for around in AROUND):
            if _ids(ours, text) != _ids(theirs, text):
                flags = ", ".join(flag for flag in FLAGS if token.get(flag))
                raise InputError(
                    f"the added token {printable(token['content'], 60)!r} is {flags}, which a GGUF file cannot say: "
                    f"llama.cpp cuts other tokens around it",
                    REFUSED,
                )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def check_pieces(model: dict[str, Any], fields: dict[str, Any]) -> None:
    """Raises InputError for a piece of a SentencePiece that no merge makes, but that two others join to.

    model: of a tokenizer.json; fields: the tokens of the file and their types. llama.cpp joins any two pieces whose
    text together is one.
    """
    made = {m.replace(" ", "", 1) if isinstance(m, str) else "".join(m) for m in model["merges"]}
    pieces = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    known = {token for token, kind in pieces if kind == NORMAL}
    for piece in sorted(known - made):
        if any(piece[:cut] in known and piece[cut:] in known for cut in range(1, len(piece))):
            raise InputError(
                f"no merge of the tokenizer makes its piece {printable(piece, 60)!r}, but llama.cpp would", REFUSED
            )
