"""plan: shapes without weights on one device and on all; what it counts, what it refuses, what it labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.commands.plan import Plan, Question, plan_all, plan_one
from edgeprune.engine.calibration import ORIGINS, decode_points
from edgeprune.engine.estimate import estimate_performance
from edgeprune.errors import InputError
from edgeprune.ondevice.figures import Workload
from edgeprune.profiles import list_profiles, load_profile, profile_toml

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QWEN3_4B = SMALL | {  # the shape alone: the norms of its queries and keys are negligible
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    return written(tmp_path, SMALL)


def written(folder: Path, config: object) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "config.json")


def test_a_plan_is_the_estimators(config: str) -> None:
    found = plan_one(Question(config, "jetson-orin"))
    profile, workload = load_profile("jetson-orin"), Workload(1, 512, 2048)
    assert found.performance == estimate_performance(found.decoder, profile, workload, "fp16")
    assert (found.workload, found.past, found.precision) == (workload, 2047, "fp16")
    assert found.decoder.parameters == 134_515_008
    assert found.fits


@pytest.mark.parametrize("variant", ["config.json", "."])
def test_a_file_or_its_directory(config: str, variant: str) -> None:
    found = plan_one(Question(str(Path(config).parent / variant), "l4"))
    assert found.model == Path(config).parent.name
    assert found == plan_one(Question(config, "l4"))


def test_json_has_parts_basis_and_notes(config: str) -> None:
    found = plan_one(Question(config, "jetson-orin-nano-8gb", weights="int4", prompt=100, past=300, batch=2))
    shown = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert (shown["batch"], shown["prompt"], shown["past"], shown["weights"]) == (2, 100, 300, "int4-64")
    assert shown["source"] == "estimated"
    parts = shown["parts"]
    assert shown["memory_bytes"] == sum(parts["memory_bytes"].values())
    assert shown["decode_ms"] == pytest.approx(sum(parts["decode_ms"].values()))
    assert shown["decode_in_place_ms"] == pytest.approx(shown["decode_ms"])
    assert parts["decode_ms"]["cache_copies"] == 0
    assert (shown["dialect"], "in place" in shown["basis"]["dialect"]) == ("opset24", True)
    assert set(parts["memory_bytes"]) == {"weights", "cache", "activations", "buffers", "runtime"}
    assert set(parts["decode_ms"]) == {"layers", "head", "cache", "cache_copies", "compute", "overhead"}
    assert shown["work"]["decode_bytes"] == shown["work"]["decode_bytes_in_place"]
    for name in ("prefill", "decode"):
        assert "TensorRT-Edge-LLM" in shown["basis"][name]
    assert "Orin Nano 8 GB" in shown["basis"]["decode"]
    assert all(shown["basis"].values())
    assert any(note.startswith("int4-64: the layers' matrices in 4 bits") for note in shown["notes"])
    assert any("low confidence" in note for note in shown["notes"])


def test_an_older_tensorrt_copies_the_cache_and_the_plan_says_so(config: str) -> None:
    question = Question(config, "jetson-orin-nano-8gb", tensorrt="10.3", prompt=100, past=300, batch=2)
    older = plan_one(question).as_json()
    newer = plan_one(replace(question, tensorrt=None)).as_json()
    assert (older["dialect"], newer["dialect"]) == ("primitive", "opset24")
    assert "TensorRT 10.3 is older than 10.15" in older["basis"]["dialect"]
    copies = older["work"]["decode_bytes"] - older["work"]["decode_bytes_in_place"]
    assert copies == 2 * 2 * 30 * 2 * 3 * 64 * 301 * 2  # batch, layers, keys and values, read and written
    assert f"{copies / 1e6:.4g} MB of it our graph's copy of the cache" in older["basis"]["decode"]
    assert older["decode_in_place_ms"] == pytest.approx(newer["decode_ms"])
    caches = [one["parts"]["memory_bytes"]["cache"] for one in (older, newer)]
    assert caches[0] == 2 * caches[1]


def test_a_cache_in_codes_is_joined_where_one_of_floats_is_written_in_place(config: str) -> None:
    plain, codes = (plan_one(Question(config, "jetson-orin", cache=form)).as_json() for form in ("float", "int8"))
    assert (plain["dialect"], codes["dialect"]) == ("opset24", "opset23")
    assert "writes floats alone into the KV cache in place, not int8" in codes["basis"]["dialect"]
    copies = [one["parts"]["decode_ms"]["cache_copies"] for one in (plain, codes)]
    assert copies[0] == 0
    assert copies[1] == pytest.approx(2 * codes["parts"]["decode_ms"]["cache"])
    caches = [one["parts"]["memory_bytes"]["cache"] for one in (plain, codes)]
    assert caches[0] == caches[1]  # two bytes of a number once, and one twice
    assert codes["decode_in_place_ms"] < plain["decode_ms"] < codes["decode_ms"]


def test_in_fp32_the_plan_is_of_the_dialect_that_a_fit_takes(config: str) -> None:
    found = plan_one(Question(config, "rtx-a4000", precision="fp32"))
    assert found.profile.dialect == "primitive"
    assert "no fp32 kernel" in found.dialect_reason


def test_a_step_in_place_attends_to_the_cache_that_holds_the_prompt(config: str) -> None:
    """Although fewer tokens are in it, its capacity is that of the prompt, which all steps read."""
    found = plan_one(Question(config, "jetson-orin", prompt=100, past=10))
    assert found.past == 10
    assert found.work == plan_one(Question(config, "jetson-orin", prompt=100, past=100)).work


@pytest.mark.parametrize("label", ["AGX Orin 64 GB", "Orin NX 16 GB"])
def test_in_place_it_agrees_with_the_published_decode(tmp_path: Path, label: str) -> None:
    profile = ORIGINS[label].profiles[0]
    point = next(point for point in decode_points(label) if point.model.startswith("Qwen3-4B"))
    found = plan_one(Question(written(tmp_path, QWEN3_4B), profile, weights="int4-128", prompt=2048, past=2048))
    assert found.decode_in_place_ms == pytest.approx(point.decode_ms, rel=0.04)
    assert found.performance.decode.value == pytest.approx(found.decode_in_place_ms)


def test_a_model_that_the_device_cannot_build_is_noted(tmp_path: Path) -> None:
    """It would run, but the builder needs some three times its weights; another machine has a memory of its own."""
    config = written(tmp_path, QWEN3_4B)
    small, large, discrete = (
        plan_one(Question(config, device=name)) for name in ("jetson-orin-nx-16gb", "jetson-agx-orin-64gb", "l4")
    )
    assert (small.fits, small.builds) == (True, False)
    assert small.build_bytes == large.build_bytes
    assert 3 < small.build_bytes / small.performance.memory.weights.value < 4
    (note,) = (note for note in small.notes if "building the engine" in note)
    assert "SM 87" in note
    assert large.builds
    assert not any("building the engine" in note for note in large.notes)
    assert discrete.builds is None
    assert discrete.build_bytes < small.build_bytes
    document = small.as_json()
    assert (document["builds"], document["build_available_bytes"]) == (False, small.profile.build_memory.si)
    assert document["build_bytes"] >= small.build_bytes


def test_every_device_but_the_processor_is_in_the_table(config: str) -> None:
    plans = plan_all(Question(config))
    assert [found.profile.name for found in plans] == [p.name for p in list_profiles() if p.name != "cpu"]
    for found in plans:
        assert found == plan_one(Question(config, found.profile.name))
        assert found.fits == (found.performance.memory.total <= found.profile.available_bytes)


def test_a_profile_of_ones_own(config: str, tmp_path: Path) -> None:
    profile = load_profile("l4").model_copy(update={"name": "mine"})
    (tmp_path / "mine.toml").write_text(profile_toml(profile))
    found = plan_one(Question(config, profile=tmp_path / "mine.toml"))
    assert found.profile == profile
    with pytest.raises(InputError, match="both"):
        plan_one(Question(config, "l4", tmp_path / "mine.toml"))


COUNTS = st.none() | st.integers(1, 3000)


@settings(max_examples=30)
@given(prompt=COUNTS, past=COUNTS, batch=st.none() | st.integers(1, 64))
def test_any_prompt_past_and_batch(tmp_path_factory, prompt: int | None, past: int | None, batch: int | None) -> None:
    config = written(tmp_path_factory.mktemp("model"), SMALL | {"max_position_embeddings": 1024})
    found = plan_one(Question(config, "jetson-orin", prompt=prompt, past=past, batch=batch))
    workload = found.workload
    assert workload.prompt == (prompt or min(512, past or 512))
    assert found.past == (past or max(workload.prompt, 1023))
    assert workload.batch == (batch or 1)
    held = max(workload.prompt, found.past) + 1
    cache = workload.batch * 30 * 2 * 3 * 64 * held * 2  # fp16 keys and values
    assert found.performance.memory.cache.value == cache
    assert any("positions" in note for note in found.notes) == (held > 1024)


def test_the_most_that_is_taken_is_still_a_number(config: str) -> None:
    most = 2**31 - 1
    for found in plan_all(Question(config, prompt=most, past=most, batch=most)):
        assert not found.fits
        json.dumps(found.as_json(), allow_nan=False)


def test_the_processor_refuses_a_precision_before_it_is_probed(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.engine.probe.probe", lambda profile: pytest.fail("probed"))
    for precision in ("fp16",):
        with pytest.raises(InputError, match="the profile cpu has no fp16 compute rate"):
            plan_one(Question(config, "cpu", precision=precision))


def refused(question: Question) -> str:
    with pytest.raises(InputError) as one:
        plan_one(question)
    with pytest.raises(InputError) as every:
        plan_all(question)
    assert one.value.message == every.value.message
    assert one.value.remedy
    return one.value.message


def test_what_cannot_be_planned_is_said(config: str, tmp_path: Path) -> None:
    for name in ("batch", "prompt", "past"):
        assert refused(Question(config, "l4", **{name: 0})) == f"--{name} 0 is less than 1"
        assert refused(Question(config, "l4", **{name: 10**400})) == f"--{name} is more than 2147483647"
    assert refused(Question(config, "l4", precision="int2")) == "unknown precision 'int2'"
    assert "no such file" in refused(Question("nowhere.json", "l4"))
    assert "no such model" in refused(Question("nowhere", "l4"))
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(Question(str(tmp_path / "empty"), "l4"))
    (tmp_path / "weights.bin").write_bytes(b"\0")
    assert "is not a PyTorch checkpoint" in refused(Question(str(tmp_path / "weights.bin"), "l4"))
    (tmp_path / "weights.npz").write_bytes(b"\0")
    assert "is not a configuration" in refused(Question(str(tmp_path / "weights.npz"), "l4"))
    for text, reason in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "bad.json").write_text(text)
        assert reason in refused(Question(str(tmp_path / "bad.json"), "l4"))
    for family in ("mamba", None):
        assert "unsupported architecture" in refused(Question(written(tmp_path, {"model_type": family}), "l4"))
    with pytest.raises(InputError, match="unknown device 'l5'"):
        plan_one(Question(config, "l5"))


def test_a_cache_in_place_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = SMALL | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    figures = load_profile("l4").hardware
    probed = load_profile("cpu").model_copy(update={**figures, "fp32_compute": figures["fp16_compute"]})
    monkeypatch.setattr("edgeprune.commands.plan.with_figures", lambda profile: probed)
    found: Plan = plan_one(Question(written(tmp_path, odd), "cpu"))
    assert found.decode_in_place_ms == found.performance.decode.value  # one buffer
    assert found.work["decode_bytes"] == found.work["decode_bytes_in_place"]
