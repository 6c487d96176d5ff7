"""A GGUF file's tokenizer metadata -> tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types of the GGUF format
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = ("default", "gpt-2", "smollm", "llama-bpe", "llama3")


def write_tokenizer(fields: dict[str, Any], max_length: int, folder: Path) -> None:
    """Write the files that transformers loads. fields: the GGUF metadata. Raises InputError."""
    kind = fields.get("tokenizer.ggml.model")
    tokens = fields["tokenizer.ggml.tokens"]
    if kind == "gpt2":
        tokenizer = _byte_level(fields, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields, tokens)
    else:
        raise InputError(
            f"unsupported GGUF tokenizer {kind!r}",
            "Supported are: gpt2, llama. The original Hugging Face directory works as well.",
        )
    special = {
        name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if fields.get(f"tokenizer.ggml.{key}_token_id") is not None
    }
    _add_special(tokenizer, fields, tokens)
    if fields.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos" in special:
        from tokenizers.processors import TemplateProcessing

        bos = special["bos"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {f"{name}_token": token for name, token in special.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if (template := fields.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _byte_level(fields: dict[str, Any], tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges") or []]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, fuse_unk=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(fields.get("tokenizer.ggml.pre", "default"))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(name: str) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    if name in ("default", "gpt-2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if name in ("llama-bpe", "llama3"):
        split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise InputError(
        f"unsupported GGUF pre-tokenizer {name!r}",
        f"Supported are: {', '.join(PRE_TOKENIZERS)}. The original Hugging Face directory works as well.",
    )


def _sentencepiece(fields: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """BPE of SentencePiece with byte fallback; merges follow from the scores, as in transformers."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for piece, score in zip(tokens, fields["tokenizer.ggml.scores"], strict=True):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right, score) for left, right in pairs if left in vocabulary and right in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    merges.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(
        vocab=vocabulary, merges=[pair[:2] for pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    return tokenizer


def _add_special(tokenizer: Tokenizer, fields: dict[str, Any], tokens: list[str]) -> None:
    from tokenizers import AddedToken

    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    added = [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
