"""The nodes of a graph while it grows, and the masks that all its layers read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.engine.onnx.nodes import Nodes, additive_masks, head_width, lengths, masked
from tests.support.graph_nodes import run


@settings(deadline=None, max_examples=30)
@given(
    past=st.integers(0, 4),
    new=st.integers(1, 4),
    padding=st.integers(0, 5),
    windows=st.lists(st.none() | st.integers(1, 6), min_size=1, max_size=3, unique=True),
)
def test_a_mask_shows_a_query_the_real_keys_of_its_window(past: int, new: int, padding: int, windows: list) -> None:
    nodes = Nodes("fp32")
    names = additive_masks(nodes, tuple(windows))
    total = past + new
    mask = np.ones((2, total), np.int64)
    mask[1, : min(padding, total)] = 0
    inputs = {"input_ids": np.zeros((2, new), np.int64), "attention_mask": mask}
    found = run(nodes, [names[f"mask.{window}"] for window in windows], inputs)
    for window, values in zip(windows, found, strict=True):
        assert values.shape == (2, 1, new, total)
        for row in range(2):
            for step in range(new):
                query = past + step
                seen = [
                    mask[row, key] == 1 and key <= query and (window is None or query - key < window)
                    for key in range(total)
                ]
                assert (values[row, 0, step] == 0).tolist() == seen


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("fp32", np.float32)])
def test_a_masked_score_stays_a_number_and_far_below_any_other(precision: str, dtype: type) -> None:
    nodes = Nodes(precision)
    score = np.array([np.finfo(dtype).min / 2, 100.0], dtype)
    nodes.add("Add", "sum", "score", masked(nodes))
    (found,) = run(nodes, ["sum"], {"score": score})
    assert np.isfinite(found).all()
    assert (found < -1e4).all()


def test_lengths_are_read_from_the_inputs() -> None:
    nodes = Nodes("fp32")
    names = lengths(nodes)
    inputs = {"input_ids": np.zeros((3, 2), np.int64), "attention_mask": np.ones((3, 7), np.int64)}
    assert [value.tolist() for value in run(nodes, list(names.values()), inputs)] == [[3], [2], [7]]
    assert list(names) == ["batch", "sequence", "total"]


def test_constants_are_held_once_and_casts_are_left_out_in_fp32() -> None:
    nodes = Nodes("fp32")
    assert nodes.sizes(0, -1) == nodes.sizes(0, -1) == "sizes.0_-1"
    nodes.number("half", 0.5)
    nodes.number("half", 0.5)
    assert set(nodes.constants) == {"sizes.0_-1", "half"}
    assert nodes.to_fp32("up", nodes.from_fp32("down", "x")) == "x"
    assert nodes.nodes == []
    half = Nodes("fp16")
    result = half.to_fp32("up", half.from_fp32("down", "x"))
    (found,) = run(half, [result], {"x": np.array([1 + 2**-12, 2.0], np.float32)})
    assert (result, found.dtype, found.tolist()) == ("up", np.float32, [1.0, 2.0])  # rounded on its way


def test_heads_are_filled_up_for_onnx_runtime_alone() -> None:
    assert [head_width(size, "onnxruntime") for size in (6, 8, 20, 64)] == [8, 8, 24, 64]
    assert [head_width(size, dialect) for dialect in ("opset23", "primitive") for size in (6, 20)] == [6, 20] * 2
