import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM

from edgeprune.errors import NumericalError
from edgeprune.model import save
from edgeprune.model.decoder import Rotary
from edgeprune.model.forward import token_losses, weight_stream
from edgeprune.model.load import load_model, load_tokenizer
from edgeprune.model.save import save_checkpoint
from edgeprune.model.tokenizer import write_tokenizer
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.prune import prune
from tests.checkpoints import save_llama
from tests.model.test_tokenizer import sentencepiece
from tests.reference import weights_of


def ids() -> torch.Tensor:
    return torch.randint(0, 257, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("key_value_heads", "widths"), [(2, (2, 2, 40)), (2, (1, 3, 64)), (1, (1, 5, 32))])
def test_a_pruned_checkpoint_loads_with_equal_weights_and_logits(tmp_path, tied, key_value_heads, widths):
    """1 group of 5 heads does not divide the hidden size: the trap of the Llama configuration."""
    save_llama(tmp_path / "dense", tie_word_embeddings=tied, num_key_value_heads=key_value_heads)
    dense = load_model(str(tmp_path / "dense"))
    target = dense.decoder.with_widths(*widths)
    weights = dict(prune(dense, target, ids(), METHODS["default"], 0))
    save_checkpoint(target, weights.items(), dense, tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", local_files_only=True)
    assert all(torch.equal(weights_of(loaded)[name], weight) for name, weight in weights.items())
    own = load_model(str(tmp_path / "small"))
    assert own.decoder.layers == target.layers
    assert all(torch.equal(own.weights[name], weight) for name, weight in weights.items())
    losses = torch.nn.functional.cross_entropy(
        loaded(ids()).logits[:, :-1].transpose(1, 2), ids()[:, 1:], reduction="none"
    )
    ours = token_losses(own.decoder, weight_stream(own), ids())
    assert (ours - losses).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small", local_files_only=True)
    assert tokenizer.decode(tokenizer("like the dense one")["input_ids"]) == "like the dense one"


def test_shards_are_written_above_the_limit_and_the_bytes_are_equal(tmp_path, monkeypatch):
    save_llama(tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"))
    monkeypatch.setattr(save, "SHARD_BYTES", 150_000)
    for name in ("one", "two"):
        save_checkpoint(dense.decoder, ((n, dense.weights[n]) for n in dense.decoder.shapes()), dense, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    for file in files:  # readers that map the file want its data aligned
        assert int.from_bytes((tmp_path / "one" / file).read_bytes()[:8], "little") % 8 == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", local_files_only=True)
    assert all(torch.equal(weights_of(loaded)[name], dense.weights[name]) for name in dense.weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_source_is_kept(tmp_path, dtype):
    save_llama(tmp_path / "dense", dtype)
    dense = load_model(str(tmp_path / "dense"))
    tensors = [(name, dense.weights[name].float()) for name in dense.decoder.shapes()]
    save_checkpoint(dense.decoder, tensors, dense, tmp_path / "same")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "same", local_files_only=True)
    assert loaded.dtype == dtype
    assert all(torch.equal(weights_of(loaded)[name], dense.weights[name]) for name in dense.weights)


def test_a_weight_beyond_the_dtype_is_refused(tmp_path):
    save_llama(tmp_path / "dense", torch.float16)
    dense = load_model(str(tmp_path / "dense"))
    tensors = {name: dense.weights[name].float() for name in dense.decoder.shapes()}
    tensors["layers.1.mlp.down"][0, 0] = 7e4
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.down reaches 7e\+04, torch\.float16 holds 6\.55e\+04"):
        save_checkpoint(dense.decoder, tensors.items(), dense, tmp_path / "small")


def test_scaled_rope_and_fewer_layers_give_the_same_logits(tmp_path):
    """The swap to mistral keeps the rope scaling; half the layers may go."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    save_llama(tmp_path / "dense", num_key_value_heads=1, rope_parameters=rope)
    dense = load_model(str(tmp_path / "dense"))
    target = dense.decoder.with_widths(1, 5, 32)
    target = replace(target, layers=target.layers[:1])
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) * 0.2 for name, shape in target.shapes().items()}
    save_checkpoint(target, weights.items(), dense, tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", local_files_only=True)
    assert type(loaded) is MistralForCausalLM
    losses = torch.nn.functional.cross_entropy(
        loaded(ids()).logits[:, :-1].transpose(1, 2), ids()[:, 1:], reduction="none"
    )
    own = load_model(str(tmp_path / "small"))
    ours = token_losses(own.decoder, weight_stream(own), ids())
    assert (ours - losses).abs().max() < 1e-4
    unscaled = replace(own.decoder, rotary=Rotary(tuple(10000.0 ** (-2 * m / 16) for m in range(8))))
    assert (token_losses(unscaled, weight_stream(own), ids()) - losses).abs().max() > 1e-2


@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer", None])
def test_the_tokenizer_of_a_llama_that_became_a_mistral_is_the_same(tmp_path, declared):
    """transformers chooses tokenizer classes by model_type too."""
    save_llama(tmp_path / "dense", num_key_value_heads=1)
    (tmp_path / "dense" / "tokenizer.json").unlink()
    write_tokenizer(sentencepiece(), 256, tmp_path / "dense")
    path = tmp_path / "dense" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": declared}))
    dense = load_model(str(tmp_path / "dense"))
    target = dense.decoder.with_widths(1, 5, 32)
    save_checkpoint(target, ((n, torch.zeros(s)) for n, s in target.shapes().items()), dense, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["model_type"] == "mistral"
    texts = ["abc ab", " a  b.", "é日\nab", "<s>ab</s> c"]
    expected, found = (load_tokenizer(tmp_path / name)(texts)["input_ids"] for name in ("dense", "small"))
    assert found == expected


@pytest.mark.parametrize("change", ["order", "shape", "missing", "extra"])
def test_a_wrong_stream_is_a_bug(tmp_path, change):
    save_llama(tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"))
    stream = [(name, dense.weights[name]) for name in dense.decoder.shapes()]
    if change == "order":
        stream[1], stream[2] = stream[2], stream[1]
    elif change == "shape":
        stream[1] = (stream[1][0], stream[1][1][:-1])
    elif change == "missing":
        stream.pop()
    else:
        stream.append(("more", torch.zeros(1)))
    with pytest.raises(ValueError, match="expected|no weight"):
        save_checkpoint(dense.decoder, stream, dense, tmp_path / "small")
