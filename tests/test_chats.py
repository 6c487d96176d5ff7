"""Texts and chats as token ids: what a template refuses, forms of a call, halves of characters, ids without a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from edgeprune.chats import check_ids, encode, render, render_whole
from edgeprune.errors import InputError
from edgeprune.model.tokens.tokenizer import load_tokenizer
from tests.support.checkpoints import save_tokenizer

USER = {"role": "user", "content": "weather?"}
ARGUMENTS = {"city": "Zürich"}
PLAIN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
CALLS = "{% for m in messages %}{% for c in m.tool_calls or () %}<{{ c.function.name }}BODY>{% endfor %}{% endfor %}"
# Some templates write the calls of a message only where its content is no text, some join the arguments to a text.
OF_NO_CONTENT = PLAIN.replace(
    "{{ m['content'] }}",
    "{% if m['content'] is not string %}<{{ m.tool_calls[0].function.name }}>{% else %}{{ m['content'] }}{% endif %}",
)


def tokenizer_with(folder: Path, template: Any) -> Any:
    save_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return load_tokenizer(folder)


def calling(arguments: Any, content: str | None = None) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [USER, {"role": "assistant", "content": content, "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (STRICT, "System role not supported"),
        ("{% if not tools %}{{ raise_exception('needs tools') }}{% endif %}", "needs tools"),
        ("{% for m in messages %}", "endfor"),
        ("{{ messages[0]['content'] + 3 }}", "concatenate|can only"),
        ("{{ 1 // 0 }}", "zero"),
        (5, "template refuses it"),
        ([{"name": "rag", "template": PLAIN}, {"name": "tool_use", "template": PLAIN}], "rag, tool_use"),
    ],
)
def test_the_templates_own_words_are_the_message(tmp_path: Path, template: Any, words: str) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    with pytest.raises(InputError, match=words) as caught:
        render(tokenizer, [{"role": "system", "content": "Be brief."}, USER])
    assert "\n" not in caught.value.message
    assert "plain text" in caught.value.remedy


def test_a_named_template_for_tools_is_taken_where_there_are_tools(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, [{"name": "tool_use", "template": PLAIN + "{{ tools[0]['name'] }}"}])
    assert render(tokenizer, [USER], [{"name": "weather"}]) == "[user]weather?weather"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CALLS.replace("BODY", " {{ c.function.arguments | tojson }}"), '<weather {"city": "Zürich"}>'),
        (CALLS.replace("BODY", " {{ c.function.arguments }}"), '<weather {"city": "Zürich"}>'),
        (CALLS.replace("BODY", "{{ ' ' + c.function.arguments }}"), '<weather {"city": "Zürich"}>'),
        (OF_NO_CONTENT, "[user]weather?[assistant]<weather>"),
        (PLAIN + CALLS.replace("BODY", ""), "[user]weather?[assistant]<weather>"),
    ],
    ids=["json", "printed", "joined", "without content", "content printed"],
)
def test_a_call_is_given_in_the_form_that_the_template_takes(tmp_path: Path, template: str, expected: str) -> None:
    assert render_whole(tokenizer_with(tmp_path, template), calling(ARGUMENTS)) == expected


def test_calls_that_the_template_leaves_out_or_refuses_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leaves its calls of tools out"):
        render_whole(tokenizer_with(tmp_path / "a", PLAIN), calling(ARGUMENTS))
    with pytest.raises(InputError, match="no calls here"):
        render_whole(tokenizer_with(tmp_path / "b", "{{ raise_exception('no calls here') }}"), calling(ARGUMENTS))


def test_half_of_a_character_becomes_the_one_that_stands_for_it(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for half in ("\ud83d", "\ude00", "\udce9"):
        assert tokenizer.decode(encode(tokenizer, f"caf{half} \U0001f600")) == "caf\ufffd \U0001f600"


def test_ids_beyond_the_embedding_are_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_tokens(["<think>", "</think>"])
    ids = encode(tokenizer, "<think> no </think>")
    rows = len(tokenizer) - 2
    with pytest.raises(InputError, match=rf"notes.txt holds .* of {rows}: <think> \({rows}\), </think>") as caught:
        check_ids([np.array([1, 2]), ids], rows, tokenizer, "notes.txt")
    assert "resize_token_embeddings" in caught.value.remedy
    check_ids([ids, []], rows + 2, tokenizer, "notes.txt")


def test_a_text_that_the_tokenizer_has_no_tokens_for_is_one_message() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "lamp": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert encode(tokenizer, "a lamp") == [0, 1]
    with pytest.raises(InputError, match=r"cannot split 'a stone': .*\[UNK\]") as caught:
        encode(tokenizer, "a stone")
    assert "unk_token" in caught.value.remedy
