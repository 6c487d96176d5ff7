"""The runner of GGUF files against the reference walk, with the real llama.cpp, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.errors import EngineError
from edgeprune.model.gguf.export import export_gguf
from edgeprune.model.load import load_model
from edgeprune.ondevice import llamacpp
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.llamacpp import Library, LlamaRunner, measure_latency
from tests.support.checkpoints import save_llama
from tests.support.llamacpp import VOCABULARY, save_merging_tokenizer

CONTEXT = 48
IDS = np.random.default_rng(0).integers(0, len(VOCABULARY), (1, 24))
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
CLOSE = 0.01  # of the largest logit: the KV cache is in fp16


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """llama.cpp takes all cores, and its threads wait for each other in loops: other tests would hold them up."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and its file in floats without a tokenizer, as models to be timed are."""
    folder = tmp_path_factory.mktemp("files")
    save_llama(folder / "model", vocab_size=len(VOCABULARY), hidden_size=64, initializer_range=0.2, **HEADS)
    save_merging_tokenizer(folder / "model")
    return folder / "model", export_gguf(load_model(str(folder / "model")), folder / "model.gguf", has_tokenizer=False)


def logits_of(checkpoint: Path, ids: np.ndarray) -> np.ndarray:
    """transformers' logits (tokens, vocabulary)."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(checkpoint)(torch.from_numpy(ids)).logits[0].numpy()


def test_its_logits_are_those_of_transformers(files: tuple[Path, Path]) -> None:
    """After a prompt, after a step, behind a shorter past, and where a prompt is longer than a batch."""
    checkpoint, file = files
    expected, runner = logits_of(checkpoint, IDS), LlamaRunner(file, CONTEXT)
    close = {"rtol": 0, "atol": CLOSE * np.abs(expected).max()}
    assert (runner.batch, runner.vocab_size) == (1, len(VOCABULARY))
    np.testing.assert_allclose(runner.run(IDS[:, :20])[0], expected[19], **close)
    np.testing.assert_allclose(runner.run(IDS[:, 20:21])[0], expected[20], **close)
    runner.reset(7)
    np.testing.assert_allclose(runner.run(IDS[:, 7:12])[0], expected[11], **close)
    runner.reset()
    runner._part = 8
    np.testing.assert_allclose(runner.run(IDS)[0], expected[-1], **close)


def test_the_cache_is_filled_where_a_longer_past_is_asked_for(files: tuple[Path, Path]) -> None:
    runner = LlamaRunner(files[1], CONTEXT)
    runner.reset(CONTEXT - 1)
    assert runner.past == CONTEXT - 1
    runner.run(IDS[:, :1])
    with pytest.raises(EngineError, match="do not fit into the cache of 48") as raised:
        runner.run(IDS[:, :1])
    assert "Shorten" in raised.value.remedy


def test_files_are_timed_in_turn(files: tuple[Path, Path]) -> None:
    found = measure_latency({"dense": files[1], "candidate": files[1]}, Workload(1, 8, CONTEXT), 0.1)
    for kind in ("prefill", "decode"):
        assert list(found[kind]) == ["dense", "candidate"]
        assert "ratio" in found[kind]["candidate"]
        assert found[kind]["dense"]["median"]["value"] > 0


def test_what_is_no_file_is_refused_with_llama_cpp_s_reason(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and nothing else")
    with pytest.raises(EngineError, match=r"llama.cpp cannot load .*model.gguf: \w+"):
        LlamaRunner(path, CONTEXT)


def test_a_release_with_another_interface_is_refused(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(llamacpp._FUNCTIONS, "llama_of_tomorrow", (None, ()))
        with pytest.raises(
            EngineError, match="has another llama.cpp than is known: it has no llama_of_tomorrow"
        ) as error:
            Library()
        assert "--upgrade xllamacpp" in error.value.remedy
    monkeypatch.setattr(llamacpp, "_DEFAULTS", (512, 2048, 512, 2))
    with pytest.raises(EngineError, match="a context begins with"):
        LlamaRunner(files[1], CONTEXT)
