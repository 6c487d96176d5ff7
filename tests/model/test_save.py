import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgeprune.model import save
from edgeprune.model.load import load_model
from edgeprune.model.save import save_checkpoint
from edgeprune.pruning.prune import METHODS, prune
from tests.checkpoints import save_llama
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
    from edgeprune.model.forward import token_losses, weight_stream

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
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", local_files_only=True)
    assert all(torch.equal(weights_of(loaded)[name], dense.weights[name]) for name in dense.weights)


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
