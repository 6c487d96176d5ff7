"""Every family: transformers' logits from our walk and from every graph, dense, pruned, saved and compiled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from edgeprune.commands.families import PARITY
from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.decoder import Decoder
from edgeprune.model.load import load_model
from edgeprune.model.save import save_checkpoint
from edgeprune.ondevice.figures import Workload
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.prune import prune, result_of
from tests.support import parity
from tests.support.families import CASES, COMPILED
from tests.support.roundings import mixed, rounded

LIMIT = 1e-5


def test_every_family_has_a_case_and_a_row_in_the_docs() -> None:
    assert {case.partition(",")[0] for case in CASES} == set(FAMILIES)
    rows = json.loads(PARITY.read_text(encoding="utf-8"))
    assert [(row["family"], row["case"]) for row in rows] == [
        (case.partition(", ")[0], case.partition(", ")[2] or "plain") for case in CASES
    ]
    assert [row["runtimes"] for row in rows] == list(map(parity.runtimes_tried, CASES))
    assert all(row[layout] < LIMIT for row in rows for layout in parity.LAYOUTS)
    assert parity.table(rows) in parity.PAGE.read_text(encoding="utf-8")


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


# Fields of some family that the others do not read.
FOREIGN = {
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "mlp_bias": True,
    "use_bias": False,
    "sliding_window": 4,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "query_pre_attn_scalar": 5,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0,
    "no_rope_layers": [0, 1, 1],
    "attention_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "rms_norm_eps": 0.1,
    "layer_norm_eps": 0.1,
    "layer_norm_epsilon": 0.1,
    "norm_epsilon": 0.1,
    "use_parallel_residual": False,
    "scale_attn_weights": False,
    "num_key_value_heads": 1,
    "n_inner": 32,
    "ffn_dim": 32,
    "mlp_only_layers": [1],
}
LINEAR = {"type": "linear", "factor": 3.0}
# Fields that a family has and does not read, or reads otherwise than others.
READ_OTHERWISE = [
    ("llama, llama3 rope, biases, untied", {"original_max_position_embeddings": 8}),
    ("qwen2, yarn, late windows", {"original_max_position_embeddings": 8}),
    ("mistral, sliding window", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("starcoder2", {"layer_types": ["full_attention"] * 3}),
    ("gemma3_text", {"attn_logit_softcapping": 2.0}),
    ("gemma3_text", {"rope_parameters": None, "rope_scaling": LINEAR}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    ("gemma3_text", {"rope_parameters": LINEAR | {"rope_theta": 100.0}}),
    ("gpt_neox", {"rope_parameters": None, "rope_theta": 500.0, "partial_rotary_factor": 1.0}),
    ("gpt_neox", {"rope_parameters": None, "rotary_emb_base": 500.0, "rotary_pct": 0.5}),
    ("mixtral", {"rope_parameters": None}),
]


def compare_with(folder: Path, case: str, changes: Mapping[str, object]) -> tuple[float, float]:
    """The distance of our logits from transformers' after changes of config.json, and of both from those before."""
    before = parity.dense(folder, case)
    config = json.loads((folder / "config.json").read_text()) | changes
    dropped = {name for name, value in changes.items() if value is None}
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if name not in dropped})
    )
    changed = type(before.reference).from_pretrained(folder).eval()
    model, ids = load_model(str(folder)), parity.calibration()[:2, :40]
    with torch.inference_mode():
        old, new = (reference(ids).logits[:, :-1].numpy() for reference in (before.reference, changed))
    return parity.distance(parity.torch_logits(model.decoder, model.weights, ids), new), parity.distance(old, new)


@pytest.mark.parametrize("case", [case for case in CASES if "," not in case and case != "llamagen"])
def test_fields_of_other_families_are_not_read(case: str, tmp_path: Path) -> None:
    changes = {name: value for name, value in FOREIGN.items() if name not in AutoConfig.for_model(case).to_dict()}
    if case in ("olmo3", "ministral3", "gpt_oss", "apertus"):  # whose rope is scaled: there transformers cannot run it
        del changes["partial_rotary_factor"]
    ours, before = compare_with(tmp_path, case, changes)
    assert ours < LIMIT
    assert before < LIMIT


@pytest.mark.parametrize(("case", "changes"), READ_OTHERWISE)
def test_fields_are_read_as_transformers_reads_them(case: str, changes: dict[str, object], tmp_path: Path) -> None:
    assert compare_with(tmp_path, case, changes)[0] < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_pruned(case: str, tmp_path: Path) -> None:
    model = parity.dense(tmp_path / "model", case).model
    decoder, weights = parity.pruned(model, parity.target_of(model.decoder))
    loaded = parity.as_transformers(model, decoder, weights, tmp_path / "pruned")
    errors = parity.graph_errors(parity.reference(loaded), decoder, weights, tmp_path / "graphs")
    assert max(errors.values()) < LIMIT, errors
    assert parity.uneven_error(model, tmp_path / "uneven") < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_weight_formats(case: str, tmp_path: Path) -> None:
    """Another format in every module, floats among them, in every graph."""
    model = parity.dense(tmp_path / "model", case).model
    decoder = mixed(model.decoder, first=len(case))  # families do not all begin with the same format
    assert len(set(decoder.weight_formats.values())) >= 2 or decoder.hidden_size % 32
    errors = parity.stored_errors(decoder, rounded(decoder, model.weights), tmp_path / "graphs")
    assert max(errors.values()) < LIMIT, errors


@pytest.mark.parametrize("form", ["int8", "int4-32"])
def test_shares_of_experts_that_are_not_normalised(form: str, tmp_path: Path) -> None:
    """ONNX Runtime's operator for experts of few bits normalises the shares that it chooses, but not those it gets."""
    model = parity.dense(tmp_path / "model", "qwen3_moe").model
    layers = tuple(
        replace(layer, mlp=replace(layer.mlp, experts=replace(layer.mlp.experts, normalised=False)))
        for layer in model.decoder.layers
    )
    decoder = replace(model.decoder, layers=layers).with_format(WEIGHT_FORMATS[form])
    errors = parity.stored_errors(decoder, rounded(decoder, model.weights), tmp_path / "graphs")
    assert max(errors.values()) < LIMIT, errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dialect", "case"), [("opset24", case) for case in COMPILED] + [("opset23", case) for case in COMPILED[::3]]
)
def test_compiled_in_fp16(dialect: str, case: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    from edgeprune.ondevice.tensorrt import compile_plan

    model = parity.dense(tmp_path / "model", case).model
    decoder, weights = parity.pruned(model, parity.target_of(model.decoder))
    variant = GraphVariant(dialect, "last")
    graph = write_graphs(decoder, weights, tmp_path / "graphs", "fp16", [variant], 64).graphs[variant]
    result = compile_plan(graph, tmp_path / "plan", Workload(1, 16, 64), 86, "tensorrt-rtx")
    assert result.weights_bytes > 0


@pytest.mark.parametrize("case", ["gemma2", "gemma3_text", "smollm3", "qwen2, yarn, late windows", "gpt2"])
def test_what_is_left_of_layers_that_differ_is_loaded_as_such(case: str, tmp_path: Path) -> None:
    """The first layer goes: windows, local rotary and layers without it belong to those behind."""
    model = parity.dense(tmp_path / "model", case).model
    widths = model.decoder.layer_widths
    target = model.decoder.with_layer_widths([(0, 1, 0), *widths[1:]])
    decoder, weights = parity.pruned(model, target)
    assert decoder.is_uniform
    loaded = parity.as_transformers(model, decoder, weights, tmp_path / "pruned")
    errors = parity.graph_errors(parity.reference(loaded), decoder, weights, tmp_path / "graphs")
    assert max(errors.values()) < LIMIT, errors


def test_an_expert_that_saw_too_few_tokens_is_named_and_left_as_it_is(tmp_path: Path) -> None:
    model = parity.dense(tmp_path / "model", "mixtral").model
    target = parity.target_of(model.decoder)
    records = []
    few = torch.randint(2, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    weights = dict(prune(model, target, few, parity.METHOD, 0, records.append))
    named = [record for record in records if record.few]
    assert named
    assert all(record.kind == "mlp" for record in named)
    for record in named:
        for expert in record.few:
            name = f"layers.{record.layer}.mlp.experts.{expert}.down"
            dense = model.weights[name]
            assert all(any(torch.equal(column, other) for other in dense.T) for column in weights[name].T)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if "," not in case])
def test_the_update_brings_the_logits_nearer(case: str, tmp_path: Path) -> None:
    """On samples that it has not seen, against the same cut without it."""
    model = parity.dense(tmp_path / "model", case).model
    target, generator = parity.target_of(model.decoder), torch.Generator().manual_seed(1)
    fit, held_out = (torch.randint(2, 257, (rows, 48), generator=generator) for rows in (32, 8))
    wanted, errors = parity.torch_logits(model.decoder, model.weights, held_out), {}
    for name in ("obs", "default"):
        weights = dict(prune(model, target, fit, METHODS[name], 0))
        found = parity.torch_logits(result_of(target, METHODS[name]), weights, held_out)
        errors[name] = np.square(found - wanted).mean()
    assert errors["default"] < 0.98 * errors["obs"]


@pytest.mark.parametrize("case", ["llamagen, grouped, head_dim 20"])
@pytest.mark.parametrize("target", [parity.target_of, parity.uneven_target], ids=["uniform", "per layer"])
def test_a_pruned_llamagen_is_saved_by_the_original_names(
    case: str, target: Callable[[Decoder], Decoder], tmp_path: Path
) -> None:
    """Teacher forced behind classes and no class, on whole pictures, of which the last token is never fed."""
    model = parity.dense(tmp_path / "model", case).model
    picture, codes = model.decoder.picture, model.decoder.vocab_size
    ids = torch.randint(0, codes, (4, picture.tokens + 1), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = codes + torch.tensor([0, 3, picture.num_classes - 1, picture.num_classes])
    decoder = target(model.decoder)
    weights = dict(prune(model, decoder, ids[:, :-1], parity.METHOD, 0))
    original = parity.as_transformers(model, decoder, weights, tmp_path / "pruned")
    with torch.inference_mode():
        wanted = original(ids[:, :-1]).logits.numpy()
    assert parity.distance(parity.torch_logits(decoder, weights, ids), wanted) < LIMIT


@pytest.mark.parametrize(
    "case", ["gpt2", "imagegpt", "gpt_neox", "gemma2", "llama, llama3 rope, biases, untied", "olmoe"]
)
def test_heads_of_zeros_are_in_the_checkpoint_alone(case: str, tmp_path: Path) -> None:
    """What transformers wants for its configuration is no part of what is pruned, written as a graph, pruned again."""
    model = parity.dense(tmp_path / "model", case).model
    groups, heads, channels = model.decoder.layer_widths[0]
    odd = 3 if groups == 4 else 1
    decoder, weights = parity.pruned(model, model.decoder.with_widths(odd, 3 if heads > 2 else heads, channels - 32))
    save_checkpoint(decoder, weights.items(), model, tmp_path / "once")
    once = load_model(str(tmp_path / "once"))
    assert once.decoder == decoder
    if case == "olmoe":  # whose norms over all heads have other weights beside heads of zeros
        for name, weight in weights.items():
            torch.testing.assert_close(once.weights[name], weight, rtol=1e-6, atol=0.0)
        return
    assert all(torch.equal(once.weights[name], weight) for name, weight in weights.items())
    save_checkpoint(once.decoder, ((n, once.weights[n]) for n in once.decoder.shapes()), once, tmp_path / "twice")
    files = [tmp_path / name / "model.safetensors" for name in ("once", "twice")]
    assert files[0].read_bytes() == files[1].read_bytes()
