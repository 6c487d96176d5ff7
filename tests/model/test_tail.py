"""The last layers of a model as a model: its logits and prunings are those of the whole one."""

import pytest
import torch

from edgeprune.model.forward import spread_logits, token_logits, weight_stream
from edgeprune.model.load import load_model
from edgeprune.model.tail import tail_of
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.prune import prune
from tests.support.families import CASES, save_family


@pytest.mark.parametrize("family", CASES)
def test_the_last_layers_alone_give_the_logits_of_the_whole_model(family, tmp_path):
    save_family(tmp_path, family)
    model = load_model(str(tmp_path))
    ids = torch.randint(0, model.decoder.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    expected = token_logits(model.decoder, weight_stream(model), ids)
    for first in range(len(model.decoder.layers) + 1):
        tail, rows = tail_of(model, first, ids)
        assert len(tail.decoder.layers) == len(model.decoder.layers) - first
        logits = spread_logits(tail.decoder, weight_stream(tail), rows, rows.numel())
        assert torch.allclose(logits, expected.flatten(0, 1), atol=1e-4)


def test_a_cut_of_the_last_layers_is_that_of_the_whole_model(tmp_path):
    save_family(tmp_path, "llama")
    model = load_model(str(tmp_path))
    ids = torch.randint(0, model.decoder.vocab_size, (6, 20), generator=torch.Generator().manual_seed(0))
    dense = model.decoder.layer_widths
    cut = (dense[-1][0], dense[-1][1], dense[-1][2] // 2)
    whole = dict(prune(model, model.decoder.with_layer_widths([*dense[:-1], cut]), ids, METHODS["default"], 0))
    tail, rows = tail_of(model, len(dense) - 1, ids)
    small = dict(prune(tail, tail.decoder.with_layer_widths([cut]), rows, METHODS["default"], 0))
    last = f"layers.{len(dense) - 1}."
    for name, weight in whole.items():
        if name.startswith(last):
            assert torch.allclose(small[name.replace(last, "layers.0.")], weight, rtol=1e-4, atol=1e-6)
