"""Modules by name, pattern and class, as compressed-tensors' own code finds them."""

import pytest
from compressed_tensors.utils.match import match_targets
from torch import nn

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.targets import groups_by_module, pattern_of

GROUPS = {
    "a": {"targets": ["Linear"], "weights": {}},
    "b": {"targets": ["re:.*q_proj", "layers.0.k_proj"], "weights": {}},
    "c": {"targets": ["re:.*k_proj", "Embedding"], "weights": {}},
}
IGNORED = ["lm_head", "re:.*v_proj"]
FOUND = {
    ("layers.0.q_proj", nn.Linear): "b",
    ("layers.0.k_proj", nn.Linear): "b",
    ("layers.1.k_proj", nn.Linear): "c",
    ("layers.1.v_proj", nn.Linear): None,
    ("layers.1.o_proj", nn.Linear): "a",
    ("lm_head", nn.Linear): None,
    ("embed", nn.Embedding): "c",
}


@pytest.mark.parametrize(("module", "group"), FOUND.items())
def test_a_name_goes_before_a_pattern_and_that_before_the_class(module, group):
    name, kind = module
    found = groups_by_module({"config_groups": GROUPS, "ignore": IGNORED})(name, kind.__name__)
    assert found is (None if group is None else GROUPS[group])
    targets = {target: key for key, value in GROUPS.items() for target in value["targets"]}
    if match_targets(name, kind(2, 2), IGNORED):
        assert group is None
    else:
        assert targets[match_targets(name, kind(2, 2), targets)[0]] == group


def test_what_is_no_pattern_is_said():
    with pytest.raises(InputError, match="re:. is no pattern"):
        pattern_of("re:(")
