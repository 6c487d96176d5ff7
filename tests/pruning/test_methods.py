"""The pruning methods by name."""

import pytest

from edgeprune.errors import InputError
from edgeprune.pruning.methods import method_named


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(InputError) as caught:
        method_named("taylor")
    assert "magnitude" in caught.value.remedy
