"""The Modelfile says in Ollama's words what the model's own files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.chats import render
from edgeprune.model.gguf.modelfile import MODELFILE, write_modelfile
from edgeprune.model.load import load_model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from tests.support.gguf_models import saved
from tests.support.ollama import read_modelfile, rendered

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are \"helpful\".<|im_end|>\\n' }}{% endif %}"
) + CHATML
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '<|stop|>\\n\\n' + "
    "message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + "
    "'<|end|>\\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n"
    "<|assistant|>\\n' }}{% else %}{{ message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}{% if loop.first and "
    "system %}{{ '<<SYS>>' + system + '<</SYS>>' }}{% endif %}{{ message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
GEMMA = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
BRACES = CHATML.replace("<|im_end|>", "{{ '{{' }}").replace("{{ '{{' }}", "{' + '{")
CHATS = (
    [("user", "Hello\nyou")],
    [("system", "Be brief."), ("user", "Why?")],
    [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", '5 "quoted"')],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3")],
)


def folder_with(tmp_path: Path, template: str | None, **tokenizer: object) -> Path:
    saved(tmp_path / "model", "llama")
    path = tmp_path / "model" / "tokenizer_config.json"
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template} | tokenizer))
    return tmp_path / "model"


def read(folder: Path, context: int = 512) -> dict[str, list[str]]:
    (folder / "gguf").mkdir()
    write_modelfile(folder, folder / "gguf" / "my model.gguf", context)
    found: dict[str, list[str]] = {}
    for name, argument in read_modelfile((folder / "gguf" / MODELFILE).read_text()):
        found.setdefault(name, []).append(argument)
    return found


@pytest.mark.parametrize("template", [CHATML, WITH_DEFAULT, PHI3], ids=["chatml", "default", "phi3"])
def test_ollamas_template_writes_the_chats_that_the_models_own_writes(tmp_path, template):
    folder = folder_with(tmp_path, template)
    found = read(folder)
    assert found["FROM"] == ["./my model.gguf"]
    assert found["PARAMETER num_ctx"] == ["512"]
    assert found["PARAMETER stop"] == ["<|end|>"]
    tokenizer = load_tokenizer(folder)
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        expected = render(tokenizer, messages, prompted=True)
        if "SYSTEM" in found and chat[0][0] != "system":  # Ollama puts the Modelfile's before such a chat
            messages = [{"role": "system", "content": found["SYSTEM"][0]}, *messages]
        assert rendered(found["TEMPLATE"][0], messages) == expected
    assert ("SYSTEM" in found) == (template == WITH_DEFAULT)


@pytest.mark.parametrize(
    "template", [LLAMA2, GEMMA, BRACES, None, "{{ messages[0].content }}", "{{ broken"], ids=range(6)
)
def test_what_go_cannot_say_is_left_to_ollama(tmp_path, template):
    found = read(folder_with(tmp_path, template))
    assert "TEMPLATE" not in found
    assert found["FROM"] == ["./my model.gguf"]


def test_the_token_that_begins_every_text_is_left_out(tmp_path):
    """llama.cpp puts it there itself."""
    folder = folder_with(tmp_path, LLAMA3)
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
    }
    path.write_text(json.dumps(described))
    assert load_tokenizer(folder)("a")["input_ids"][0] == 0
    template, tokenizer = read(folder)["TEMPLATE"][0], load_tokenizer(folder)
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        assert "<|end|>" + rendered(template, messages) == render(tokenizer, messages, prompted=True)


def test_every_token_that_ends_an_answer_stops_ollama(tmp_path):
    folder = folder_with(tmp_path, None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    stops = read(folder)["PARAMETER stop"]
    assert stops == ["<|end|>", load_tokenizer(folder).convert_ids_to_tokens(7)]


@pytest.mark.demo
def test_the_demo_chats_in_ollamas_words(tmp_path):
    demo = load_model("demo")
    write_modelfile(demo.directory, tmp_path / "demo.gguf", 2048)
    found = dict(read_modelfile((tmp_path / MODELFILE).read_text()))
    assert found["SYSTEM"] == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert found["PARAMETER stop"] == "<|im_end|>"
    asked = [{"role": "user", "content": "Hi"}]
    expected = render(load_tokenizer(demo.directory), asked, prompted=True)
    assert rendered(found["TEMPLATE"], [{"role": "system", "content": found["SYSTEM"]}, *asked]) == expected
