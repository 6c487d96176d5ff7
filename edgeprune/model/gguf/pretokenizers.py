"""The pre-tokenizers that cut a text into words for byte-level BPE, by their names in GGUF files.

The names are those of the field `tokenizer.ggml.pre`. llama.cpp's converter recognises a tokenizer by the sha256 of the
tokens that it makes of one text, and so does this module. It knows no model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.files import printable

if TYPE_CHECKING:
    from tokenizers import normalizers, pre_tokenizers

HUB = "The original Hugging Face directory works as well."
CONTRACTIONS, REST = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + REST
QWEN2_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + REST
QWEN35_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + REST
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + REST
)
GPT4O_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + REST
)


@dataclass(frozen=True)
class Words:
    """Rules by which a text is cut into words.

    split: the pattern, None for GPT-2's. digits: every digit is a word of its own. whole: words that are in the
    vocabulary are taken before any merge (`ignore_merges`). bos: a text starts with the begin token unless the file
    states otherwise. composed: the text is normalised to NFC first.
    """

    split: str | None = None
    digits: bool = False
    whole: bool = False
    bos: bool = False
    composed: bool = False


GPT2, NEOX, DIGITS, QWEN2 = Words(), Words(composed=True), Words(digits=True), Words(QWEN2_SPLIT, composed=True)
LLAMA3, TEKKEN = Words(LLAMA3_SPLIT, whole=True, bos=True), Words(TEKKEN_SPLIT, whole=True, bos=True)
PRE_TOKENIZERS = {
    "gpt-2": GPT2,
    "default": GPT2,
    "phi-2": GPT2,
    "a.x-4.0": GPT2,
    "gigachat": GPT2,
    "mellum": GPT2,
    "trillion": GPT2,
    "granite-docling": GPT2,
    "olmo": NEOX,
    "mpt": NEOX,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "codeshell": DIGITS,
    "exaone": DIGITS,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "falcon3": LLAMA3,
    "midm-2.0": LLAMA3,
    "lfm2": LLAMA3,
    "smaug-bpe": Words(LLAMA3_SPLIT),
    "dbrx": Words(LLAMA3_SPLIT),
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "kormo": QWEN2,
    "megrez": QWEN2,
    "stablelm2": Words(QWEN2_SPLIT),
    "hunyuan": Words(QWEN2_SPLIT),
    "qwen35": Words(QWEN35_SPLIT),
    "tekken": TEKKEN,
    "gpt-4o": Words(GPT4O_SPLIT),
    "llama4": Words(GPT4O_SPLIT),
}


def words_of(name: str) -> Words:
    """Returns the rules of a name. Raises InputError for a name that is not known."""
    if name not in PRE_TOKENIZERS:
        raise InputError(
            f"unsupported GGUF pre-tokenizer {printable(repr(name), 60)}",
            f"Supported are: {', '.join(PRE_TOKENIZERS)}. {HUB}",
        )
    return PRE_TOKENIZERS[name]


def pre_tokenizer(words: Words) -> pre_tokenizers.PreTokenizer:
    """Returns the rules as a pre-tokenizer of the tokenizers library."""
    from tokenizers import Regex, pre_tokenizers

    if words.split is None:
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]) if words.digits else level
        )
    split = pre_tokenizers.Split(Regex(words.split), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def normalizer(words: Words) -> normalizers.Normalizer | None:
    """Returns the normalizer that the rules need; None where they need none."""
    from tokenizers import normalizers

    return normalizers.NFC() if words.composed else None


def pre_tokenizer_name(tokenizer: Any, description: dict[str, Any], reduced: bool = False) -> str:
    """Returns the name in GGUF files of the pre-tokenizer of a tokenizer of transformers.

    description: the content of its tokenizer.json. A tokenizer whose tokens of the text have no known sha256, such as
    one whose vocabulary was cut down, is recognised where it is built like one of the table. reduced: recognise it in
    that way only, since its tokens will be others. Raises InputError for any other tokenizer: a guess would spoil every
    text.
    """
    digest = hashlib.sha256(str(tokenizer.encode(TEXT)).encode()).hexdigest()
    if digest in HASHES and not reduced:
        return HASHES[digest]
    built = _essence(description)
    for name, words in PRE_TOKENIZERS.items():
        if built == _essence(_as_description(words)):
            return name
    raise InputError(
        f"the tokenizer's pre-tokenizer is not one of those that GGUF files can name (sha256 {digest[:12]}...)",
        f"Known are: {', '.join(PRE_TOKENIZERS)}. Deploy the checkpoint or the ONNX graph.",
    )


def _as_description(words: Words) -> dict[str, Any]:
    """Returns the content of the tokenizer.json that a tokenizer with these rules has."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE(ignore_merges=words.whole))
    tokenizer.pre_tokenizer = pre_tokenizer(words)
    if (composed := normalizer(words)) is not None:
        tokenizer.normalizer = composed
    return json.loads(tokenizer.to_str())


def _essence(description: dict[str, Any]) -> tuple[str, bool]:
    """Returns what decides on the words, for comparison.

    It is the normalizer and the pre-tokenizer, without the flag that changes only offsets, and whether merges are
    ignored.
    """
    steps = [description["normalizer"], description["pre_tokenizer"]]
    text = json.dumps(steps, sort_keys=True)
    text = text.replace(', "trim_offsets": true', "").replace(', "trim_offsets": false', "")
    return text, bool(description["model"].get("ignore_merges"))


TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅"
    " 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ --"
    "----======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there,"
    " 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
HASHES = {
    "7e57df22b1fe23a7b1e1c7f3dc4e3f96d43a4eb0836d0c6bdc3436d7b2f1c664": "hunyuan",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "1444df51289cfa8063b96f0e62b1125440111bc79a52003ea14b6eac7016fd5f": "qwen35",
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
    "9e454714343b69b99b71795c1d27a68c2a1d15dab111f4d353109f966af29da7": "lfm2",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "32d85c31273f8019248f2559fed492d929ea28b17e51d81d3bb36fff23ca72b3": "stablelm2",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "7b3e7548e4308f52a76e8229e4e6cc831195d0d1df43aed21ac6c93da05fec5f": "codeshell",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "4e2b24cc4770243d65a2c9ec19770a72f08cffc161adbb73fcbb6b7dd45a0aae": "exaone",
    "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085": "phi-2",
    "ad851be1dba641f2e3711822f816db2c265f788b37c63b4e1aeacb9ee92de8eb": "gigachat",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "1994ffd01900cfb37395608534236ecd63f2bd5995d6cb1004dda1af50240f15": "trillion",
    "d353350c764d8c3b39c763113960e4fb4919bea5fbf208a0e3b22e8469dc7406": "llama4",
    "b0a6b1c0bd5998ebd9df08611efde34a4ff03faed45ae09c43e6b31ebd4b94cf": "a.x-4.0",
    "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",
    "169bf0296a13c4d9b7672313f749eb36501d931022de052aad6e36f2bf34dd51": "lfm2",
    "a1e163ecab2e718a4c829d1148b6e86824ec36163bb71941c3dca9cd5ac25756": "mellum",
    "53e325976a6e142379c19b09afcae354f2f496f147afa8f9e189a33fe4e3024e": "granite-docling",
    "4a2e2abae11ca2b86d570fc5b44be4d5eb5e72cc8f22dd136a94b37da83ab665": "kormo",
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",
}
