"""Tables of devices, plans and findings in 80 columns, with their sources."""

from __future__ import annotations

import json
import re

import pytest

from edgeprune.cli.tables import print_doctor, print_plan, print_plans, print_profile, print_profiles
from edgeprune.commands.doctor import Finding
from edgeprune.commands.plan import Question, plan_all, plan_one
from edgeprune.profiles import list_profiles, load_profile
from tests.support.pages import printed, words


def test_every_device_is_listed_whole():
    lines = printed(print_profiles, list_profiles())
    assert max(map(len, lines)) <= 80
    names = {line.split()[0] for line in lines[1:] if line[:1].strip()}
    assert names == {profile.name for profile in list_profiles()}


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda profile: profile.name)
def test_one_device_with_source_and_confidence_of_each_figure(profile):
    lines = printed(print_profile, profile)
    text = words(lines)
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"{profile.name}: ")
    for name, figure in profile.figures.items():
        assert f"{name.replace('_', ' ')} {figure.value:g}" in text
        assert figure.confidence in text
    assert ("probed on first use" in text) == (not profile.is_probed)


def test_a_figures_source_is_printed_in_full():
    source = load_profile("jetson-orin").bandwidth.source
    assert source in words(printed(print_profile, load_profile("jetson-orin")))


@pytest.fixture
def shape(tmp_path) -> str:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    path = tmp_path / "[bold]small.json"
    path.write_text(json.dumps({"model_type": "llama", **sizes, **heads}))
    return str(path)


def test_a_plan_says_whether_it_fits_by_part_and_on_what_it_rests(shape):
    lines = printed(print_plan, plan_one(Question(shape, "jetson-orin-nano-4gb", weights="int4")))
    assert max(map(len, lines)) <= 80
    shown = words(lines)
    assert shown.startswith(
        "[bold]small on jetson-orin-nano-4gb: 0.163 B parameters, fp16, weights in int4-64, batch 1, prompt 512, past"
    )
    for text in (
        "It fits: ",
        "2.79 GiB that the system leaves",
        "All figures are estimated.",
        "weights",
        "dialect opset24 is assumed: TensorRT 10.16 writes new keys and values into the KV cache in place",
        "Orin Nano 8 GB",
        "TensorRT-Edge-LLM",
        "mind int4-64: the layers' matrices in 4 bits",
        "low confidence in the profile, which gives the reasons: ",
    ):
        assert text in shown
    assert "cache copies" not in shown
    older = words(printed(print_plan, plan_one(Question(shape, "jetson-orin-nano-4gb", tensorrt="10.3"))))
    for text in ("cache copies", "decode in place", "dialect primitive is assumed: TensorRT 10.3 is older than 10.15"):
        assert text in older
    shown = words(printed(print_plan, plan_one(Question(shape, "jetson-orin-nano-4gb", batch=64))))
    assert re.search(r"It does not fit: [\d.]+ GiB, but 2.79 GiB that the system leaves", shown)


def test_plans_of_all_devices_fit_80_columns_with_whole_names(shape):
    plans = plan_all(Question(shape, batch=48))
    lines = printed(print_plans, plans)
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split() for line in lines if line}
    for found in plans:
        assert ("yes" if found.fits else "no") in rows[found.profile.name]
        assert (rows[found.profile.name][-1] == "ms") == found.fits
    held = [found for found in plans if found.fits]
    guessed = [found for found in held if found.profile.decode_efficiency.confidence == "low"]
    assert 0 < len(guessed) < len(held) < len(plans)
    text = f"{len(held)} of {len(plans)} devices hold it, {len(guessed)} of them with no or few published points."
    assert text in words(lines)


def test_findings_say_how_to_get_what_is_missing():
    findings = [Finding("torch", True, "2.13.0"), Finding("engine x", False, "none", 'pip install "edgeprune[x]"')]
    lines = printed(print_doctor, findings)
    assert lines[1].split() == ["yes", "torch", "2.13.0"]
    assert lines[2].split() == ["no", "engine", "x", "none", "pip", "install", '"edgeprune[x]"']
