"""The formats of the KV cache that a request may use, by device."""

import pytest

from edgeprune.errors import InputError
from edgeprune.pipeline.cache_formats import cache_choice
from edgeprune.precision import CACHE_FORMATS
from edgeprune.profiles import list_profiles, load_profile, with_tensorrt

CPU, ORIN, L4 = (load_profile(name) for name in ("cpu", "jetson-orin", "l4"))


def test_auto_is_what_was_measured_and_says_what_can_be_asked_for():
    assert cache_choice("auto", CPU).names == "float, int8"
    assert "cpu is known to run int8" in cache_choice("auto", CPU).reason
    choice = cache_choice("auto", L4)
    assert choice.names == "float"
    assert choice.reason == "int8 and fp8 can be asked for: nobody measured their speed on l4"


def test_what_is_asked_for_is_all_that_may_be_used():
    assert cache_choice("int8", ORIN).formats == (CACHE_FORMATS["int8"],)
    choice = cache_choice("float, fp8,fp8", L4)
    assert (choice.names, choice.reason) == ("float, fp8", "asked for")
    assert choice.quantised == (CACHE_FORMATS["fp8"],)


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda profile: profile.name)
def test_every_device_offers_what_its_gpu_has(profile):
    offered = {name for name, form in CACHE_FORMATS.items() if profile.sm is None or profile.sm >= form.least_sm}
    assert set(profile.cache) == (offered if profile.sm else {"int8"})
    assert all(offer.source for offer in profile.cache.values())


@pytest.mark.parametrize(
    ("asked", "profile", "error", "remedy"),
    [
        ("int4", CPU, "unknown cache 'int4'", "Give auto, or some of float, int8, fp8."),
        ("fp8", CPU, "cpu runs no KV cache in fp8", "It runs float, int8: --cache auto."),
        ("fp8", ORIN, "jetson-orin runs no KV cache in fp8", "It runs float, int8: --cache auto."),
        ("int8", with_tensorrt(ORIN, "10.3"), "has a KV cache of floats, not int8", "the version 10.15 or newer"),
    ],
)
def test_what_the_device_does_not_run_is_refused(asked, profile, error, remedy):
    with pytest.raises(InputError) as refused:
        cache_choice(asked, profile)
    assert error in refused.value.message
    assert remedy in refused.value.remedy
