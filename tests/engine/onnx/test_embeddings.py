"""Graphs that read embeddings give of tokens what those of tokens do, and of images what the whole model does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.model.checkpoint.nested import MERGED
from edgeprune.model.load import load_model
from edgeprune.pipeline.stages import OF_EMBEDDINGS
from tests.support import parity
from tests.support.graph_models import Sample, llama, run_steps, sample, session
from tests.support.reference import decoder_of, weights_of
from tests.support.roundings import mixed, rounded
from tests.support.rtx import build
from tests.support.wholes import IMAGE_IDS, WHOLES, save_whole

WALK = [20, *[1] * 8, 5]
PICTURES = {
    "mistral3": {"pixel_values": (1, 3, 56, 28), "image_sizes": torch.tensor([[56, 28]])},
    "smolvlm": {"pixel_values": (1, 1, 3, 28, 28)},
    "idefics3": {"pixel_values": (1, 1, 3, 28, 28)},
    "llava": {"pixel_values": (1, 3, 28, 28)},
}


def embedded(path: Path, ids: np.ndarray) -> np.ndarray:
    (embeddings,) = session(path).run(None, {"input_ids": ids})
    return embeddings


def steps(path: Path, batch: Sample, variant: GraphVariant) -> np.ndarray:
    return np.concatenate(run_steps(path, batch, WALK, 64 if variant.dialect == "onnxruntime" else None), axis=1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("formats", ["floats", "mixed"])
def test_tokens_give_what_they_give_in_the_graph_of_tokens(formats: str, tied: bool, tmp_path: Path) -> None:
    model = llama(tied)
    decoder, weights = replace(decoder_of(model.config), embedding_scale=3.0), weights_of(model)
    if formats == "mixed":
        decoder = mixed(decoder)
        weights = rounded(decoder, weights)
    both = [*OF_EMBEDDINGS, *(replace(variant, reads="tokens") for variant in OF_EMBEDDINGS)]
    files, batch = write_graphs(decoder, weights, tmp_path, "fp32", both), sample(sum(WALK))
    for variant in OF_EMBEDDINGS:
        given = replace(batch, embeddings=embedded(tmp_path / variant.embedding_filename, batch.ids))
        assert given.embeddings.shape == (2, sum(WALK), 96)
        wanted = steps(files.graphs[replace(variant, reads="tokens")], batch, variant)
        assert np.array_equal(steps(files.graphs[variant], given, variant), wanted), variant


@pytest.mark.slow
@pytest.mark.parametrize("kind", MERGED)
def test_images_give_what_they_give_in_the_whole_model(kind: str, tmp_path: Path) -> None:
    whole, given = save_whole(tmp_path / "whole", kind), dict(PICTURES[kind])
    model, seen = load_model(str(tmp_path / "whole")), []
    given["pixel_values"] = torch.rand(given["pixel_values"], generator=torch.Generator().manual_seed(0))
    text = whole.model.text_model if hasattr(whole.model, "text_model") else whole.model.language_model
    text.register_forward_pre_hook(lambda *call: seen.append(call[2]["inputs_embeds"]), with_kwargs=True)
    ids = torch.randint(20, 257, (1, sum(WALK)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        images = torch.cat(list(whole.get_image_features(**given).pooler_output))
        ids[0, 3 : 3 + len(images)] = IMAGE_IDS["image_token_id"]
        theirs = whole(input_ids=ids, **given, use_cache=False).logits.numpy()
    assert len(images) > 0
    batch = Sample(ids.numpy(), np.ones_like(ids), np.arange(sum(WALK))[None], seen[-1].numpy())
    batch = Sample(*(np.repeat(part, 2, axis=0) for part in vars(batch).values()))  # run_steps takes two
    files = write_graphs(model.decoder, model.weights, tmp_path, "fp32", OF_EMBEDDINGS)
    for variant, path in files.graphs.items():
        # The tokens of an image are embedded by the image part, all others by the graph.
        tokens = embedded(tmp_path / variant.embedding_filename, batch.ids)
        assert np.abs(tokens - batch.embeddings)[batch.ids != IMAGE_IDS["image_token_id"]].max() < 1e-6
        assert np.abs(tokens - batch.embeddings)[batch.ids == IMAGE_IDS["image_token_id"]].max() > 1e-2
        ours = steps(path, batch, variant)  # of the last position of each step
        ends = np.cumsum(WALK) - 1
        assert parity.distance(ours, np.repeat(theirs[:, ends], 2, axis=0)) < 1e-5, variant


def test_every_whole_is_told_from_those_that_give_images_more_than_embeddings() -> None:
    assert set(WHOLES) - set(MERGED) == {"gemma3", "qwen2_5_vl", "qwen3_vl"}
    assert set(PICTURES) == set(MERGED)


@pytest.mark.slow
def test_tensorrt_builds_them(tmp_path: Path) -> None:
    model = llama(True)
    variants = [variant for variant in OF_EMBEDDINGS if variant.dialect != "onnxruntime"]
    files = write_graphs(decoder_of(model.config), weights_of(model), tmp_path, "fp16", variants)
    for variant in variants:
        assert build(files.graphs[variant]).figure("Total Weights Memory") > 0
        build(tmp_path / variant.embedding_filename)
