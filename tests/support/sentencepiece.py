"""The fields of a GGUF file with a small SentencePiece tokenizer."""

from edgeprune.model.gguf.tokenizer_read import NORMAL

BYTE = 6
BYTES = [f"<0x{value:02X}>" for value in range(256)]
CHARACTERS = ["▁", "a", "b", "c", "é", "."]
PIECES = ["ab", "▁a", "bc", "▁ab", "▁abc", "▁▁", "ca", "ab.", "aa", "éa"]  # best first


def sentencepiece(**changes):
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, *CHARACTERS]
    ranks = [0.0] * (3 + 256) + [-float(rank) for rank in range(len(PIECES) + len(CHARACTERS))]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": ranks,
        "tokenizer.ggml.token_type": [2, 3, 3] + [BYTE] * 256 + [NORMAL] * (len(PIECES) + len(CHARACTERS)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return fields | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
