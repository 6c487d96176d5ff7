"""The mutations of the GPU path still fit the code that they break."""

import pytest

from tests.support import ROOT
from tools.mutate_gpu import MUTATIONS, TESTS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_breaks_one_place(mutation):
    text = (ROOT / "edgeprune" / "ondevice" / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old


def test_its_tests_exist():
    for names in TESTS.values():
        for name in names:
            assert (ROOT / "tests" / "ondevice" / name).is_file()
