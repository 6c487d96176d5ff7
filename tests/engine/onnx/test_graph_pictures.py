"""Image generators in every dialect: against a closed form, from the class token on and with a filled cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeprune.engine.onnx.graph import write_graphs
from edgeprune.model.decoder import Decoder
from tests.support.graph_models import VARIANTS, Sample, run_steps
from tests.support.graph_pictures import closed_form, drawn, imagegpt, llamagen, random_weights

WALKS = ([1] * 16, [16], [1, 5, 1, 1, 8])


def check(decoder: Decoder, folder: Path, batch: Sample | None = None) -> None:
    """Every variant, drawn token by token, at once and in parts, gives the closed form's logits."""
    weights, batch = random_weights(decoder), drawn(decoder) if batch is None else batch
    expected = closed_form(decoder, weights, batch)
    real = batch.mask > 0
    for variant, path in write_graphs(decoder, weights, folder, "fp32", VARIANTS).graphs.items():
        for walk in WALKS:
            places = np.arange(16) if variant.logits == "all" else np.cumsum(walk) - 1
            for capacity in (None, 16) if variant.dialect == "onnxruntime" else (None,):
                found = np.concatenate(run_steps(path, batch, walk, capacity), axis=1)
                difference = np.abs(found - expected[:, places])[real[:, places]]
                assert difference.max() < 1e-5 * np.abs(expected).max(), (variant, walk, capacity)


@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "turned"),
    [(6, 2, 16, 16), (3, 3, 20, 20), (4, 1, 100, 100), (4, 2, 24, 16), (2, 1, 48, 16), (2, 2, 32, 12)],
)
def test_positions_on_a_grid_behind_a_class(
    heads: int, groups: int, head_dim: int, turned: int, tmp_path: Path
) -> None:
    check(llamagen(heads, groups, head_dim, turned), tmp_path)


@pytest.mark.parametrize("decoder", [llamagen(head_dim=20), llamagen(head_dim=16), imagegpt()])
def test_fp16_is_near_the_closed_form(decoder: Decoder, tmp_path: Path) -> None:
    """11 bits; the angles are fp32."""
    weights, batch = random_weights(decoder), drawn(decoder)
    expected = closed_form(decoder, weights, batch)
    for variant, path in write_graphs(decoder, weights, tmp_path, "fp16", VARIANTS).graphs.items():
        found = np.concatenate(run_steps(path, batch, [1] * 16), axis=1)
        assert found.dtype == np.float16
        assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max(), variant


def test_learned_positions_behind_a_start_token(tmp_path: Path) -> None:
    check(imagegpt(), tmp_path)
