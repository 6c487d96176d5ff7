"""A checkpoint's tokenizer in the fields of a GGUF file: read back, and read by llama.cpp."""

import json

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from edgeprune.errors import InputError
from edgeprune.model.gguf.export import export_gguf
from edgeprune.model.gguf.pretokenizers import PRE_TOKENIZERS, pre_tokenizer
from edgeprune.model.gguf.tokenizer_read import CONTROL, NORMAL, UNUSED, USER_DEFINED, write_tokenizer
from edgeprune.model.gguf.tokenizer_write import tokenizer_fields
from edgeprune.model.load import load_model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from tests.support.llamacpp import MERGES, VOCABULARY, LlamaCpp, save_merging_tokenizer
from tests.support.sentencepiece import sentencepiece
from tests.support.tiny import llama

TEXTS = ("the end", "a  the\n\nthe 123", "été the 日本 🙂", "abc ab. éa  b", "<|end|>the")


def saved(folder, tokens):
    """A random Llama of so many tokens; the tokenizer is the caller's."""
    llama(
        vocab_size=tokens,
        hidden_size=64,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    ).save_pretrained(folder)


def check_texts(folder, path):
    """llama.cpp goes on after each text as transformers does after the tokens of the checkpoint's tokenizer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    running = LlamaCpp(export_gguf(load_model(str(folder)), path))
    for text in TEXTS:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].double()
        expected = torch.log_softmax(logits, -1).numpy()
        assert np.abs(running.log_probabilities(text, len(expected)) - expected).max() < 5e-5, text


def with_added(folder):
    save_merging_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<|turn|>", normalized=False, special=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|turn|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, len(VOCABULARY) + 1]}))


def test_llama_cpp_cuts_texts_as_the_checkpoints_byte_level_tokenizer(tmp_path):
    saved(tmp_path / "hf", len(VOCABULARY))
    save_merging_tokenizer(tmp_path / "hf")
    check_texts(tmp_path / "hf", tmp_path / "m.gguf")


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_cuts_texts_as_the_checkpoints_sentencepiece(tmp_path, prefix):
    given = sentencepiece(add_space_prefix=prefix)
    saved(tmp_path / "hf", len(given["tokenizer.ggml.tokens"]))
    write_tokenizer(given, 256, tmp_path / "hf")
    check_texts(tmp_path / "hf", tmp_path / "m.gguf")
    fields = tokenizer_fields(tmp_path / "hf", len(given["tokenizer.ggml.tokens"]))
    scores = {name: fields.pop(name) for name in ["tokenizer.ggml.scores"]}["tokenizer.ggml.scores"]
    expected = given | {"tokenizer.ggml.add_space_prefix": prefix, "tokenizer.ggml.pre": "default"}
    assert {name: fields[name] for name in expected if name in fields} == {
        name: value for name, value in expected.items() if not name.endswith("scores")
    }
    pieces = [token for token in given["tokenizer.ggml.tokens"] if len(token) > 1 and token[0] != "<"]
    rank = dict(zip(given["tokenizer.ggml.tokens"], scores, strict=True))
    assert sorted(pieces, key=rank.get, reverse=True) == pieces  # the best first, as they were


def test_added_tokens_template_and_turn_come_along(tmp_path):
    with_added(tmp_path)
    count = len(VOCABULARY)
    fields = tokenizer_fields(tmp_path, count + 4)
    types = fields["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.tokens"][count:] == ["<tool>", "<|turn|>", f"[PAD{count + 2}]", f"[PAD{count + 3}]"]
    assert types == [CONTROL] + [NORMAL] * (count - 1) + [USER_DEFINED, CONTROL, UNUSED, UNUSED]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in MERGES]
    assert fields["tokenizer.ggml.eot_token_id"] == count + 1
    assert fields["tokenizer.chat_template"].endswith("<|turn|>{% endfor %}")
    assert (fields["tokenizer.ggml.pre"], fields["tokenizer.ggml.add_bos_token"]) == ("gpt-2", False)
    (tmp_path / "again").mkdir()
    write_tokenizer(fields, 256, tmp_path / "again")
    again, tokenizer = load_tokenizer(tmp_path / "again"), load_tokenizer(tmp_path)
    for text in (*TEXTS, "the<tool>the<|turn|>"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    chat = [{"role": "user", "content": "the"}]
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)


def test_an_end_behind_every_text_is_kept(tmp_path):
    given = sentencepiece(add_eos_token=True)
    write_tokenizer(given, 256, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(tmp_path)("ab")["input_ids"][-1] == 2
    fields = tokenizer_fields(tmp_path, len(given["tokenizer.ggml.tokens"]))
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (True, True)


def test_a_sentencepiece_with_steps_of_its_own_is_refused(tmp_path):
    """Its merges say nothing of a normalizer that makes all letters small."""
    given = sentencepiece()
    write_tokenizer(given, 256, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    description["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="makes other tokens of a text"):
        tokenizer_fields(tmp_path, len(given["tokenizer.ggml.tokens"]))


RUNS = [("▁" * count, -1e9) for count in range(3, 9)]  # Llama's have one score together


def test_pieces_of_one_score_share_a_rank(tmp_path):
    given = sentencepiece()
    tokens = given["tokenizer.ggml.tokens"] + [piece for piece, _ in RUNS]
    scores = given["tokenizer.ggml.scores"] + [score for _, score in RUNS]
    types = given["tokenizer.ggml.token_type"] + [NORMAL] * len(RUNS)
    given |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": types}
    write_tokenizer(given, 256, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ranks = tokenizer_fields(tmp_path, len(tokens))["tokenizer.ggml.scores"]
    assert len(set(ranks[-len(RUNS) :])) == 1
    assert ranks[-1] < ranks[tokens.index("ab")]


def test_merges_of_another_order_are_refused(tmp_path):
    """As those of a tokenizer that was trained as BPE: one piece is made early and late."""
    given = sentencepiece()
    write_tokenizer(given, 256, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = description["model"]["merges"]
    merges.append(merges.pop(next(i for i, pair in enumerate(merges) if "".join(pair) == "▁abc")))
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="not in an order of pieces"):
        tokenizer_fields(tmp_path, len(given["tokenizer.ggml.tokens"]))


def test_other_models_than_bpe_are_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizer(PRE_TOKENIZERS["gpt-2"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="of kind WordLevel"):
        tokenizer_fields(tmp_path, 2)
