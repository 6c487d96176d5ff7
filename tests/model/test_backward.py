import pytest
import torch
import torch.nn.functional as F

from edgeprune.model import backward
from edgeprune.model.attention import Tables
from edgeprune.model.backward import drawn, token_gradients
from edgeprune.model.forward import (
    add_module,
    embed,
    entering,
    has_experts,
    layer_weights,
    module_inputs,
    module_raw,
    modules_of,
)
from edgeprune.model.load import load_model
from tests.support.families import save_family
from tests.support.gradients import module_energies
from tests.support.tiny import as_model, llama


def reference_gradients(reference, ids, seed):
    """By torch's autograd through transformers' whole model, with the same drawn labels."""
    states = []

    def keep(_module, _inputs, output):
        state = output[0] if isinstance(output, tuple) else output
        state.retain_grad()
        states.append(state)

    layers = reference.model.layers
    handles = [layer.register_forward_hook(keep) for layer in layers]
    mids = []
    for layer in layers:
        handles.append(
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _module, inputs: (inputs[0].retain_grad(), mids.append(inputs[0]))[0]
            )
        )
    logits = reference(ids).logits
    generator = torch.Generator().manual_seed(seed)
    labels = drawn(F.softmax(logits.detach().flatten(0, 1), -1), generator)
    F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return [
        {"attention": mid.grad.square().sum(-1), "mlp": state.grad.square().sum(-1)}
        for mid, state in zip(mids, states, strict=True)
    ]


def test_gradients_are_those_of_the_whole_model():
    reference = llama()
    ids = torch.randint(0, 101, (5, 20), generator=torch.Generator().manual_seed(0))
    ours = module_energies(as_model(reference), ids, seed=3)
    expected = reference_gradients(reference, ids, seed=3)
    for mine, theirs in zip(ours, expected, strict=True):
        for kind in ("attention", "mlp"):
            assert mine[kind].shape == ids.shape
            assert torch.allclose(mine[kind], theirs[kind], rtol=1e-3, atol=1e-9)


def test_an_untied_head_and_a_callback_for_each_layer_both_ways():
    reference = llama(tie_word_embeddings=False)
    ids = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))
    calls, order = [], []
    token_gradients(
        as_model(reference), ids, 0, lambda module: order.append((module.index, module.kind)), lambda: calls.append(1)
    )
    assert len(calls) == 4
    assert order == [(1, "mlp"), (1, "attention"), (0, "mlp"), (0, "attention")]
    ours = module_energies(as_model(reference), ids)
    expected = reference_gradients(reference, ids, 0)
    assert torch.allclose(ours[1]["mlp"], expected[1]["mlp"], rtol=1e-3, atol=1e-9)


def test_gradients_of_pictures_are_those_of_the_original(tmp_path):
    """Behind its class, whose queries and keys are zeros, every code is drawn from the codes alone."""
    original = save_family(tmp_path, "llamagen, grouped, head_dim 20")
    ids = torch.randint(0, 257, (3, 64), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 257 + torch.tensor([0, 5, 10])
    states = []
    for layer in original.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: (output.retain_grad(), states.append(output))[1])
    logits = original(ids).logits.flatten(0, 1)
    labels = drawn(F.softmax(logits.detach(), -1), torch.Generator().manual_seed(3))
    F.cross_entropy(logits, labels, reduction="sum").backward()
    ours = module_energies(load_model(str(tmp_path)), ids, seed=3)
    for mine, state in zip(ours, states, strict=True):
        assert torch.allclose(mine["mlp"], state.grad.square().sum(-1), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt_neox", "mixtral"])
def test_modules_are_handed_out_with_what_they_read_and_give(family, tmp_path, monkeypatch):
    """In chunks of samples, with norms behind the modules, in parallel, and with experts."""
    monkeypatch.setattr(backward, "CHUNK_TOKENS", 24)
    save_family(tmp_path, family)
    model = load_model(str(tmp_path))
    decoder = model.decoder
    ids = torch.randint(0, 100, (5, 12), generator=torch.Generator().manual_seed(0))
    found = []
    ends = token_gradients(model, ids, 0, found.append)
    hidden, tables = embed(model, ids), Tables(decoder, ids.shape[1])
    modules = iter(reversed(found))
    for index in range(len(decoder.layers)):
        weights = layer_weights(model, index)
        source = entering(decoder, hidden)
        for kind in modules_of(decoder, index):
            module = next(modules)
            assert (module.index, module.kind) == (index, kind)
            assert torch.allclose(module.source, source, atol=1e-5)
            assert torch.allclose(module.raw, module_raw(decoder, index, kind, weights, source, tables), atol=1e-5)
            if has_experts(decoder, index, kind):
                assert module.inputs is None
            else:
                expected = module_inputs(decoder, index, kind, weights, source, tables)
                assert torch.allclose(module.inputs, expected, atol=1e-5)
            add_module(decoder, index, kind, weights, hidden, tables, source=source)
    assert torch.allclose(ends.last, hidden, atol=1e-5)
    assert ends.embedding_energy.shape == ids.shape


def test_labels_are_drawn_by_their_shares():
    shares = torch.tensor([[0.0, 0.2, 0.5, 0.0, 0.3]])
    labels = drawn(shares.expand(20000, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(labels, minlength=5) / len(labels)
    assert counts[0] == counts[3] == 0
    assert torch.allclose(counts, shares[0], atol=0.015)
