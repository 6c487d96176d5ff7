"""The tokenizer of a model's folder: its files, and how it is loaded. It knows no vocabulary of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError

PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def _names_plain_tokenizer(directory: Path) -> bool:
    """Returns whether the folder names the plain class, which AutoTokenizer would choose too.

    AutoTokenizer does so only after it has imported all of transformers.
    """
    path = directory / "tokenizer_config.json"
    if not path.is_file() or not (directory / "tokenizer.json").is_file():
        return False
    config = json.loads(path.read_text(encoding="utf-8"))
    return config.get("tokenizer_class") in PLAIN_TOKENIZERS and "auto_map" not in config


def load_tokenizer(directory: Path) -> Any:
    """Returns the checkpoint's tokenizer, from local files. Raises InputError where transformers cannot read it."""
    try:
        if _names_plain_tokenizer(directory):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the tokenizer's own reader raises
        raise InputError(f"cannot load the tokenizer in {directory}: {error}", "Restore its files.") from None


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """Returns the files of a model's folder beside its weights, by name."""
    return {
        path.name: path
        for path in sorted(directory.iterdir())
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in path.name
    }
