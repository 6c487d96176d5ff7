"""The page of bytes says what was measured; its bench rounds as it says, and finds mixtures that fit."""

import pytest
import torch
from safetensors.torch import save_file

from edgeprune.model.attention import Tables
from edgeprune.model.forward import (
    OUTPUT,
    embed,
    layer_weights,
    module_inputs,
    module_states,
    token_logits,
    weight_stream,
)
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.grids import choose_grid
from tests.support import DOCS
from tests.support.tiny import as_model, llama
from tools.autoround import on_its_grid
from tools.bytes_table import (
    AUTOROUND,
    BOUNDS,
    GPTQ,
    LLAMA,
    OURS,
    SYMMETRIC,
    TEXTS,
    WRITERS,
    BytesBench,
    BytesCell,
    by_ggml,
    by_gptq,
    bytes_cells,
    matrices_of,
    rounded_one_by_one,
)
from tools.ggml_files import RECIPES, rounded_by_ggml
from tools.quality import fill, read_cells


class SmallBench(BytesBench):
    """The bench on a tiny model of rows that blocks of 32 divide, and of 256 do not."""

    def __init__(self, autoround=None) -> None:
        self.model = as_model(
            llama(hidden_size=64, num_attention_heads=4, head_dim=32, intermediate_size=128, tie_word_embeddings=False)
        )
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(101, (8, 32), generator=generator)
        self.texts, self.autoround = TEXTS, autoround
        self.excerpts = torch.randint(101, (6, 16), generator=generator)


@pytest.fixture(scope="module")
def bench():
    return SmallBench()


def test_the_tables_are_those_of_the_figures_beside_them():
    page = (DOCS / "bytes.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in page for name in WRITERS)
    assert fill(page, read_cells(DOCS / "bytes.jsonl")) == page


def test_every_cell_has_a_key_of_its_own_and_every_bound_is_of_cells():
    keys = [cell.key for cell in bytes_cells(with_autoround=True)]
    assert len(set(keys)) == len(keys)
    assert {cell.key for bound in BOUNDS for cell in bound[1:3]} <= set(keys)
    assert set(keys) - {cell.key for cell in bytes_cells(with_autoround=False)} == {BytesCell(AUTOROUND, SYMMETRIC).key}


def test_a_walk_that_rounds_nothing_gives_the_dense_model(bench):
    weights = dict(rounded_one_by_one(bench.model, bench.ids, lambda index, weights, inputs: weights))
    assert list(weights) == list(bench.model.decoder.shapes())
    assert all(torch.equal(weight, bench.model.weights[name]) for name, weight in weights.items())


def dense_reads(bench, index):
    """What the matrices of a layer read in the dense model, (n, in_features) each, by their names."""
    decoder, reads = bench.model.decoder, {}
    hidden, tables = embed(bench.model, bench.ids), Tables(decoder, bench.ids.shape[1])
    for layer in range(index + 1):
        for kind in ("attention", "mlp"):
            weights = layer_weights(bench.model, layer, kind)
            states = module_states(decoder, kind, weights, hidden)
            inputs = module_inputs(decoder, layer, kind, weights, hidden, tables)
            for name, weight in weights.items():
                if weight.dim() == 2:
                    reads[name] = (inputs if name == OUTPUT[kind] else states).flatten(0, 1)
            hidden = hidden + inputs @ weights[OUTPUT[kind]].T
    return reads


def test_llama_cpp_weighs_each_matrix_by_what_it_reads(bench):
    types = [dict.fromkeys(matrices_of(bench.model.decoder), "Q4_0")] * 2
    weights = dict(rounded_one_by_one(bench.model, bench.ids, by_ggml(types)))
    for name, inputs in dense_reads(bench, 1).items():
        dense = bench.model.weights[f"layers.1.{name}"]
        expected = rounded_by_ggml(dense, inputs.square().mean(dim=0), "Q4_0")
        torch.testing.assert_close(weights[f"layers.1.{name}"], expected, rtol=0, atol=1e-3)


def test_plain_gptq_leaves_less_of_a_matrix_output_than_rounding_does(bench):
    form = WEIGHT_FORMATS[SYMMETRIC]
    weights = dict(rounded_one_by_one(bench.model, bench.ids, by_gptq(form)))
    for name, inputs in dense_reads(bench, 1).items():
        dense, by_gptq_ = bench.model.weights[f"layers.1.{name}"], weights[f"layers.1.{name}"]
        nearest = choose_grid(dense, inputs.square().sum(dim=0), form).nearest(dense).dequantised()
        assert (inputs @ (by_gptq_ - dense).T).norm() < (inputs @ (nearest - dense).T).norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "bits"),
    [
        (BytesCell(LLAMA, "q4_k"), 4.5),
        (BytesCell(GPTQ, "q4_k"), 4.5),
        (BytesCell(OURS, "q4_k"), 4.5),
        (BytesCell(OURS, SYMMETRIC), 4.25),
    ],
    ids=lambda value: f"{value.by}-{value.form}" if isinstance(value, BytesCell) else "",
)
def test_a_line_has_the_bits_and_the_losses_of_its_model(bench, cell, bits):
    row = bench.run(cell)
    assert row["bits"] == bits
    _, stream = bench._rounded(cell)
    logits = token_logits(bench.model.decoder, stream, bench.excerpts).log_softmax(-1)
    expected = token_logits(bench.model.decoder, weight_stream(bench.model), bench.excerpts).log_softmax(-1)
    divergence = (expected.exp() * (expected - logits)).sum(-1).mean(-1)  # (excerpts,)
    torch.testing.assert_close(torch.tensor(row["kl_of"][TEXTS[0]]), divergence[:2], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_mixture_takes_at_most_the_bytes_of_the_recipe(bench, name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (theirs, _), (ours, _) = (bench._rounded(BytesCell(by, name)) for by in (LLAMA, OURS))
    assert 0.8 * theirs < ours <= theirs


def test_autorounds_weights_come_from_its_file(tmp_path):
    names = [
        name for name, shape in SmallBench().model.decoder.shapes().items() if "layers" in name and len(shape) == 2
    ]
    weights = {name: torch.full(SmallBench().model.decoder.shapes()[name], 0.25) for name in names}
    save_file(weights, tmp_path / "file", {"seconds": "12.5", "iterations": "200"})
    bench = SmallBench(tmp_path / "file")
    row = bench.run(BytesCell(AUTOROUND, SYMMETRIC))
    assert row["seconds"] == 12.5
    _, stream = bench._rounded(BytesCell(AUTOROUND, SYMMETRIC))
    for name, weight in stream:
        assert torch.equal(weight, weights.get(name, bench.model.weights[name]))


def test_weights_of_autoround_get_the_exact_values_of_their_codes():
    codes = torch.randint(-8, 8, (4, 128), generator=torch.Generator().manual_seed(0)).float()
    scales = torch.tensor([[0.011, 0.3], [0.02, 0.04], [1.0, 0.5], [0.07, 0.013]]).half()
    exact = (codes.unflatten(1, (2, 64)) * scales.float()[..., None]).flatten(1)
    assert torch.equal(on_its_grid(exact.bfloat16(), scales), exact)
    with pytest.raises(ValueError, match="not on its grid"):
        on_its_grid(exact + 0.3 * scales.float().repeat_interleave(64, dim=1), scales)
