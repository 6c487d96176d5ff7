"""What a profile becomes for llama.cpp, against its published latencies."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.engine.calibration import DISCRETE
from edgeprune.engine.llamacpp import OFFERED, on_llamacpp
from edgeprune.engine.published import published
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.profiles import list_profiles, load_profile, load_profile_file, profile_toml

RECENT = [point for point in published()[0] if point.runtime_class == "llama.cpp-2026"]


@pytest.mark.parametrize("point", RECENT, ids=lambda point: f"{point.device}, {point.model}")
def test_decode_is_that_of_the_published_points(point) -> None:
    """Of releases of 2025 and 2026: bytes at the profile's rate, and a time for each layer."""
    name = next(name for name, device in DISCRETE.items() if device == point.device)
    profile = on_llamacpp(load_profile(name))
    rate = profile.decode_efficiency.value * profile.bandwidth.si
    decode_ms = 1e3 * point.decode_bytes / rate + 1e3 * point.layers * profile.layer_overhead.si
    assert decode_ms == pytest.approx(point.decode_ms, rel=0.05)


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda profile: profile.name)
def test_every_profile_has_one_for_llama_cpp(profile, tmp_path: Path) -> None:
    """It can be written and read again, is its own, and says of each figure that is not TensorRT's where it is from."""
    own = on_llamacpp(profile)
    (tmp_path / "device.toml").write_text(profile_toml(own))
    assert load_profile_file(tmp_path / "device.toml") == own == on_llamacpp(own)
    assert (own.engine, own.precision, own.weights, own.tensorrt) == ("llama.cpp", "fp16", OFFERED, None)
    assert own.in_place
    assert own.channel_multiple % 32 == 0
    for name, figure in own.hardware.items():
        if figure != getattr(profile, name):
            assert "llama.cpp's published points" in figure.source
            assert figure.confidence == "low"


def test_its_formats_are_those_of_a_gguf_file() -> None:
    names = [name for offer in OFFERED.values() for name in offer.formats]
    assert {WEIGHT_FORMATS[name].storage for name in names} == {"gguf"}
    assert set(names) == {name for name, form in WEIGHT_FORMATS.items() if form.storage == "gguf"}


def test_a_format_is_replaced_as_llama_cpp_replaces_it() -> None:
    """For rows that are no multiple of 256: src/llama-quant.cpp, tensor_type_fallback."""
    others = {"q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
    assert {word: offer.formats for word, offer in OFFERED.items() if word in others} == {
        word: (word, other) for word, other in others.items()
    }
    assert all(WEIGHT_FORMATS[offer.formats[-1]].multiple == 32 for offer in OFFERED.values())
