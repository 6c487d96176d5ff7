"""A tokenizer without transformers, against transformers' own on the demo model's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgeprune.errors import InputError
from edgeprune.model.load import load_model
from edgeprune.model.tokens.generation import end_ids
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.words import DeviceTokenizer, TokenizerWords
from tests.support.checkpoints import save_tokenizer

CHATS = (
    [{"role": "user", "content": "What is edge computing?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße 世界 👩‍🚀  two  spaces\n"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATE = """{% generation %}{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {{- bos_token + message.role }}{{ message.content | tojson }}
{% endfor %}{% endgeneration %}{{ tools | tojson(indent=2) if tools }}"""


def words_of(tokenizer: object, ends: set[int], size: int = 10**6) -> TokenizerWords:
    return TokenizerWords(tokenizer, ends, size)


@pytest.mark.demo
def test_texts_chats_and_ends_are_those_of_transformers() -> None:
    folder = load_model("demo").directory
    theirs, own = load_tokenizer(folder), DeviceTokenizer(folder)
    assert own.ends == end_ids(theirs, folder)
    ours, expected = words_of(own, own.ends), words_of(theirs, end_ids(theirs, folder))
    for chat in CHATS:
        ids = ours.chat_ids(chat, [])
        assert ids == expected.chat_ids(chat, [])
        assert ours.text(ids) == expected.text(ids)
        assert ours.ids(chat[-1]["content"]) == expected.ids(chat[-1]["content"])
        assert own.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("tools", [[], TOOLS])
def test_a_template_has_the_environment_that_transformers_gives_it(tmp_path: Path, tools: list) -> None:
    """Loop controls, the block of an assistant's words, JSON without escapes, special tokens."""
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    theirs, own = load_tokenizer(tmp_path), DeviceTokenizer(tmp_path)
    for chat in (*CHATS, [{"role": "tool", "content": "left out"}]):
        assert own.apply_chat_template(chat, tools) == theirs.apply_chat_template(chat, tools=tools, tokenize=False)


def test_several_templates_are_told_apart_by_tools(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    own = DeviceTokenizer(tmp_path)
    assert [own.apply_chat_template(CHATS[0], tools) for tools in ([], TOOLS)] == ["plain", "tools"]


def test_what_a_template_refuses_or_tries_is_one_message(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    for template, message in (
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% broken", "refuses it"),
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        own = DeviceTokenizer(tmp_path)
        with pytest.raises(InputError, match=message):
            words_of(own, own.ends).chat_ids(CHATS[0], [])


def test_a_folder_without_a_template_or_a_tokenizer_says_so(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    own = DeviceTokenizer(tmp_path)
    with pytest.raises(InputError, match="no chat template"):
        words_of(own, own.ends).chat_ids(CHATS[0], [])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        DeviceTokenizer(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(InputError, match="has no tokenizer.json"):
        DeviceTokenizer(tmp_path)
