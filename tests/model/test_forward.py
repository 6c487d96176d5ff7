import pytest
import torch

from edgeprune.model.forward import final_hidden, logits
from tests.tiny import as_model, llama

VARIANTS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 6},
    "multi-query": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "llama3 scaling": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers(changes):
    reference = llama(**changes)
    ids = torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = reference(ids).logits.detach()
    hidden = final_hidden(as_model(reference), ids, rows=2)
    ours = torch.cat(list(logits(as_model(reference), hidden.flatten(0, 1), tokens=7))).view_as(expected)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
