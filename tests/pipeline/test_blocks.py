"""A run whose weight formats are ggml's: what is refused before any work, and a candidate that is one GGUF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.engine.llamacpp import on_llamacpp
from edgeprune.errors import InputError
from edgeprune.model.gguf.weights import MODEL_FILE
from edgeprune.model.load import load_model
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.pipeline.journal import open_journal
from edgeprune.pipeline.stages import Run
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.profiles import OfferedFormats, load_profile, profile_toml
from edgeprune.progress import Silent
from edgeprune.search.solve import Allocation
from edgeprune.search.widths import Widths
from tests.support.checkpoints import save_llama
from tests.support.gguf_models import saved
from tests.support.llamacpp import VOCABULARY, LlamaCpp, save_merging_tokenizer
from tests.support.runs import journal_of, setup_of

Q4_K, Q5_1, Q6_K = (WEIGHT_FORMATS[name] for name in ("q4_k", "q5_1", "q6_k"))
PROMPT = [3, 5, 7, 11]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    more = {"num_hidden_layers": 2, "intermediate_size": 512, "max_position_embeddings": 128}
    save_llama(folder / "model", vocab_size=len(VOCABULARY), **sizes, **more, initializer_range=0.05)
    save_merging_tokenizer(folder / "model")
    texts = (f"the quick brown fox jumps over {number} lazy dogs and runs away " * 4 for number in range(40))
    (folder / "notes.txt").write_text("\n\n".join(texts))
    profile = on_llamacpp(load_profile("jetson-orin"))
    offers = {
        name: OfferedFormats(formats=[name], prefill=1, tables=name == "q6_k", source="x", confidence="low")
        for name in ("q4_k", "q5_1", "q6_k")
    }
    (folder / "mine.toml").write_text(profile_toml(profile.model_copy(update={"weights": offers})))
    return folder


def of_device(small: Path, output: Path, **changes: object):
    return setup_of(small, output, device=None, profile=small / "mine.toml", **changes)


@pytest.mark.parametrize(
    ("changes", "message", "remedy"),
    [
        ({"layout": "per-layer"}, "llama.cpp cannot run layers of different widths", "--layout uniform"),
        ({"export": ["gptq"]}, "a GPTQ checkpoint has no format q4_k, which a GGUF file holds alone", "--export gguf"),
        ({"weights": "q4_0"}, "does not run weights in q4_0 well", "float, q4_k, q5_1, q6_k"),
        ({"weights": "q2_k"}, "unknown weights 'q2_k'", "float, q4_k, q5_1, q6_k"),
    ],
)
def test_what_no_gguf_file_holds_is_refused_before_any_work(small, tmp_path, changes, message, remedy):
    with pytest.raises(InputError) as caught:
        of_device(small, tmp_path / "out", **changes)
    assert message in caught.value.message
    assert remedy in caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_a_scale_of_the_scores_that_llama_cpp_has_not_is_refused_in_few_bits_alone(small, tmp_path):
    """In floats the queries make up for it."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "intermediate_size": 512}
    saved(tmp_path / "model", "gemma2", **sizes)
    with pytest.raises(InputError, match="holds gemma2 with another scale of the scores") as caught:
        of_device(small, tmp_path / "out", model=tmp_path / "model")
    assert caught.value.remedy == "Use --weights float."
    assert of_device(small, tmp_path / "out", model=tmp_path / "model", weights="float").weights.layers == (None,)


@pytest.mark.slow
def test_a_candidate_is_one_file_with_what_the_walk_rounded(small, tmp_path):
    setup = of_device(small, tmp_path / "out")
    run = Run(setup, journal_of(tmp_path / "work"), Silent())
    layers = (Widths(4, 1, 256), Widths(4, 1, 256))
    allocation = Allocation(layers, len(VOCABULARY), 0.0, ((Q4_K, Q5_1), (None, Q4_K)), (Q6_K, Q6_K))
    candidate = run.candidate("candidate-1", allocation)
    model, folder = candidate.model, candidate.model.directory
    assert model.decoder.weight_formats == candidate.target.weight_formats
    assert not list(folder.glob("*.safetensors"))
    # Floats are those of the engine, norms and what few bits stand for are in fp32.
    assert model.weights["layers.1.attention.q"].dtype == torch.float16
    assert model.weights["layers.0.attention.norm"].dtype == torch.float32
    # The graphs that judge it compute with the same numbers as llama.cpp, which rounds inputs to 8 bits.
    runner = GraphRunner(candidate.runnable_graph, 1, 32)
    logits = runner.run(np.array([PROMPT]))[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    found = LlamaCpp(folder / MODEL_FILE).log_probabilities(PROMPT)
    assert np.abs(found - expected).max() < 0.15
    # A resumed run takes the file as it stands.
    run.journal.close()
    before = (folder / MODEL_FILE).stat().st_mtime_ns
    again = Run(setup, open_journal(tmp_path / "work", {}, resume=True, force=False), Silent())
    assert again.candidate("candidate-1", allocation).model.fingerprint == model.fingerprint
    assert (folder / MODEL_FILE).stat().st_mtime_ns == before
    again.journal.close()


@pytest.mark.slow
def test_a_fitted_model_is_a_dense_one_in_floats_of_the_same_values(small, tmp_path):
    setup = of_device(small, tmp_path / "out")
    run = Run(setup, journal_of(tmp_path / "work"), Silent())
    allocation = Allocation((Widths(4, 1, 512),) * 2, len(VOCABULARY), 0.0, ((Q4_K, Q4_K),) * 2, (None, None))
    folder = run.candidate("candidate-1", allocation).model.directory
    run.journal.close()
    fitted, alone = load_model(str(folder)), load_model(str(folder / MODEL_FILE))
    assert not alone.decoder.weight_formats
    for name, weight in fitted.weights.items():
        assert torch.equal(alone.weights[name].float(), weight.float()), name
    dense = setup_of(small, tmp_path / "next", model=folder).model
    assert torch.equal(dense.weights["layers.0.mlp.up"], fitted.weights["layers.0.mlp.up"])
    assert dense.dequantised == "edgeprune's own, q4_k"
