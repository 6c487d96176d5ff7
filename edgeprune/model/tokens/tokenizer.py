"""The tokenizer of a model's folder: its files, and how it is loaded. It knows no vocabulary of its own."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import printable

PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
SENTENCEPIECE_START = b"\n"  # the tag of its first piece; tiktoken's files are text
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
    """Returns the checkpoint's tokenizer, from local files; it takes texts of any length.

    Raises InputError where transformers cannot read it.
    """
    try:
        if _names_plain_tokenizer(directory):
            from transformers import PreTrainedTokenizerFast as Loader
        else:
            from transformers import AutoTokenizer as Loader
        loaded = Loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        _ = loaded.unk_token_id  # transformers looks for one that is no token without end
    except Exception as error:  # whatever the tokenizer's own reader raises
        raise _unreadable(directory, error) from None
    loaded.model_max_length = sys.maxsize  # a file may hold anything here, and nothing is cut by it
    return loaded


def _unreadable(directory: Path, error: Exception) -> InputError:
    """Returns the error for a tokenizer that transformers cannot read; what it advises for a lone file may mislead."""
    path, package = directory / "tokenizer.model", ""
    if path.is_file() and not (directory / "tokenizer.json").is_file():
        with path.open("rb") as file:
            package = "sentencepiece" if file.read(1) == SENTENCEPIECE_START else "tiktoken"
    if not package or find_spec(package):
        return InputError(f"cannot load the tokenizer in {directory}: {printable(error)}", "Restore its files.")
    return InputError(
        f"the tokenizer in {directory} is tokenizer.model alone, which the package {package} reads",
        f"Install it here (pip install {package}), or put the tokenizer.json there that AutoTokenizer's "
        "from_pretrained and save_pretrained write where it is installed.",
    )


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """Returns the files of a model's folder beside its weights, by name."""
    return {
        path.name: path
        for path in sorted(directory.iterdir())
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in path.name
    }
