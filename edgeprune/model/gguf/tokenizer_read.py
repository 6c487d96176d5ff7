"""The tokenizer.json and tokenizer_config.json of the tokenizer that a GGUF file describes. It knows no model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.files import printable, write_text
from edgeprune.model.gguf.pretokenizers import normalizer, pre_tokenizer, words_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of the GGUF format
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
PHI3 = re.compile(r"(phi)-?(3)", re.IGNORECASE)  # in the names of models
PHI3_WHOLE = ("<unk>", "<s>", "<|endoftext|>")


def write_tokenizer(fields: dict[str, Any], max_length: int, folder: Path) -> None:
    """Writes the files that transformers loads. fields: the metadata of the GGUF file.

    Raises InputError for a kind of tokenizer that is not supported, and for fields that do not make one.
    """
    # Build the tokenizer of a supported kind.
    kind = fields.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(
            f"unsupported GGUF tokenizer {printable(repr(kind), 60)}",
            f"Supported are: {', '.join(KINDS)}. The original Hugging Face directory works as well.",
        )
    try:
        tokenizer, special = _built(fields, kind)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises Exception itself for merges and tokens that do not fit
        raise InputError(
            f"the GGUF file's tokenizer is damaged: {printable(repr(error))}",
            "Give the original Hugging Face directory.",
        ) from None
    # Save it with its special tokens, limit and chat template.
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {f"{name}_token": token for name, token in special.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if (template := fields.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False))


def _built(fields: dict[str, Any], kind: str) -> tuple[Tokenizer, dict[str, str]]:
    """Builds the tokenizer, and returns it with its special tokens by role."""
    from tokenizers.processors import TemplateProcessing

    tokens = fields["tokenizer.ggml.tokens"]
    tokenizer = KINDS[kind](fields, tokens)
    # Special tokens by role, then all that are not to be split.
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in ROLES.items()}
    special = {name: tokens[token] for name, token in ids.items() if token is not None}
    _add_special(tokenizer, fields, tokens)
    # Tokens that begin and end every text: where no field decides, those of the kind.
    bos_first = kind == SENTENCEPIECE or words_of(fields.get("tokenizer.ggml.pre", "default")).bos
    defaults = {"bos": bos_first, "eos": False}
    added = [n for n, usual in defaults.items() if fields.get(f"tokenizer.ggml.add_{n}_token", usual) and n in special]
    if added:
        first, last = ([special[name]] if name in added else [] for name in defaults)
        tokenizer.post_processor = TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B", *last],
            special_tokens=list({special[name]: ids[name] for name in added}.items()),
        )
    return tokenizer, special


def _byte_level(fields: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """Builds a byte-level BPE from the file's merges and the rules of its pre-tokenizer."""
    from tokenizers import Tokenizer, decoders, models

    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges") or []]
    words = words_of(fields.get("tokenizer.ggml.pre", "default"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=words.whole))
    if (composed := normalizer(words)) is not None:
        tokenizer.normalizer = composed
    tokenizer.pre_tokenizer = pre_tokenizer(words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """Builds SentencePiece's BPE with byte fallback. Merges follow from the scores, as in transformers."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    # Every way to cut a piece into two others is a merge, ranked by the score of the piece.
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for piece, score in zip(tokens, fields["tokenizer.ggml.scores"], strict=True):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        mergeable = [(left, right, score) for left, right in pairs if left in vocabulary and right in vocabulary]
        merges += sorted(mergeable, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    merges.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    # What the pieces do not cover is spelled in bytes.
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(
        vocab=vocabulary, merges=[pair[:2] for pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    # Spaces are `▁`, one of which may be put in front of a text.
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    return tokenizer


def _add_special(tokenizer: Tokenizer, fields: dict[str, Any], tokens: list[str]) -> None:
    """Adds the tokens that are not to be split; those of Phi-3, which llama.cpp knows by its name, take the space
    behind them along."""
    from tokenizers import AddedToken

    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    is_phi3 = PHI3.search(str(fields.get("general.name"))) is not None
    added = [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED, rstrip=is_phi3 and token not in PHI3_WHOLE)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


REFUSED = "Deploy the checkpoint or the ONNX graph."
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
KINDS = {BYTE_LEVEL: _byte_level, SENTENCEPIECE: _sentencepiece}
