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
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"llama-bpe": LLAMA3_SPLIT, "llama3": LLAMA3_SPLIT, "llama-v3": LLAMA3_SPLIT, "tekken": TEKKEN_SPLIT}
"""Families made with tiktoken: they split by a pattern, take whole words of the vocabulary before any
merge (`ignore_merges`), and start with bos unless the file says otherwise."""
PRE_TOKENIZERS = ("default", "gpt-2", "smollm", *SPLITS)


def write_tokenizer(fields: dict[str, Any], max_length: int, folder: Path) -> None:
    """Write the files that transformers loads. fields: the GGUF metadata. Raises InputError."""
    kind = fields.get("tokenizer.ggml.model")
    if kind not in KINDS:
        raise InputError(
            f"unsupported GGUF tokenizer {kind!r}",
            f"Supported are: {', '.join(KINDS)}. The original Hugging Face directory works as well.",
        )
    try:
        tokenizer, special = _built(fields, kind)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises Exception itself for merges and tokens that do not fit
        raise InputError(
            f"the GGUF file's tokenizer is damaged: {error!r}", "Give the original Hugging Face directory."
        ) from None
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {f"{name}_token": token for name, token in special.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if (template := fields.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _built(fields: dict[str, Any], kind: str) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its special tokens by role."""
    from tokenizers.processors import TemplateProcessing

    tokens = fields["tokenizer.ggml.tokens"]
    tokenizer = KINDS[kind](fields, tokens)
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in ROLES.items()}
    special = {name: tokens[token] for name, token in ids.items() if token is not None}
    _add_special(tokenizer, fields, tokens)
    bos_first = kind == "llama" or fields.get("tokenizer.ggml.pre") in SPLITS
    if fields.get("tokenizer.ggml.add_bos_token", bos_first) and "bos" in special:
        bos = special["bos"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
        )
    return tokenizer, special


def _byte_level(fields: dict[str, Any], tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges") or []]
    pre = fields.get("tokenizer.ggml.pre", "default")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=pre in SPLITS))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
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
    if name in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[name]), behavior="isolated")
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


ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
