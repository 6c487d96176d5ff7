"""The tokens that end a text: those of generation_config.json, and the tokenizer's own. It knows no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import printable
from edgeprune.model.tokens.bpe import read_object

FILE = "generation_config.json"


def configured_ends(directory: Path) -> list[int]:
    """Returns the tokens that end a generation by a folder's generation_config.json; none where it names none.

    Raises InputError for a file that is damaged, and for ends that are no token ids.
    """
    ends = read_object(directory / FILE).get("eos_token_id")
    tokens = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for token in tokens:
        if type(token) is not int or token < 0:
            raise InputError(
                f"{directory / FILE}: eos_token_id {printable(repr(ends), 60)} is no token id and no list of them",
                "Restore the file, or give the number of the token.",
            )
    return tokens


def end_ids(tokenizer: Any, directory: Path) -> set[int]:
    """Returns the tokens that end a text: the tokenizer's, and those of the folder's generation_config.json.

    Raises InputError as configured_ends.
    """
    own = tokenizer.eos_token_id
    return {*configured_ends(directory), *([] if own is None else [own])}
