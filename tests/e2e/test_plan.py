"""`edgeprune plan` through the real command line: figures, labels, speed on huge shapes, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.profiles import list_profiles, load_profile
from tests.support.commands import run
from tests.support.published import PUBLISHED

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
SHAPES = {
    "llama-3-70b": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "max_position_embeddings": 8192,
    },
    "llama-3.1-405b": LLAMA
    | {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
        "num_hidden_layers": 126,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mamba": {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
    "t5": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
    "deepseek": {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]},
    "empty": None,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for name, shape in SHAPES.items():
        (folder / name).mkdir()
        if shape is not None:
            (folder / name / "config.json").write_text(json.dumps(shape))
    return folder


@pytest.mark.timing
@pytest.mark.parametrize(("name", "billions"), [("llama-3-70b", 70.55), ("llama-3.1-405b", 405.85)])
def test_a_huge_shape_on_every_profile_takes_seconds_and_little_memory(home, name, billions):
    """In a process of its own, whose peak memory is the one read: ru_maxrss would begin at that of the tests."""
    code = (
        "import sys; from edgeprune.cli.app import main; from edgeprune.ondevice.machine import peak_bytes\n"
        f"sys.argv = ['edgeprune', 'plan', {name!r}, '--json']\n"
        "try: main()\nfinally: print(peak_bytes(), file=sys.stderr); "
        "print(*({'torch', 'transformers', 'onnxruntime', 'onnx'} & set(sys.modules)), file=sys.stderr)"
    )
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 10
    peak, heavy = result.stderr.split("\n")[:2]
    assert int(peak) < 1e9
    assert not heavy
    rows = json.loads(result.stdout)["devices"]
    assert len(rows) == sum(profile.is_probed for profile in list_profiles())
    assert {round(row["parameters"] / 1e9, 2) for row in rows} == {billions}
    assert all(row["source"] == "estimated" and row["basis"]["decode"] for row in rows)
    assert not any(row["fits"] for row in rows)  # fp16


def test_a_published_configuration_of_every_family(tmp_path):
    """Without weights and without torch; that the parameters are those that are known says that all was read."""
    for name, (config, _) in PUBLISHED.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    code = (
        "import io, json, sys; from contextlib import redirect_stdout; from edgeprune.cli.app import main\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    sys.argv = ['edgeprune', 'plan', f'{name}.json', '--device', 'jetson-orin', '--json']\n"
        "    with redirect_stdout(io.StringIO()) as text:\n"
        "        try: main()\n"
        "        except SystemExit as end: code = end.code\n"
        "    found[name] = [code, json.loads(text.getvalue() or 'null')]\n"
        "found['heavy'] = sorted({'torch', 'transformers', 'onnxruntime', 'onnx'} & set(sys.modules))\n"
        "print(json.dumps(found))"
    )
    words = [sys.executable, "-c", code, *PUBLISHED]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert found.pop("heavy") == []
    assert {name: code for name, (code, _) in found.items()} == dict.fromkeys(PUBLISHED, 0), result.stderr
    millions = {name: round(shown["parameters"] / 1e6, 2) for name, (_, shown) in found.items()}
    assert millions == {name: expected for name, (_, expected) in PUBLISHED.items()}
    assert all(shown["source"] == "estimated" and shown["decode_ms"] > 0 for _, shown in found.values())
    unseen = {"hunyuan_v1_dense"}  # whose configuration was not at hand as published
    assert {config["model_type"] for config, _ in PUBLISHED.values()} == set(FAMILIES) - unseen


def test_one_device(home):
    words = [
        "plan",
        "llama-3-70b",
        "--device",
        "jetson-orin",
        "--weights",
        "int4-128",
        "--prompt",
        "1024",
        "--past",
        "4096",
    ]
    result = run(*words, "--json", cwd=home)
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["fits"]
    assert 35e9 < shown["memory_bytes"] < 45e9
    parts, profile = shown["parts"]["decode_ms"], load_profile("jetson-orin")
    assert shown["decode_ms"] == pytest.approx(sum(parts.values()))
    assert parts["overhead"] == pytest.approx(80 * 1e-3 * profile.layer_overhead.value)
    read = profile.formats["int4"].decode_efficiency.value * 204.8e9
    assert parts["layers"] == pytest.approx(1e3 * 80 * 855_638_016 * (0.5 + 2 / 128) / read, rel=1e-3)
    text = run(*words, cwd=home).stdout
    for word in ("It fits", "estimated", "weights", "opset24 is assumed", "AGX Orin", "Edge-LLM", "mind"):
        assert word in text
    assert "cache copies" not in text
    older = run(*words[:4], "--tensorrt", "10.3", cwd=home).stdout
    for word in ("cache copies", "decode in place", "primitive is assumed", "older than 10.15"):
        assert word in older


def test_all_devices(home):
    result = run("plan", "llama-3-70b", "--weights", "int4", cwd=home)
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "yes" in lines["jetson-orin"]
    assert "no" in lines["l4"].split()
    assert "cpu" not in lines
    assert "estimated" in result.stdout


def test_this_machines_processor_is_probed_when_asked_for(home):
    config = json.dumps(SHAPES["llama-3-70b"] | {"num_hidden_layers": 1, "vocab_size": 1000})
    (home / "one-layer.json").write_text(config)
    result = run("plan", "one-layer.json", "--device", "cpu", "--json", cwd=home)
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert (shown["device"], shown["precision"], shown["source"]) == ("cpu", "fp32", "estimated")
    assert shown["decode_ms"] == shown["decode_in_place_ms"] > 0


CASES = {
    "no config": (["plan", "nowhere", "--device", "l4"], "no such model"),
    "no config file": (["plan", "nowhere.json"], "no such file"),
    "a directory without one": (["plan", "empty", "--device", "l4"], "has no config.json"),
    "a family without attention": (["plan", "mamba", "--device", "l4"], "unsupported architecture 'mamba'"),
    "an encoder and a decoder": (["plan", "t5", "--device", "l4"], "unsupported architecture 't5'"),
    "latent attention": (["plan", "deepseek", "--device", "l4"], "unsupported architecture 'deepseek_v3'"),
    "the families there are": (["plan", "mamba", "--device", "l4"], f"Supported are: {', '.join(FAMILIES)} ("),
    "unknown device": (["plan", "llama-3-70b", "--device", "jetson-orinn"], "jetson-orin"),
    "missing profile": (["plan", "llama-3-70b", "--profile", "none.toml"], "none.toml"),
    "both": (["plan", "llama-3-70b", "--device", "l4", "--profile", "none.toml"], "both"),
    "unknown precision": (["plan", "llama-3-70b", "--precision", "int2"], "fp32, fp16, bf16"),
    "fp16 on a processor": (["plan", "llama-3-70b", "--device", "cpu", "--precision", "fp16"], "--precision fp32"),
    "unknown weights": (["plan", "llama-3-70b", "--device", "l4", "--weights", "int3"], "float, int8, int4"),
    "several weights": (["plan", "llama-3-70b", "--device", "l4", "--weights", "int8,int4"], "A plan is of one"),
    "no prompt": (["plan", "llama-3-70b", "--device", "l4", "--prompt", "0"], "--prompt 0"),
    "no past": (["plan", "llama-3-70b", "--device", "l4", "--past", "0"], "--past 0"),
    "no batch": (["plan", "llama-3-70b", "--batch", "0"], "--batch 0"),
    "nothing": (["plan"], "CONFIG"),
}


@pytest.mark.parametrize(("words", "reason"), CASES.values(), ids=CASES)
def test_bad_input_is_one_message_with_a_remedy(home, words, reason):
    result = run(*words, cwd=home)
    assert result.returncode == 2, result.stderr
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_what_a_fit_takes_of_this_machine(home):
    """A small model has room here, 70 billion parameters have not; both are told without a weight."""
    (home / "small.json").write_text(
        json.dumps(SHAPES["llama-3-70b"] | {"hidden_size": 512, "intermediate_size": 1024})
    )
    words = ("--device", "jetson-orin", "--work")
    result = run("plan", "small.json", *words, "--json", cwd=home)
    assert result.returncode == 0, result.stderr
    taken = json.loads(result.stdout)["fit"]
    assert (taken["source"], taken["lacking"]) == ("estimated", [])
    assert taken["seconds"] == pytest.approx(
        sum(taken["work"][kind] / rate for kind, rate in taken["rates"].items()) + taken["work"]["seconds"]
    )
    assert 0 < taken["disk_bytes"] < taken["has_disk_bytes"]
    large = run("plan", "llama-3-70b", *words, cwd=home)
    assert large.returncode == 3, large.stderr
    for word in ("too little memory", "generation", "pruning", "TFLOP", "at most", "hours"):
        assert word in large.stdout
    alone = run("plan", "small.json", "--work", cwd=home)
    assert alone.returncode == 2
    assert "--work is of one device" in alone.stderr
