"""Every family: transformers' logits from our walk and from every graph, dense, pruned, saved and compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.engine.base import Workload
from edgeprune.engine.graph import Spelling, write_graphs
from edgeprune.model.families import FAMILIES
from tests import parity
from tests.families import CASES

LIMIT = 1e-5


def test_every_family_has_a_case_and_a_row_in_the_docs() -> None:
    assert {case.partition(",")[0] for case in CASES} == set(FAMILIES)
    page = parity.PAGE.read_text(encoding="utf-8")
    assert all(f"| {name} |" in page for name in FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_dense(case: str, tmp_path: Path) -> None:
    dense = parity.dense(tmp_path / "model", case)
    wanted = parity.reference(dense.reference)
    # a model that ignores its input would show nothing
    assert np.median(np.ptp(wanted, axis=1)) > 0.1 * np.abs(wanted).max()
    model = dense.model
    errors = parity.graph_errors(wanted, model.decoder, model.weights, tmp_path / "graphs")
    assert max(errors.values()) < LIMIT, errors
    ids = parity.calibration()[:2, :40]
    with torch.inference_mode():
        theirs = dense.reference(ids).logits[:, :-1].numpy()
    assert parity.distance(parity.torch_logits(model.decoder, model.weights, ids), theirs) < LIMIT


@pytest.mark.parametrize("case", CASES)
def test_pruned(case: str, tmp_path: Path) -> None:
    model = parity.dense(tmp_path / "model", case).model
    decoder, weights = parity.pruned(model, parity.target_of(model.decoder))
    loaded = parity.as_transformers(model, decoder, weights, tmp_path / "pruned")
    errors = parity.graph_errors(parity.reference(loaded), decoder, weights, tmp_path / "graphs")
    assert max(errors.values()) < LIMIT, errors
    assert parity.uneven_error(model, tmp_path / "uneven") < LIMIT


@pytest.mark.parametrize("case", [case for case in CASES if "," not in case or "rotary" in case])
def test_compiled_in_fp16(case: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    from edgeprune.engine.tensorrt import compile_plan

    model = parity.dense(tmp_path / "model", case).model
    decoder, weights = parity.pruned(model, parity.target_of(model.decoder))
    spelling = Spelling("opset23", "last")
    graph = write_graphs(decoder, weights, tmp_path / "graphs", "fp16", [spelling]).graphs[spelling]
    result = compile_plan(graph, tmp_path / "plan", Workload(1, 16, 64), 86, "tensorrt-rtx")
    assert result.weights_bytes > 0
