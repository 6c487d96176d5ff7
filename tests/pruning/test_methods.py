"""The pruning methods by name."""

import pytest

from edgeprune.errors import InputError
from edgeprune.pruning import score
from edgeprune.pruning.methods import METHODS, Recovery, method_named


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(InputError) as caught:
        method_named("taylor")
    assert "magnitude" in caught.value.remedy


def test_a_repaired_method_has_the_score_of_the_bare_one():
    repaired = {name.removesuffix("+ls"): method for name, method in METHODS.items() if name.endswith("+ls")}
    assert repaired.keys() == METHODS.keys() - {"default"} - {name for name in METHODS if name.endswith("+ls")}
    for name, method in repaired.items():
        bare = METHODS[name]
        own = score.fluctuation if name == "flap" else bare.score  # FLAP's program has its own estimate of it
        assert (method.score, method.standardised) == (own, bare.standardised)
        assert method.recovery == Recovery.LEAST_SQUARES != bare.recovery
    assert method_named("default") == METHODS["numerical-box+ls"]
    assert len({method.score for method in METHODS.values()}) == len(repaired) + 1
