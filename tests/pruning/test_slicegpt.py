"""SliceGPT: exact at full width, otherwise the projections of the stream that the paper describes."""

from __future__ import annotations

from math import prod

import pytest
import torch

from edgeprune.errors import InputError, NumericalError
from edgeprune.model.forward import head_logits
from edgeprune.model.load import load_model, load_shape
from edgeprune.pruning.slicegpt import (
    check_sliceable,
    slice_model,
    sliced_layer_parameters,
    sliced_shapes,
    sliced_states,
    widest_slice,
)
from tests.support.families import save_family
from tests.support.tiny import as_model, llama


def ids(vocabulary: int = 101, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, vocabulary, (4, 24), generator=torch.Generator().manual_seed(seed))


def sliced_logits(model, width: int, samples: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(b, t - 1, vocabulary), at every position but the last."""
    states, head = sliced_states(model.decoder, slice_model(model, width, samples), rows)
    return head_logits(model.decoder, states, head).view(len(rows), rows.shape[1] - 1, -1)


@pytest.mark.parametrize("case", ["llama, llama3 rope, biases, untied", "qwen2", "qwen3", "granite", "phi3"])
def test_at_full_width_the_logits_are_those_of_transformers(case, tmp_path):
    reference = save_family(tmp_path, case)
    model, rows = load_model(str(tmp_path)), ids(257, 2)
    obtained = sliced_logits(model, model.decoder.hidden_size, ids(257), rows)
    with torch.no_grad():
        expected = reference(rows).logits[:, :-1]
    assert torch.allclose(obtained, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def projected_logits(reference, width: int, samples: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """transformers' own modules, each on the stream's projection onto the first principal components."""
    base, count = reference.model, len(samples)
    hidden = base.embed_tokens(torch.cat([samples, rows]))  # both, side by side
    angles = base.rotary_emb(hidden, torch.arange(rows.shape[1])[None])

    def projected(states: torch.Tensor) -> torch.Tensor:
        *_, directions = torch.linalg.svd(states[:count].flatten(0, 1).double(), full_matrices=False)
        return (states.double() @ directions[:width].T @ directions[:width]).float()

    for layer in base.layers:
        hidden = projected(hidden)
        hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), angles, None)[0]
        hidden = projected(hidden)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return reference.lm_head(base.norm(hidden))[count:, :-1]


@pytest.mark.parametrize("width", [40, 17])
def test_a_narrower_stream_is_the_projection_onto_the_first_components(width):
    reference, rows = llama(), ids(seed=2)
    obtained = sliced_logits(as_model(reference), width, ids(), rows)
    expected = projected_logits(reference, width, ids(), rows)
    assert torch.allclose(obtained, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(obtained, reference(rows).logits[:, :-1], atol=0.1)


@pytest.mark.parametrize("case", ["llama, llama3 rope, biases, untied", "qwen3"])
def test_the_weights_are_those_that_are_counted(case, tmp_path):
    save_family(tmp_path, case)
    model = load_model(str(tmp_path))
    weights = dict(slice_model(model, 20, ids(257)))
    shapes = sliced_shapes(model.decoder, 20)
    assert [(name, tuple(weight.shape)) for name, weight in weights.items()] == list(shapes.items())
    matrices = [weight for name, weight in weights.items() if name.startswith("layers.") and weight.ndim == 2]
    assert sliced_layer_parameters(model.decoder, 20) == sum(weight.numel() for weight in matrices)
    # A shortcut beside each module, and nothing is cut behind the last one.
    shortcuts = [shape for name, shape in shapes.items() if name.endswith("shortcut")]
    assert shortcuts == [(20, 20)] * (len(shortcuts) - 1) + [(20, 64)]
    assert sum(map(prod, shapes.values())) == sum(weight.numel() for weight in weights.values())


def test_the_widest_slice_fills_the_capacity_with_its_shortcuts():
    decoder = as_model(llama()).decoder
    for share in (0.4, 0.7, 0.9):
        capacity = int(share * decoder.layer_parameters)
        width = widest_slice(decoder, capacity)
        assert sliced_layer_parameters(decoder, width) <= capacity < sliced_layer_parameters(decoder, width + 1)
    assert widest_slice(decoder, 1) == 0
    assert sliced_layer_parameters(decoder, decoder.hidden_size) > decoder.layer_parameters


@pytest.mark.parametrize("case", ["gpt2", "gemma2", "olmo2", "gpt_neox", "mixtral"])
def test_other_norms_and_experts_are_refused(case, tmp_path):
    save_family(tmp_path, case)
    decoder = load_shape(str(tmp_path))[1]
    with pytest.raises(InputError, match=f"slicegpt does not take models of the family {decoder.family}") as caught:
        check_sliceable(decoder)
    assert "Leave slicegpt out" in caught.value.remedy


def test_activations_that_are_not_finite_are_refused_with_their_layer():
    reference = llama()
    reference.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(NumericalError, match=r"layer 1 \(mlp\)"):
        dict(slice_model(as_model(reference), 20, ids()))
