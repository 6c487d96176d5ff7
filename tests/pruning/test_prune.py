import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import NumericalError
from edgeprune.model.attention import Tables
from edgeprune.model.decoder import ratio
from edgeprune.model.forward import add_module, embed, layer_weights, module_inputs, modules_of, token_losses
from edgeprune.model.model import Model
from edgeprune.pruning.methods import METHODS, Method, Recovery
from edgeprune.pruning.prune import prune, result_of, sample_weights
from edgeprune.pruning.score import Projection, magnitude
from edgeprune.pruning.select import top_units
from tests.support.tiny import as_model, llama, rebuilt

DEFAULT = METHODS["default"]


def ids(samples: int = 8, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 101, (samples, length), generator=torch.Generator().manual_seed(seed))


def pruned(model, target, method=DEFAULT, chunk=1024, records=None):
    on_module = (records if records is not None else []).append
    return dict(prune(model, target, ids(), method, 0, on_module, chunk=chunk))


@pytest.mark.parametrize(("groups", "heads", "channels"), [(2, 2, 40), (1, 3, 64), (1, 1, 8), (2, 3, 48)])
def test_the_result_is_a_whole_model_of_the_target_widths(groups, heads, channels):
    reference = llama()
    model = as_model(reference)
    target = model.decoder.with_widths(groups, heads, channels)
    weights = pruned(model, target)
    assert list(weights) == list(target.shapes())
    logits = rebuilt(target, weights, reference)(ids()).logits
    assert torch.isfinite(logits).all()
    assert 0 < ratio(target, model.decoder) < 1


def test_nothing_pruned_changes_nothing():
    model = as_model(llama())
    weights = pruned(model, model.decoder)
    assert all(torch.equal(weights[name], model.weights[name]) for name in model.decoder.shapes())


def test_removing_what_contributes_nothing_keeps_the_logits():
    """Channels and a head whose output weights are zero: the pruned model gives the same logits."""
    reference = llama()
    with torch.no_grad():
        for layer in reference.model.layers:
            layer.mlp.down_proj.weight[:, 5:37] = 0
            layer.self_attn.o_proj.weight[:, 8:16] = 0  # query head 1 of group 0
            layer.self_attn.o_proj.weight[:, 40:48] = 0  # query head 2 of group 1
    model = as_model(reference)
    target = model.decoder.with_widths(2, 2, 32)
    small = rebuilt(target, pruned(model, target), reference)
    expected, obtained = reference(ids()).logits, small(ids()).logits
    assert (expected - obtained).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("key_value_heads", "cuts"),
    [(4, [(4, 2), (3, 2), (2, 3), (1, 1)]), (12, [(9, 1), (1, 1)]), (1, [(1, 7), (1, 1)])],
    ids=["grouped-query", "multi-head", "multi-query"],
)
def test_a_head_never_reads_another_groups_keys(key_value_heads, cuts):
    """Every kept query head is found with the keys and values of its own group in the dense model."""
    reference = llama(num_attention_heads=12, num_key_value_heads=key_value_heads, head_dim=4)
    model = as_model(reference)
    for groups, heads in cuts:
        weights = pruned(model, model.decoder.with_widths(groups, heads, 64))
        for index in range(2):
            dense = {n: model.weights[f"layers.{index}.attention.{n}"].view(-1, 4, 48) for n in "qkv"}
            small = {n: weights[f"layers.{index}.attention.{n}"].view(-1, 4, 48) for n in "qkv"}
            for head, query in enumerate(small["q"]):
                (old_head,) = [h for h, q in enumerate(dense["q"]) if torch.equal(q, query)]
                for name in "kv":
                    assert torch.equal(small[name][head // heads], dense[name][old_head * key_value_heads // 12])


def test_compensation_lowers_the_error_of_the_whole_model():
    reference = llama(initializer_range=0.1)
    model = as_model(reference)
    target = model.decoder.with_widths(2, 2, 40)
    expected = reference(ids(seed=9)).logits
    errors = {}
    for name, method in {"with": DEFAULT, "without": Method(DEFAULT.score, Recovery.NONE)}.items():
        small = rebuilt(target, pruned(model, target, method), reference)
        errors[name] = float((small(ids(seed=9)).logits - expected).detach().square().mean())
    assert errors["with"] < 0.6 * errors["without"]


def test_records_tell_what_was_done_to_each_module():
    records = []
    model = as_model(llama())
    pruned(model, model.decoder.with_widths(2, 2, 40), records=records)
    assert [(r.layer, r.kind, r.kept, r.of) for r in records] == [
        (0, "attention", 32, 48),
        (0, "mlp", 40, 64),
        (1, "attention", 32, 48),
        (1, "mlp", 40, 64),
    ]
    assert all(record.error_after <= record.error_before for record in records)


def test_results_do_not_depend_on_the_chunk_and_are_equal_for_a_seed():
    model = as_model(llama())
    target = model.decoder.with_widths(2, 2, 40)
    first, again, chunked = pruned(model, target), pruned(model, target), pruned(model, target, chunk=72)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert (weight - chunked[name]).abs().max() <= 1e-5 * weight.abs().max()


def test_magnitude_cuts_without_touching_the_kept_weights():
    model = as_model(llama())
    weights = pruned(model, model.decoder.with_widths(2, 3, 40), METHODS["magnitude"])
    down = model.weights["layers.1.mlp.down"]
    projection = Projection(down, torch.eye(64), torch.zeros(1, 1, 64), torch.Generator())
    kept = top_units(magnitude(projection, 1, 40), 40)
    assert torch.equal(weights["layers.1.mlp.down"], down[:, kept])
    assert torch.equal(weights["layers.1.mlp.gate"], model.weights["layers.1.mlp.gate"][kept])


def test_activations_that_are_not_finite_name_their_layer():
    reference = llama()
    with torch.no_grad():
        reference.model.layers[1].mlp.up_proj.weight[3] = math.inf
    model = as_model(reference)
    with pytest.raises(NumericalError, match=r"layer 1 \(mlp\)"):
        pruned(model, model.decoder.with_widths(2, 2, 40))


def test_the_walk_reads_each_weight_once():
    reads: list[str] = []

    class Counting(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    model = as_model(llama())
    counting = Model(model.name, model.directory, model.decoder, Counting(model.weights), model.fingerprint)
    pruned(counting, model.decoder.with_widths(2, 2, 40))
    layers = [name for name in reads if name.startswith("layers.")]
    assert len(layers) == len(set(layers))


def test_what_was_handed_out_is_not_held_while_the_next_layer_is_made():
    model, handed, held = as_model(llama()), [], []

    class Fresh(dict):
        def __getitem__(self, name):
            if name.startswith("layers.") and handed[-1]() is not None:
                held.append(name)
            return super().__getitem__(name).clone()

    fresh = Model(model.name, model.directory, model.decoder, Fresh(model.weights), model.fingerprint)
    for _, weight in prune(fresh, model.decoder.with_widths(2, 2, 40), ids(), DEFAULT, 0):
        handed.append(weakref.ref(weight))
        del weight
    assert held == []


def test_layers_and_modules_can_go_as_a_whole():
    """The result is the dense model without them, where nothing else is cut and nothing compensates."""
    reference = llama(num_hidden_layers=4)
    model = as_model(reference)
    full = (2, 3, 64)
    target = model.decoder.with_layer_widths([full, (0, 1, 64), (0, 1, 0), (2, 3, 0)])
    method = Method(magnitude, Recovery.NONE)
    weights = pruned(model, target, method)
    result = result_of(target, method)
    assert len(result.layers) == 3
    assert list(weights) == list(result.shapes())

    reference.model.layers[1].self_attn.o_proj.weight.data.zero_()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        reference.model.layers[2].get_submodule(name).weight.data.zero_()
    reference.model.layers[3].mlp.down_proj.weight.data.zero_()
    expected = reference(ids(), labels=ids()).loss
    assert float(token_losses(result, weights.items(), ids()).mean()) == pytest.approx(float(expected), rel=1e-5)


def test_what_stays_makes_up_for_a_layer_that_went():
    reference = llama(num_hidden_layers=4, initializer_range=0.1)
    model = as_model(reference)
    target = model.decoder.with_layer_widths([(2, 3, 64), (0, 1, 0), (2, 3, 64), (2, 3, 64)])
    states = {}
    for name, method in {"with": DEFAULT, "without": Method(DEFAULT.score, Recovery.NONE)}.items():
        records = []
        states[name] = dict(prune(model, target, ids(32, 48), method, 0, records.append))
        if name == "with":
            assert [r.kept for r in records if r.layer == 1] == [0, 0]
            assert any(r.damping is not None for r in records if r.layer == 2)
    result = result_of(target, DEFAULT)
    fresh = ids(32, 48, seed=9)
    dense = hidden_after(model.decoder, model.weights, fresh)
    errors = {
        name: float((hidden_after(result, weights, fresh) - dense).square().sum()) for name, weights in states.items()
    }
    assert errors["with"] < 0.9 * errors["without"]


@given(users=st.integers(1, 70), generated=st.integers(0, 70))
def test_both_texts_weigh_the_same_together(users, generated):
    weights = sample_weights(users, generated).flatten()
    assert (weights[:users] == 1).all()
    assert float(weights[users:].sum()) == pytest.approx(users if generated else 0)


def test_generated_samples_are_solved_on_like_the_users():
    """As many as the user's: as if they were the user's; methods that do not compensate never see them."""
    model = as_model(llama(initializer_range=0.1))
    target = model.decoder.with_widths(1, 2, 40)
    own = ids(8, 24, seed=7)
    for method, seen in ((DEFAULT, torch.cat([ids(), own])), (METHODS["wanda"], ids())):
        beside = dict(prune(model, target, ids(), method, 0, generated=own))
        assert all(torch.equal(value, beside[name]) for name, value in prune(model, target, seen, method, 0))


def hidden_after(decoder, weights, ids_):
    hidden = torch.nn.functional.embedding(ids_, weights["embedding"])
    tables = Tables(decoder, ids_.shape[1])
    for index in range(len(decoder.layers)):
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): weights[name] for name in decoder.layer_shapes(index)}
        for kind in modules_of(decoder, index):
            add_module(decoder, index, kind, own, hidden, tables)
    return hidden


def test_flap_adds_the_mean_of_what_it_removes_as_a_bias():
    model = as_model(llama(num_hidden_layers=1))
    target = model.decoder.with_widths(2, 3, 40)
    weights = pruned(model, target, METHODS["flap"])
    result = result_of(target, METHODS["flap"])
    assert list(weights) == list(result.shapes())
    own = layer_weights(model, 0)
    hidden = embed(model, ids())
    tables = Tables(model.decoder, 24)
    add_module(model.decoder, 0, "attention", own, hidden, tables)
    inputs = module_inputs(model.decoder, 0, "mlp", own, hidden, tables)
    kept = [j for j in range(64) if any(torch.equal(own["mlp.gate"][j], row) for row in weights["layers.0.mlp.gate"])]
    removed = [j for j in range(64) if j not in kept]
    expected = own["mlp.down"][:, removed] @ inputs.mean(dim=(0, 1))[removed]
    assert torch.allclose(weights["layers.0.mlp.down_bias"], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(weights["layers.0.attention.o_bias"], torch.zeros(48))
    losses = token_losses(result, weights.items(), ids())
    reference = llama(num_hidden_layers=1)
    mlp = reference.model.layers[0].mlp
    mlp.down_proj.weight.data[:, removed] = 0
    mlp.down_proj.bias = torch.nn.Parameter(expected)
    assert float(losses.mean()) == pytest.approx(float(reference(ids(), labels=ids()).loss), rel=1e-5)
