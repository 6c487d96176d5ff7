"""Tokenizers of three kinds that are trained on a small corpus, as a folder of files."""

import json

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from edgeprune.model.gguf.pretokenizers import LLAMA3_SPLIT
from tests.support import DATA
from tests.support.checkpoints import LETTERS

TEXT = (DATA / "corpus.txt").read_text(encoding="utf-8")
CORPUS = TEXT[:1200].splitlines()  # what the user needs of it
SPECIAL = ["<|end|>", "<|user|>"]
TEMPLATE = (
    "{% for m in messages %}<|user|>zebra {{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>quagga\n{% endif %}"
)
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def trained(splitter, alphabet, size):
    """Vocabulary in order of creation, and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT, "zebra quagga " * 9], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return list(model["vocab"]), [tuple(pair) for pair in model["merges"]]


def all_splits(tokens):
    """Every pair that makes a token, as in files converted from tiktoken or SentencePiece: by the result's rank."""
    place = {token: i for i, token in enumerate(tokens)}
    return [(t[:cut], t[cut:]) for t in tokens for cut in range(1, len(t)) if t[:cut] in place and t[cut:] in place]


def save(folder, tokenizer, eos="<|end|>", **settings):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, **settings).save_pretrained(folder)


def byte_level(folder):
    tokens, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), LETTERS, 600)
    names = {token: i for i, token in enumerate(SPECIAL + tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(SPECIAL)
    save(folder, tokenizer, pad_token="<|end|>", chat_template=TEMPLATE)


def ignore_merges(folder):
    """As Llama 3: whole words first, merges in all ways, special tokens behind the others, bos put in front."""
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    splitter = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokens, _ = trained(splitter, LETTERS, 600)
    names = {token: i for i, token in enumerate([*tokens, "quagga", "Ġwholeword"])}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=all_splits(tokens), ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    bos = processors.TemplateProcessing(
        single="<|user|> $A", pair="<|user|> $A <|user|> $B", special_tokens=[("<|user|>", len(names) + 1)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    save(folder, tokenizer, bos_token="<|user|>", chat_template=TEMPLATE)


def byte_fallback(folder):
    """As Llama 2: `▁` for a space, one in front, bytes for unknown characters, merges in all ways."""
    tokens, _ = trained(pre_tokenizers.Metaspace(), [], 500)
    names = {token: i for i, token in enumerate(["<unk>", *SPECIAL, *BYTES, *tokens])}
    merges = all_splits(tokens)
    model = models.BPE(vocab=names, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    save(folder, tokenizer, unk_token="<unk>", chat_template=TEMPLATE)


KINDS = {"byte level": byte_level, "ignore merges": ignore_merges, "byte fallback": byte_fallback}


def ids_of(tokenizer, texts, **settings):
    return np.array([number for text in texts for number in tokenizer(text, **settings)["input_ids"]])


def edited(folder, name, change):
    path = folder / name
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
