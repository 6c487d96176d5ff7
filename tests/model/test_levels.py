"""Floats of 8 and 4 bits, against ml_dtypes and brute force."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.model.levels import codes_of, nearest, values_of
from edgeprune.precision import E2M1, LARGEST_LEVEL

TYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e2m1": ml_dtypes.float4_e2m1fn}
BOTH = pytest.mark.parametrize("levels", TYPES)


def levels_of(levels: str) -> torch.Tensor:
    """All that are finite."""
    bits = np.arange(256 if levels == "e4m3" else 16, dtype=np.uint8).view(TYPES[levels]).astype(np.float32)
    return torch.from_numpy(bits[np.isfinite(bits)])


@BOTH
def test_codes_are_the_bits_and_stand_for_their_levels(levels: str) -> None:
    codes = torch.arange(256 if levels == "e4m3" else 16).to(torch.uint8).view(torch.int8)
    theirs = torch.from_numpy(codes.numpy().view(TYPES[levels]).astype(np.float32))
    finite = theirs.isfinite()
    found = values_of(codes, levels)
    assert torch.equal(found[finite], theirs[finite])
    assert torch.equal(codes_of(found[finite], levels), codes[finite])
    assert float(theirs[finite].max()) == LARGEST_LEVEL[levels]
    assert E2M1[-1] == LARGEST_LEVEL["e2m1"]


@BOTH
@given(st.integers(0, 10**6))
def test_the_nearest_level_is_that_of_brute_force_and_halves_are_those_of_ml_dtypes(levels: str, seed: int) -> None:
    all_levels, most = levels_of(levels), LARGEST_LEVEL[levels]
    ordered = all_levels.unique()
    values = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * most / 2
    values = torch.cat([values, all_levels, (ordered[1:] + ordered[:-1]) / 2])
    found = nearest(values.clone(), levels, -most, most)
    assert torch.equal((found - values).abs(), (all_levels - values[:, None]).abs().amin(dim=1))
    within = values.clamp(-most, most).numpy().astype(TYPES[levels]).astype(np.float32)
    assert torch.equal(found, torch.from_numpy(within))


def test_whole_numbers_are_their_own_codes() -> None:
    found = nearest(torch.tensor([0.5, 1.5, 200.0, -200.0]), "whole", -127, 127)
    assert found.tolist() == [0.0, 2.0, 127.0, -127.0]
    assert torch.equal(values_of(codes_of(found, "whole"), "whole"), found)
