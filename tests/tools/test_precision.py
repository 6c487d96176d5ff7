"""The page of weight formats says what was measured; its bench knows bytes, choices and divergences."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgeprune.engine.work import layer_bytes
from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.model.quantised import as_float
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.search.module_costs import Widths
from edgeprune.search.solve import Problem
from edgeprune.search.widths import RoundingLosses, Sensitivities, dense_widths
from tests.support import DOCS
from tests.support.tiny import as_model, llama
from tools.precision import (
    MIXED,
    OWN,
    TEXTS,
    WRITERS,
    PrecisionBench,
    PrecisionCell,
    layer_costs,
    precision_cells,
    rounded_stream,
)
from tools.quality import fill, read_cells

FORMATS = (None, *(WEIGHT_FORMATS[name] for name in ("int8", "int4-64")))
SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "intermediate_size": 128,
    "tie_word_embeddings": False,
}


class SmallBench(PrecisionBench):
    """The bench on a tiny model, with sensitivities of which int4 costs more the later the module is."""

    def __init__(self) -> None:
        self.model = as_model(llama(**SMALL))
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(101, (4, 32), generator=generator)
        self.texts, self.excerpts = (*TEXTS, OWN), torch.randint(101, (6, 16), generator=generator)

    @property
    def problem(self) -> Problem:
        dense = dense_widths(self.model.decoder)
        groups, heads, channels = dense
        attention, mlp = np.ones((2, groups + 1, heads)), np.ones((2, channels + 1))
        attention[:, -1, -1] = mlp[:, -1] = 0.0
        rising = np.array([0.1, 0.2])
        roundings = {
            form.name: RoundingLosses(share * rising, 2 * share * rising, 0.0, 0.01)
            for form, share in zip(FORMATS[1:], (0.1, 1.0), strict=True)
        }
        costs = {"bytes": layer_costs(self.model.decoder, FORMATS, 64)}
        sensitivities = Sensitivities(attention, mlp, roundings=roundings)
        return Problem(dense, sensitivities, costs, 64, formats=FORMATS, tied=False)


@pytest.fixture(scope="module")
def bench():
    return SmallBench()


def test_the_tables_are_those_of_the_figures_beside_them():
    page = (DOCS / "precision.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in page for name in WRITERS)
    assert fill(page, read_cells(DOCS / "precision.jsonl")) == page


def test_every_cell_has_a_key_of_its_own():
    cells = list(precision_cells())
    assert len({cell.key for cell in cells}) == len(cells)


def test_the_costs_are_the_bytes_of_the_layers(bench):
    dense = bench.model.decoder
    costs = layer_costs(dense, FORMATS, 64)
    layers = (Widths(2, 2, 128), Widths(1, 2, 64))
    formats = ((2, 1), (0, 2))
    pairs = [tuple(FORMATS[place] for place in pair) for pair in formats]
    target = dense.with_layer_widths(layers).with_formats(pairs, None, None)
    assert costs.total(layers, 0, formats) == layer_bytes(target, 2)
    assert costs.attention[2, 1, 0] == np.inf  # one head of 32 is no group of 64


def test_the_opposite_choice_changes_places_and_keeps_the_bytes(bench):
    half = PrecisionCell("search", ("int8", "int4-64"))
    chosen, opposite = (bench.allocation(replace(half, way=way)) for way in ("search", "opposite"))
    dense = dense_widths(bench.model.decoder)
    assert chosen.layers == opposite.layers == (dense, dense)
    names = [[form.name for pair in one.formats for form in pair] for one in (chosen, opposite)]
    assert all({one, other} == {"int8", "int4-64"} for one, other in zip(*names, strict=True))
    assert chosen.loss < opposite.loss
    both = sum(bench.problem.estimate(one)["bytes"] for one in (chosen, opposite))
    whole = [layer_bytes(bench.model.decoder.with_format(form), 2) for form in FORMATS[1:]]
    assert both == sum(whole)
    assert bench.problem.estimate(chosen)["bytes"] <= sum(whole) / 2


def test_a_share_is_kept(bench):
    cell = PrecisionCell("search", MIXED, 0.6, cuts=True)
    row = bench.run(cell)
    assert row["bytes"] <= 0.6
    assert row["predicted"] == bench.allocation(cell).loss > 0


def test_rises_and_divergences_are_those_of_the_logits(bench):
    """Rounded to nearest: the weights are known without the walk."""
    row = bench.run(PrecisionCell("nearest", ("int4-64",)))
    dense = bench.model
    rounded = replace(dense, weights=dict(dense.weights), quantised={})
    for name, weight in rounded_stream(dense, dense.decoder.with_format(FORMATS[2], FORMATS[1])):
        rounded.weights[name] = as_float(weight)
    assert not torch.equal(rounded.weights["layers.0.mlp.down"], dense.weights["layers.0.mlp.down"])
    ids = bench.excerpts[:2]
    expected, logits = (token_logits(m.decoder, weight_stream(m), ids).log_softmax(-1) for m in (dense, rounded))
    divergence = F.kl_div(logits, expected, reduction="none", log_target=True).sum(-1).mean(-1)  # (excerpts,)
    np.testing.assert_allclose(row["kl_of"][TEXTS[0]], divergence.numpy(), atol=2e-6)
    labels = ids[:, 1:, None]
    rise = float((expected - logits).gather(-1, labels).mean())
    assert row["kl"][TEXTS[0]][0] == pytest.approx(float(divergence.mean()), abs=2e-6)
    assert row["rise"][TEXTS[0]][0] == pytest.approx(rise, rel=1e-3, abs=1e-5)


def test_the_walk_and_rounding_to_nearest_are_two_models_of_the_same_bytes(bench):
    joined, nearest = (bench.run(PrecisionCell(way, ("int4-64",))) for way in ("all", "nearest"))
    assert joined["bytes"] == nearest["bytes"] < 0.3
    assert joined["predicted"] > 0
    assert nearest["predicted"] is None
    assert joined["kl_of"] != nearest["kl_of"]
