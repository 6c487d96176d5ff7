"""Small random Llamas, and a runner that feeds a written graph step by step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgeprune.engine.onnx.graph import GraphFiles, GraphVariant, write_graphs
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.onnxruntime import ELEMENTS, open_session
from tests.support.reference import decoder_of, weights_of

VARIANTS = tuple(
    GraphVariant(dialect, logits)
    for dialect in ("opset24", "opset23", "primitive", "onnxruntime")
    for logits in ("all", "last")
)


def llama(tied: bool, **changes: object) -> LlamaForCausalLM:
    """3 layers, hidden 96, 6 query and 2 key/value heads of 16, vocabulary 200; norms are random too."""
    settings = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 200,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


@dataclass(frozen=True)
class Sample:
    """Two sequences, the second padded on the left: ids, mask, positions (2, tokens) int64; embeddings (2, tokens,
    hidden_size), for graphs that read these."""

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    embeddings: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


def sample(tokens: int, vocabulary: int = 200, padding: int = 5) -> Sample:
    """Positions count the real tokens; those of the first sequence leap once, so that ignoring them shows."""
    rng = np.random.default_rng(1)
    mask = np.ones((2, tokens), np.int64)
    mask[1, :padding] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    positions[0, 11:] += 9
    return Sample(rng.integers(0, vocabulary, (2, tokens)), mask, positions)


@torch.inference_mode()
def reference_logits(model: LlamaForCausalLM, batch: Sample) -> np.ndarray:
    """(2, tokens, vocabulary) fp32, of all positions at once and without a cache."""
    mask, positions = torch.from_numpy(batch.mask), torch.from_numpy(batch.positions)
    ids = torch.from_numpy(batch.ids)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.float().numpy()


def write(model: LlamaForCausalLM, folder: Path, precision: str = "fp32", decoder: Decoder | None = None) -> GraphFiles:
    return write_graphs(decoder or decoder_of(model.config), weights_of(model), folder, precision, VARIANTS)


def session(path: Path) -> onnxruntime.InferenceSession:
    return open_session(path, threads=1, exact=True)


def run_steps(
    path: Path, batch: Sample, steps: list[int], capacity: int | None = None, exact: bool = True
) -> list[np.ndarray]:
    """Logits of each step. The cache grows, or is one buffer of `capacity` tokens that the graph updates.

    A graph of opset 24 has a capacity of its own.
    """
    runner = open_session(path, 1, exact)
    binding = runner.io_binding()
    inputs = {value.name: value for value in runner.get_inputs()}
    written = "write_indices" in inputs
    cache = {}
    for value in inputs.values():
        if not value.name.startswith("past_key_values"):
            continue
        dtype = ELEMENTS[value.type]
        capacity = value.shape[2] if written else capacity
        left = 77 if dtype == np.int8 else 7.0 if written else np.nan  # must not matter; a mask hides no NaN
        empty = np.full((2, value.shape[1], capacity or 0, value.shape[3]), left, dtype)
        cache[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
    names = ["logits", *(name.replace("past_key_values", "present") for name in cache)]
    logits, start = [], 0
    for length in steps:
        end = start + length
        reads, given = ("input_ids", batch.ids) if "input_ids" in inputs else ("inputs_embeds", batch.embeddings)
        binding.bind_cpu_input(reads, np.ascontiguousarray(given[:, start:end]))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(batch.positions[:, start:end]))
        mask = batch.mask[:, :end]
        if written:
            mask = np.pad(mask, ((0, 0), (0, capacity - end)), constant_values=1)  # free slots are hidden anyway
            binding.bind_cpu_input("write_indices", np.full(2, start))
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask))
        binding.bind_output("logits")
        for name, value in cache.items():
            present = name.replace("past_key_values", "present")
            binding.bind_ortvalue_input(name, value)
            if capacity is None:
                binding.bind_output(present)
            else:
                binding.bind_ortvalue_output(present, value)
        runner.run_with_iobinding(binding)
        outputs = dict(zip(names, binding.get_outputs(), strict=True))
        logits.append(outputs["logits"].numpy().copy())
        if capacity is None:
            cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        binding.clear_binding_outputs()
        binding.clear_binding_inputs()
        start = end
    return logits


PREFILL = 20


WALKS = {"decode": [PREFILL, *[1] * 32], "chunks": [PREFILL, 7, 2, 23]}


def assert_same(
    logits: list[np.ndarray],
    walk: list[int],
    variant: GraphVariant,
    reference: np.ndarray,
    batch: Sample,
    tolerance: float,
) -> None:
    """max|a - b| / max|b| over all real positions, and the same argmax but for near ties."""
    wanted, real, start = [], [], 0
    for length in walk:
        first = start if variant.logits == "all" else start + length - 1
        wanted.append(reference[:, first : start + length])
        real.append(batch.mask[:, first : start + length] > 0)
        start += length
    ours = np.concatenate(logits, axis=1).astype(np.float32)[np.concatenate(real, axis=1)]
    theirs = np.concatenate(wanted, axis=1)[np.concatenate(real, axis=1)]
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < tolerance
    top = np.sort(theirs, axis=-1)
    clear = top[:, -1] - top[:, -2] >= max(1e-3, 2 * tolerance * np.abs(theirs).max())
    assert clear.mean() > 0.5
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()


def check(model: LlamaForCausalLM, folder: Path, decoder: Decoder | None = None) -> None:
    files = write(model, folder, "fp32", decoder)
    batch = sample(sum(WALKS["decode"]))
    reference = reference_logits(model, batch)
    for variant, path in files.graphs.items():
        for walk in WALKS.values():
            for capacity in (None, 64) if variant.dialect == "onnxruntime" else (None,):
                logits = run_steps(path, batch, walk, capacity)
                assert_same(logits, walk, variant, reference, batch, 1e-5)
