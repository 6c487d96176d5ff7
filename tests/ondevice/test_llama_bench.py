"""What is asked of llama-bench and made of its answers; the program is a test double."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgeprune.errors import EngineError
from edgeprune.ondevice import llama_bench, llama_tools
from edgeprune.ondevice.figures import Workload
from tests.support import ROOT
from tests.support.device import script

DOUBLE = ROOT / "tests/support/doubles/double_llama_bench.py"
WORKLOAD = Workload(1, 16, 64)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The double on the PATH; its calls are in the folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    script(tmp_path / "llama-bench", f'exec "{sys.executable}" {DOUBLE} "$@"')
    return tmp_path


def model(folder: Path, size: int) -> Path:
    path = folder / f"{size}.gguf"
    path.write_bytes(bytes(size))
    return path


def test_models_take_turns_and_a_step_is_the_mean_of_the_last_ones(program: Path) -> None:
    files = {"dense": model(program, 2_000_000), "candidate": model(program, 1_000_000)}
    found = llama_bench.measure_latency(files, WORKLOAD, 0.1)
    assert found["device"] == "a double's processor"
    assert found["prefill"]["dense"]["median"]["value"] == pytest.approx(32.0, rel=1e-4)  # 16 tokens of 2 MB
    assert found["decode"]["candidate"]["median"]["value"] == pytest.approx(10.0048, rel=1e-4)
    assert found["prefill"]["candidate"]["ratio"]["value"] == pytest.approx(0.5, rel=1e-4)
    calls = [json.loads(line) for line in (program / "llama-bench.calls").read_text().splitlines()]
    order = [Path(words[1]).stem for words in calls if words[words.index("-p") + 1] == "16"]
    assert order == ["2000000", "1000000", "1000000", "2000000", "2000000", "1000000"]


def test_a_short_context_has_fewer_steps(program: Path) -> None:
    llama_bench.measure_latency({"one": model(program, 1000)}, Workload(1, 2, 8), 0.1)
    calls = [json.loads(line) for line in (program / "llama-bench.calls").read_text().splitlines()]
    assert {tuple(words[words.index("-n") :][:4]) for words in calls} >= {("-n", "7", "-d", "1")}


def test_memory_is_the_process_s_own_peak(program: Path) -> None:
    found = llama_bench.measure_memory(model(program, 1000), WORKLOAD)
    assert 0 < found["baseline"] <= found["peak"] < 2**30


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("print('[]')", "answers what cannot be"),
        ("print('no JSON')", "answers what cannot be"),
        ('print(\'[{"n_prompt": 16, "n_gen": 0, "n_depth": 0, "samples_ns": [1, 0, 1]}]\')', "something else"),
        ('print(\'[{"n_prompt": 8, "n_gen": 0, "n_depth": 0, "samples_ns": [1, 1, 1]}]\')', "something else"),
        ("import sys; sys.exit('CUDA error: out of memory')", "failed: CUDA error: out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "it printed no reason"),
    ],
)
def test_what_cannot_be_is_an_error(program: Path, answer: str, reason: str) -> None:
    (program / "answer.py").write_text(answer)
    script(program / "llama-bench", f'exec "{sys.executable}" {program}/answer.py')
    with pytest.raises(EngineError, match=reason) as raised:
        llama_bench.run_of(model(program, 1000), WORKLOAD, "prefill")()
    assert raised.value.remedy


def facts(found: dict[str, str] | None, version: str | None = None, sm: int | None = None) -> dict:
    gpu = None if sm is None else {"name": "Orin", "sm": sm}
    return {"modules": {"xllamacpp": version}, "llama_bench": found, "gpu": gpu}


def test_what_measures_is_the_package_on_a_processor_and_else_the_program(program: Path, monkeypatch) -> None:
    monkeypatch.setenv("DOUBLE_GPU", "CUDA0: Orin (62841 MiB, 60000 MiB free)")
    found = llama_tools.find()
    assert (found["path"], found["problem"]) == (str(program / "llama-bench"), "")
    assert found["gpus"].startswith("CUDA0: Orin")
    assert llama_tools.refusal_of(facts(None, "2026.10"), None) is None
    assert llama_tools.tool_of(facts(found, "2026.10"), None) == ("llama.cpp", "2026.10")
    for known, sm in ((facts(found, "2026.10"), 87), (facts(found, None, 87), 87), (facts(found), None)):
        assert llama_tools.refusal_of(known, sm) is None
        tool, version = llama_tools.tool_of(known, sm)
        assert tool == "llama-bench"
        assert version.startswith(found["path"])


def test_what_cannot_measure_is_told(program: Path, monkeypatch) -> None:
    found = llama_tools.find()
    assert "was built without a GPU, or finds none" in llama_tools.refusal_of(facts(found, "2026.10"), 87)
    gpu = found | {"gpus": "CUDA0: Orin"}
    assert llama_tools.refusal_of(facts(gpu, None, 87), 101) == "it has a Orin of SM 87, not of SM 101"
    monkeypatch.setenv("DOUBLE_RELEASE", "old")
    assert "is too old: it has no -d" in llama_tools.refusal_of(facts(llama_tools.find()), None)
    monkeypatch.setenv("PATH", "/nowhere")
    assert llama_tools.find() is None
    assert llama_tools.refusal_of(facts(None), None) == "it has no llama-bench on its PATH"
