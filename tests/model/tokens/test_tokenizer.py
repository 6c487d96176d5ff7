"""The tokenizer of a folder, as transformers would load it."""

import json

import pytest
from transformers import AutoTokenizer

from edgeprune.errors import InputError
from edgeprune.model.tokens.tokenizer import TOKENIZER_FILES, load_tokenizer, tokenizer_files
from tests.support.checkpoints import save_llama


@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", None])
def test_a_tokenizer_is_what_transformers_would_choose(tmp_path, declared):
    save_llama(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": declared, "chat_template": "hi"}))
    ours, theirs = load_tokenizer(path.parent), AutoTokenizer.from_pretrained(path.parent)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert (ours.special_tokens_map, ours.chat_template) == (theirs.special_tokens_map, theirs.chat_template)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_tokenizer_configuration_is_said(tmp_path, content):
    save_llama(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path / "model")


def test_a_broken_tokenizer_is_said(tmp_path):
    save_llama(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path / "model")


def test_the_files_beside_the_weights_are_the_tokenizers_and_the_configuration(tmp_path):
    save_llama(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "notes.md").write_text("")
    for name in ("merges.txt", "tokenizer.model", "chat_template.jinja"):
        (tmp_path / name).write_text("")
    files = tokenizer_files(tmp_path)
    assert list(files) == sorted(files)
    assert set(files) == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("merges.txt", "tokenizer.model", "chat_template.jinja"),
    }
    assert all(path == tmp_path / name for name, path in files.items())
    assert set(files) - {"config.json"} <= set(TOKENIZER_FILES)


@pytest.mark.parametrize("length", ["512", None, 1e30, [3], 4])
def test_whatever_stands_for_the_longest_text_no_text_is_refused_or_cut(tmp_path, length):
    save_llama(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    assert len(load_tokenizer(path.parent)("long " * 100)["input_ids"]) > 100


@pytest.mark.parametrize(("start", "package"), [(b"\n\x0e", "sentencepiece"), (b"IQ== 0", "tiktoken")])
def test_a_tokenizer_model_alone_names_the_package_that_reads_it(tmp_path, monkeypatch, start, package):
    save_llama(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer.model").write_bytes(start)
    monkeypatch.setattr("edgeprune.model.tokens.tokenizer.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"is tokenizer.model alone, which the package {package} reads") as caught:
        load_tokenizer(tmp_path / "model")
    assert f"pip install {package}" in caught.value.remedy
    monkeypatch.setattr("edgeprune.model.tokens.tokenizer.find_spec", lambda name: object())
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path / "model")


def test_an_unknown_token_that_is_none_is_refused(tmp_path):
    """transformers loads it, and looks for its id without end."""
    save_llama(tmp_path / "model")
    (tmp_path / "model" / "special_tokens_map.json").write_text('{"unk_token": ""}')
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path / "model")
