"""A model and its rounded form as a pair of files: llama.cpp takes the one as the draft of the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.model.gguf.export import export_gguf
from edgeprune.model.load import load_model
from edgeprune.precision import WEIGHT_FORMATS
from tests.support.checkpoints import save_llama
from tests.support.llamacpp import LlamaCpp, save_merging_tokenizer
from tests.support.rounded_models import rounded

PROMPT = [3, 5, 7, 11, 200, 100, 50, 25, 12, 6, 9, 8, 4]
COUNT = 40


@pytest.mark.slow
def test_llama_cpp_answers_with_a_draft_as_without_and_takes_its_guesses(tmp_path: Path) -> None:
    save_llama(tmp_path / "model", num_hidden_layers=2, vocab_size=260, initializer_range=0.2)
    save_merging_tokenizer(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    target = export_gguf(model, tmp_path / "target.gguf")
    small = rounded(model, model.decoder.with_format(WEIGHT_FORMATS["int8"]), tmp_path / "small")
    draft = export_gguf(small, tmp_path / "draft.gguf")
    alone = LlamaCpp(target).generate(PROMPT, COUNT)
    reply = LlamaCpp(target, draft=draft).reply(PROMPT, COUNT)
    assert [token["id"] for token in reply["choices"][0]["logprobs"]["content"]] == [token["id"] for token in alone]
    timings = reply["timings"]
    assert 0 < timings["draft_n_accepted"] <= timings["draft_n"]
