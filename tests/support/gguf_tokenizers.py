"""Fields of byte-level tokenizers in GGUF files, and the tokenizers that transformers loads from them."""

import json

from edgeprune.model.gguf.tokenizer_read import NORMAL, write_tokenizer
from edgeprune.model.tokens.tokenizer import load_tokenizer
from tests.support.checkpoints import LETTERS, SPECIAL

CONTROL = 3


def loaded(fields, folder):
    """The tokenizer as transformers loads it beside a Llama's configuration."""
    write_tokenizer(fields, 256, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return load_tokenizer(folder)


def byte_level(pre, **changes):
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": SPECIAL + LETTERS,
        "tokenizer.ggml.token_type": [CONTROL] + [NORMAL] * 256,
        "tokenizer.ggml.bos_token_id": 0,
    }
    return fields | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
