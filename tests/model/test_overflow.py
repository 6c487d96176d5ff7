"""What fp16 does not hold is found in the dense walk: every tensor of the graph, the first place by name, both ways."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.errors import NumericalError
from edgeprune.model import overflow
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.overflow import LIMIT, Peak, activation_peaks, check_fp16
from tests.support.families import CASES, save_family
from tests.support.tiny import as_model, llama

VARIANT = GraphVariant("primitive", "all")
INTERNAL = re.compile(
    r"norm\.(square|mean|shifted|rms|scaled)|\.(square|cube|bent|bend|bent_scaled)$|masked|scores_and_sinks|\.shares"
)


def peaks_of(model: Model, ids: torch.Tensor) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for peak in activation_peaks(model, ids):
        found.setdefault(peak.place, {})[peak.tensor] = peak.value
    return found


def graph_peaks(model: Model, ids: torch.Tensor, folder: Path) -> dict[str, dict[str, float]]:
    """Largest absolute value of every node's output in the fp32 graph, by place and node."""
    path = write_graphs(model.decoder, model.weights, folder, "fp32", [VARIANT]).graphs[VARIANT]
    graph = onnx.load(path)
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(graph).graph.value_info}
    names = [name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT and not INTERNAL.search(name)]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    onnx.save(graph, folder / "all.onnx", save_as_external_data=False)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder / "all.onnx", options, providers=["CPUExecutionProvider"])
    feeds = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones(ids.shape, np.int64),
        "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy(),
    }
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
    found: dict[str, dict[str, float]] = {}
    for name, value in zip([*names, "logits"], session.run([*names, "logits"], feeds), strict=True):
        place = re.sub(r"layers\.(\d+)\.(\w+)\..*", r"layer \1 \2", name)
        if place == name:
            place = "embedding" if name.startswith(("embedding", "positions")) else "head"
        if not name.startswith(("mask", "rotary", "position")):
            found.setdefault(place, {})[name] = float(np.abs(value).max())
    return found


@pytest.mark.parametrize("case", CASES)
def test_no_tensor_of_the_graph_is_larger_than_what_was_seen(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_family(tmp_path / "model", case)
    model = load_model(str(tmp_path / "model"))
    ids = torch.randint(0, model.decoder.vocab_size, (3, 14), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(overflow, "LIMIT", 0.0)  # tensors that their lengths would exclude are recorded too
    seen, graph = peaks_of(model, ids), graph_peaks(model, ids, tmp_path / "graph")
    assert set(graph) == set(seen)
    for place, tensors in graph.items():
        name = max(tensors, key=tensors.get)
        assert tensors[name] == pytest.approx(max(seen[place].values()), rel=1e-3), (place, name, seen[place])


def test_lengths_exclude_only_what_is_within(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of queries and keys, and logits, are computed from the limit on that their lengths allow."""
    model, ids = as_model(llama()), torch.arange(24).view(2, 12)
    monkeypatch.setattr(overflow, "LIMIT", 0.0)
    largest = peaks_of(model, ids)
    score, logit = largest["layer 0 attention"]["the product of q and k"], largest["head"]["logits"]
    for tensor, value in (("the product of q and k", score), ("logits", logit)):
        monkeypatch.setattr(overflow, "LIMIT", 0.99 * value)
        assert value in [peak.value for peak in activation_peaks(model, ids) if peak.tensor == tensor]
    monkeypatch.setattr(overflow, "LIMIT", 1e6)
    assert not {"the product of q and k", "q before norm and rotation"} & set(peaks_of(model, ids)["layer 0 attention"])
    assert "logits" not in peaks_of(model, ids)["head"]


def test_the_first_that_fp16_does_not_hold_is_named_and_the_walk_ends() -> None:
    walked: list[str] = []

    def peaks():
        for peak in (Peak("layer 0 mlp", "up", LIMIT), Peak("layer 1 mlp", "down", 1.2e5), Peak("head", "norm", 9e9)):
            walked.append(peak.place)
            yield peak

    with pytest.raises(NumericalError) as caught:
        check_fp16(peaks(), "Use --precision bf16 or fp32.")
    assert caught.value.message == "layer 1 mlp: down reaches 1.2e+05 on the calibration samples, fp16 holds 65504"
    assert (caught.value.exit_code, caught.value.remedy) == (2, "Use --precision bf16 or fp32.")
    assert walked == ["layer 0 mlp", "layer 1 mlp"]
    within = [Peak("layer 0 mlp", "up", 3.0), Peak("layer 1 mlp", "down", LIMIT), Peak("head", "norm", 2.0)]
    assert check_fp16(iter(within), "") == within[1]
    with pytest.raises(NumericalError):
        check_fp16(iter([Peak("head", "norm", float("nan"))]), "")


@pytest.mark.parametrize("share", [0.98, 1.02])
def test_a_down_projection_at_the_limit(share: float) -> None:
    """The fp16 of transformers' own model agrees: the module's output is finite below, and infinite beyond."""
    reference, ids = llama(), torch.arange(24).view(2, 12)
    down = reference.model.layers[1].mlp.down_proj
    before = peaks_of(as_model(reference), ids)["layer 1 mlp"]["down"]
    with torch.no_grad():
        down.weight *= share * LIMIT / before
    found = []
    down.register_forward_hook(lambda module, inputs, output: found.append(output.isfinite().all().item()))
    model = as_model(reference)
    peaks = peaks_of(model, ids)
    assert peaks["layer 1 mlp"]["down"] == pytest.approx(share * LIMIT, rel=1e-4)
    with torch.inference_mode():
        reference.half()(ids)
    assert found == [share < 1]
    if share < 1:
        assert check_fp16(activation_peaks(model, ids), "").value > 0.97 * LIMIT
    else:
        with pytest.raises(NumericalError, match="layer 1 mlp: down reaches 6.68e"):
            check_fp16(activation_peaks(model, ids), "")
