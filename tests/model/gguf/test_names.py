"""The places of weights in a GGUF file, beside the names that the gguf package has."""

from dataclasses import replace

import pytest
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

from edgeprune.model.checkpoint.configuration import decoder_of
from edgeprune.model.checkpoint.places import stored_tensors
from edgeprune.model.decoder import Experts
from edgeprune.model.gguf.metadata import BY_FAMILY
from edgeprune.model.gguf.names import ARCHITECTURES, EXPERTS, LAYER, has_fused_qkv, is_always_fp32, places_of
from tests.support.families import EXPORTED, random_model
from tests.support.shapes import uniform

SMALL = uniform(48, 2, (6, 2, 8), 64, 101)
OURS = {architecture: number for number, architecture in MODEL_ARCH_NAMES.items()}


@pytest.mark.parametrize("case", [case for case in EXPORTED if "," not in case])
def test_a_file_has_no_tensor_that_llama_cpp_does_not_know(case):
    model = random_model(case)
    decoder = decoder_of(model.config.to_dict() | {"architectures": [type(model).__name__]})
    for name in BY_FAMILY[decoder.family]:
        architecture = ARCHITECTURES[name]
        known = {TENSOR_NAMES[tensor].format(bid=index) for tensor in MODEL_TENSORS[OURS[name]] for index in range(3)}
        stored = stored_tensors(decoder, places_of(architecture, decoder, architecture.fused_qkv))
        assert {key.removesuffix(".weight").removesuffix(".bias") for key in stored} <= known
        assert sorted(weight for tensor in stored.values() for weight in tensor.names) == sorted(decoder.shapes())


def test_experts_are_stacked_in_one_tensor_for_each_matrix():
    layer = SMALL.layers[0]
    layers = (replace(layer, mlp=replace(layer.mlp, experts=Experts(3, 2))),) * 2
    decoder = replace(SMALL, layers=layers)
    stored = stored_tensors(decoder, places_of(ARCHITECTURES["llama"], decoder, False))
    assert {key for key in stored if "exps" in key} == {
        key.format(i=index) for key in EXPERTS.values() for index in (0, 1)
    }
    assert stored["blk.1.ffn_up_exps.weight"].names == tuple(f"layers.1.mlp.experts.{e}.up" for e in range(3))
    assert "blk.0.ffn_gate_inp.weight" in stored


def test_fused_tensors_hold_their_parts_in_order():
    stored = stored_tensors(SMALL, places_of(ARCHITECTURES["phi3"], SMALL, True))
    assert stored["blk.0.attn_qkv.weight"].names == tuple(f"layers.0.attention.{part}" for part in "qkv")
    assert stored["blk.0.ffn_up.weight"].names == ("layers.0.mlp.gate", "layers.0.mlp.up")
    assert stored["blk.0.ffn_up.weight"].shape == (128, 48)
    assert has_fused_qkv(stored)
    assert not has_fused_qkv(stored_tensors(SMALL, places_of(ARCHITECTURES["phi3"], SMALL, False)))


def test_small_tensors_stay_in_fp32():
    kept = {part for part, key in LAYER.items() if is_always_fp32(f"blk.0.{key}.weight")}
    assert kept == {part for part in LAYER if "norm" in part or part == "mlp.router"}
    assert is_always_fp32("blk.0.attn_q.bias")
    assert is_always_fp32("rope_freqs.weight")
    assert not is_always_fp32("output.weight")
