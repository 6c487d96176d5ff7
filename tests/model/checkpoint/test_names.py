"""The names of every family's tensors."""

import pytest

from edgeprune.model.checkpoint import names
from edgeprune.model.checkpoint.configuration import checkpoint_tensors, decoder_of
from edgeprune.model.checkpoint.families import FAMILIES
from tests.support.families import CASES, random_model

TEXTS = [case for case in CASES if "llamagen" not in case]


@pytest.mark.parametrize("case", TEXTS)
def test_tensors_have_the_names_and_shapes_of_transformers(case):
    model = random_model(case)
    decoder = decoder_of(model.config.to_dict() | {"architectures": [type(model).__name__]})
    tensors = checkpoint_tensors(decoder)
    numbers = [(name, buffer) for name, buffer in model.named_buffers() if ".act_fn." in name]  # which files hold too
    own = {name: tuple(parameter.shape) for name, parameter in (*model.named_parameters(), *numbers)}
    if decoder.family == "gpt_neox":  # in memory; in files the head has its first name
        own["embed_out.weight"] = own.pop("lm_head.weight")
    ours = {key: tensor.shape for key, tensor in tensors.items()}
    if decoder.layers[0].mlp.experts is None:  # transformers stacks experts in memory, and not in files
        assert ours == own
    else:
        assert {key for key in ours if "experts" not in key and "gate.weight" not in key} <= own.keys()
    held = [name for tensor in tensors.values() for name in tensor.names]
    assert sorted(held) == sorted(decoder.shapes())


def test_every_table_is_that_of_a_family():
    tables = {name for name, value in vars(names).items() if isinstance(value, dict) and "embedding" in value}
    used = {id(family.places) for family in FAMILIES.values()}
    assert {name for name in tables if id(getattr(names, name)) in used} == tables


def test_norms_of_gemma_alone_are_stored_less_one():
    shifted = {name for name, family in FAMILIES.items() if any(place.shift for place in family.places.values())}
    assert shifted == {"gemma", "gemma2", "gemma3_text"}
    for name in shifted:
        places = FAMILIES[name].places
        weights = {part for part, place in places.items() if place.shift == 1.0}
        assert {part for part in weights if not part.endswith("_norm") and not part.endswith(".norm")} == {"norm"}
