"""deployment.json: limits in absolute figures with the user's words, and what each rung counts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from edgeprune.bundle.deployment import deployment
from edgeprune.engine.estimate import counted, workspace_bytes
from edgeprune.ondevice.budget import Budget, Limit, format_bytes, format_ms
from edgeprune.ondevice.figures import Workload, figure_from_json
from edgeprune.ondevice.measure import Counted
from edgeprune.precision import CACHE_FORMATS
from tests.support.runs import finished


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return finished(tmp_path_factory).fitted


def test_relative_limits_are_resolved_by_the_dense_model_of_the_run(fitted):
    budget = Budget(memory=Limit(0.9, True, "90%"), prefill=Limit(25.0, False, "25ms"), decode=Limit(0.7, True, "70%"))
    limits = deployment([replace(fitted, setup=replace(fitted.setup, budget=budget))])["limits"]
    memory, dense = fitted.dense.memory, fitted.dense
    assert limits["memory"]["value"] == pytest.approx(0.9 * memory.prunable + memory.runtime.value)
    assert limits["memory"]["asked"] == (
        f"90% ({format_bytes(limits['memory']['value'])} = 90 % of the dense model's {format_bytes(memory.prunable)} + "
        f"{format_bytes(memory.runtime.value)} runtime, estimated)"
    )
    assert limits["prefill"] == {"value": 25.0, "asked": "25ms"}
    assert limits["decode"]["value"] == pytest.approx(0.7 * dense.decode.value)
    reached = format_ms(0.7 * dense.decode.value)
    assert limits["decode"]["asked"] == (
        f"70% ({reached} = 70 % of the dense model's {format_ms(dense.decode.value)}, estimated)"
    )


def test_a_device_reads_back_what_it_needs(fitted):
    document = json.loads(json.dumps(deployment([fitted]), allow_nan=False))
    setup = fitted.setup
    assert (document["device"], document["engine"], document["sm"]) == ("jetson-orin", "tensorrt", 87)
    assert Workload(**document["workload"]) == setup.workload
    graphs = document["rungs"][0]["graph"], document["older_graph"]
    assert graphs == ("model.opset24.last.onnx", "model.primitive.last.onnx")
    for filename in graphs:
        assert (fitted.chosen.exported.graphs / filename).is_file()
    assert figure_from_json(document["runtime"]) == fitted.dense.memory.runtime
    assert document["precision"] == "fp16"


def test_every_rung_counts_its_own_model(fitted):
    whole = replace(fitted.chosen.exported, decoder=fitted.setup.model.decoder)
    dense = replace(fitted.chosen, model=fitted.setup.model, exported=whole)
    in_codes = fitted.chosen.decoder.with_cache(CACHE_FORMATS["int8"])
    codes = replace(fitted.chosen, exported=replace(fitted.chosen.exported, decoder=in_codes))
    *rungs, joined = deployment([replace(fitted, chosen=dense), fitted, replace(fitted, chosen=codes)])["rungs"]
    setup = fitted.setup
    assert (joined["cache"], joined["graph"]) == ("int8", "model.last.onnx")
    assert 2 * joined["counted"]["cache"] == rungs[1]["counted"]["cache"]
    for rung, decoder in zip(rungs, (setup.model.decoder, fitted.chosen.model.decoder), strict=True):
        assert Counted(**rung["counted"]) == counted(decoder, setup.precision, setup.workload)
        assert (rung["cache"], rung["graph"]) == ("float", "model.opset24.last.onnx")
        assert rung["workspace_bytes"] == workspace_bytes(decoder, setup.profile, setup.workload, setup.precision)
    assert rungs[0]["counted"]["weights"] > rungs[1]["counted"]["weights"]
