import torch
import torch.nn.functional as F

from edgeprune.model.backward import drawn, token_gradients
from edgeprune.model.load import load_model
from tests.support.families import save_family
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
    ours = token_gradients(as_model(reference), ids, seed=3).modules
    expected = reference_gradients(reference, ids, seed=3)
    for mine, theirs in zip(ours, expected, strict=True):
        for kind in ("attention", "mlp"):
            assert mine[kind].shape == ids.shape
            assert torch.allclose(mine[kind], theirs[kind], rtol=1e-3, atol=1e-9)


def test_an_untied_head_and_a_callback_for_each_layer_both_ways():
    reference = llama(tie_word_embeddings=False)
    ids = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))
    calls = []
    ours = token_gradients(as_model(reference), ids, 0, lambda: calls.append(1)).modules
    assert len(calls) == 4
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
    ours = token_gradients(load_model(str(tmp_path)), ids, seed=3).modules
    for mine, state in zip(ours, states, strict=True):
        assert torch.allclose(mine["mlp"], state.grad.square().sum(-1), rtol=1e-3, atol=1e-9)


def test_labels_are_drawn_by_their_shares():
    shares = torch.tensor([[0.0, 0.2, 0.5, 0.0, 0.3]])
    labels = drawn(shares.expand(20000, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(labels, minlength=5) / len(labels)
    assert counts[0] == counts[3] == 0
    assert torch.allclose(counts, shares[0], atol=0.015)
