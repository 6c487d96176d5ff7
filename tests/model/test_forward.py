import pytest
import torch

from edgeprune.model.forward import token_losses, weight_stream
from tests.support.tiny import as_model, llama

VARIANTS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 6},
    "multi-query": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "llama3 scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_losses_equal_transformers(changes):
    reference = llama(**changes)
    ids = torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(0))
    logits = reference(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double()
    model = as_model(reference)
    ours = token_losses(model.decoder, weight_stream(model), ids, chunk=24)
    assert (ours - expected).abs().max() < 2e-5 * expected.abs().max()


def test_weights_out_of_order_are_a_bug():
    model = as_model(llama())
    with pytest.raises(ValueError, match=r"expected layers\.0\.attention\.norm"):
        token_losses(
            model.decoder,
            [("embedding", model.weights["embedding"]), ("norm", model.weights["norm"])],
            torch.zeros(1, 4, dtype=torch.int64),
        )
