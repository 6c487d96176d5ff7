"""The weight formats of a config.json: what is written is read, as compressed-tensors reads it too."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.adapt import changed
from edgeprune.model.checkpoint.configuration import checkpoint_tensors
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.checkpoint.quantization import (
    EMBEDDING_FORMAT,
    can_be_packed,
    check_packable,
    has_embedding_codes,
    is_own,
    module_of,
    own_fields,
    packing_of,
    quantisation,
    with_stored_formats,
    without_quantization,
)
from edgeprune.model.decoder import Experts
from tests.support.quantised import ASYMMETRIC, INT4, INT8, WITHOUT, packable, random_codes
from tests.support.roundings import OFFSET, W8A8
from tests.support.shapes import uniform

DECODER = replace(uniform(64, 12, (4, 2, 16), 96, 50), tie_word_embeddings=False)
MIXED = packable(DECODER, asymmetric=True)


EXPERTS = replace(changed(DECODER, {}, {"experts": Experts(4, 2)}), family="mixtral")


def fields_of(decoder):
    packing = packing_of(decoder, torch.bfloat16)
    return own_fields(decoder) | ({"quantization_config": packing.config} if packing else {})


@pytest.mark.parametrize(
    "decoder",
    [
        MIXED,
        DECODER.with_format(INT8),
        DECODER.with_formats([(W8A8, INT8), (INT8, None), (INT4, W8A8)] * 4, None, None),
        DECODER.with_formats([(OFFSET, INT8), (None, OFFSET), (INT4, OFFSET)] * 4, INT8, OFFSET),
        replace(changed(DECODER, {}, {"gated": False}), family="gpt2").with_format(OFFSET),
        EXPERTS.with_format(OFFSET, INT8),
        DECODER.with_format(None, INT4),
        DECODER.with_formats([(None, None)] * 12, INT8, None),
        replace(MIXED, family="phi3"),
        replace(changed(DECODER, {}, {"gated": False}), family="gpt_neox").with_format(INT4),
        EXPERTS.with_format(INT4, INT8),
        packable(replace(DECODER, tie_word_embeddings=True)),
        replace(DECODER, tie_word_embeddings=True).with_format(None, INT8),
        MIXED.with_layer_widths([(2, 2, 64), (0, 1, 96), (2, 2, 0)] * 4),
    ],
)
def test_formats_are_read_as_they_were_written(decoder):
    fields = fields_of(decoder)
    found = with_stored_formats(decoder.with_format(None), fields)
    assert found.weight_formats == decoder.weight_formats
    assert without_quantization(fields | {"vocab_size": 3}) == {"vocab_size": 3}


@pytest.mark.parametrize("decoder", [MIXED, EXPERTS.with_format(INT4, INT8)])
def test_compressed_tensors_finds_the_same_modules(decoder):
    pytest.importorskip("compressed_tensors", reason=WITHOUT)
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    config = QuantizationConfig.model_validate(fields_of(decoder)["quantization_config"])
    schemes = {target: group.weights for group in config.config_groups.values() for target in group.targets}
    layer = nn.Linear(2, 2)
    for tensor in checkpoint_tensors(decoder).values():
        is_float = bool(match_targets(module_of(tensor), layer, config.ignore))
        targets = match_targets(module_of(tensor), layer, schemes)
        if tensor.form is None:
            assert not targets
            is_matrix = len(tensor.shape) == 2 and tensor.names != ("embedding",)
            assert is_float == is_matrix
        else:
            assert not is_float
            arguments = schemes[targets[0]]
            assert (arguments.num_bits, arguments.group_size) == (tensor.form.bits, tensor.form.group)
            assert arguments.symmetric != (tensor.form.offset is not None)


def test_a_decoder_of_floats_adds_nothing():
    assert packing_of(DECODER, torch.bfloat16) is None
    assert packing_of(DECODER.with_formats([(None, None)] * 12, INT8, None), torch.bfloat16) is None
    assert with_stored_formats(DECODER, {"vocab_size": 50}) is DECODER


def test_a_class_stands_for_all_modules_that_nothing_else_names():
    """As other writers have it."""
    fields = fields_of(DECODER.with_format(INT4))
    details = fields["quantization_config"]
    details["config_groups"]["group_0"]["targets"] = ["Linear"]
    assert with_stored_formats(DECODER, fields).weight_formats == DECODER.with_format(INT4).weight_formats
    other = {"targets": ["re:.*self_attn"], "weights": {"num_bits": 8, "strategy": "channel", "symmetric": True}}
    details["config_groups"]["group_1"] = other
    found = with_stored_formats(DECODER, fields)
    assert found.layers[3].attention.weight_format == INT8
    assert found.layers[3].mlp.weight_format == INT4
    details["ignore"] = ["Linear"]
    assert not with_stored_formats(DECODER, fields).weight_formats


def edited(*path, value):
    def edit(fields):
        for key in path[:-1]:
            fields = fields[key]
        fields[path[-1]] = value

    return edit


GROUP = ("quantization_config", "config_groups", "group_0")
BAD = {
    "groups of a list": (edited(*GROUP[:2], value=[]), "config_groups is not"),
    "targets of a word": (edited(*GROUP, "targets", value="Linear"), "targets is not"),
    "no weights": (edited(*GROUP, "weights", value=None), "weights is not"),
    "three bits": (edited(*GROUP, "weights", "num_bits", value=3), "a format that is not known"),
    "bits in words": (edited(*GROUP, "weights", "num_bits", value="8"), "a format that is not known"),
    "other groups": (edited(*GROUP, "weights", "group_size", value=[32]), "a format that is not known"),
    "fp8": (edited(*GROUP, "weights", "type", value="float"), "a format that is not known"),
    "dynamic": (edited(*GROUP, "weights", "dynamic", value="local"), "a format that is not known"),
    "activations": (edited(*GROUP, "input_activations", value={"num_bits": 8}), "a format that is not known"),
    "another container": (edited("quantization_config", "format", value="int-quantized"), "int-quantized"),
    "not compressed": (edited("quantization_config", "quantization_status", value="frozen"), "frozen"),
    "no pattern": (edited(*GROUP, "targets", value=["re:("]), "is no pattern"),
    "half a module": (edited(*GROUP, "targets", value=["re:.*q_proj"]), "several formats in layers.0.attention"),
    "a table of another": (edited(EMBEDDING_FORMAT, value="int5"), "is not a weight format"),
    "a table of a list": (edited(EMBEDDING_FORMAT, value=["int8"]), "is not a weight format"),
    "a list": (edited("quantization_config", value=[]), "quantization_config: it is not"),
}


@pytest.mark.parametrize(("damage", "reason"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_refused(damage, reason):
    fields = fields_of(DECODER.with_format(INT8, INT8))
    damage(fields)
    with pytest.raises(InputError) as caught:
        with_stored_formats(DECODER, fields)
    assert reason in caught.value.message


def test_only_what_edgeprune_wrote_has_formats():
    fields = fields_of(MIXED)
    assert is_own(fields)
    assert has_embedding_codes(fields)
    assert not has_embedding_codes(fields_of(DECODER.with_formats([(INT8, INT8)] * 12, None, None)))
    assert quantisation(fields) == "compressed-tensors"
    del fields[EMBEDDING_FORMAT]
    assert not is_own(fields)
    assert with_stored_formats(DECODER, fields) is DECODER
    assert quantisation({"quantization_config": {}}) is None


def test_families_without_linear_layers_have_no_such_checkpoint():
    able = {family for family in FAMILIES if can_be_packed(family)}
    assert FAMILIES.keys() - able == {"gpt2", "imagegpt"}
    gpt2 = replace(changed(DECODER, {}, {"gated": False}), family="gpt2")
    check_packable(gpt2)
    check_packable(gpt2.with_format(OFFSET))
    with pytest.raises(InputError, match="the family gpt2 cannot hold weights of few bits"):
        check_packable(gpt2.with_format(INT8))


def test_experts_have_one_symmetric_format():
    """Transformers takes that of the first group for all: other codes would be read as other numbers."""
    check_packable(EXPERTS)
    check_packable(EXPERTS.with_format(INT4, INT8))
    check_packable(EXPERTS.with_formats([(None, None)] * 12, INT8, None))
    check_packable(EXPERTS.with_format(OFFSET))
    check_packable(EXPERTS.with_formats([(INT8, INT4), (None, INT4)] * 6, None, None))
    for layers in (
        [(INT8, INT4), (INT8, INT8)],
        [(INT8, ASYMMETRIC)] * 2,
        [(INT8, None)] * 2,
        [(None, INT4), (None, None)],
    ):
        with pytest.raises(InputError, match="transformers reads one symmetric format for all"):
            check_packable(EXPERTS.with_formats(layers * 6, None, None))


def test_scales_have_the_type_of_the_floats_but_with_experts():
    """Transformers decompresses experts in the type of the scales: products of 16 bits would be rounded."""
    weight = random_codes(INT4, 8, 32)
    for decoder, dtype in ((DECODER, torch.bfloat16), (EXPERTS, torch.float32)):
        packing = packing_of(decoder.with_format(INT4), torch.bfloat16)
        assert packing.pack(weight)["weight_scale"].dtype == dtype
