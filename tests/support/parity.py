"""Logits of a family's graphs against transformers', dense and pruned.

`python -m tests.support.parity` writes the table in docs/families.md, and what `edgeprune doctor --families` shows.

Errors are max|a - b| / max|b| over all real positions of a batch of two, the second padded on the left, over a
prefill and 16 decode steps and all variants.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from edgeprune.commands.families import PARITY
from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import token_logits
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.save import save_checkpoint
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.prune import prune, result_of
from tests.support import DOCS
from tests.support.families import BASE, CASES, COMPILED, CONTINUED, EXPORTED, save_family
from tests.support.graph_models import VARIANTS, Sample, reference_logits, run_steps, sample
from tests.support.llamagen import LlamaGen, load_directory
from tests.support.roundings import Stored, numbers

WALK = [20, *[1] * 16]
METHOD = METHODS["default"]
PAGE = DOCS / "families.md"
LAYOUTS = ("dense", "uniform", "per_layer")
MARKS = "<!-- parity: begin -->", "<!-- parity: end -->"
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Dense:
    """A saved model of transformers, or of the original's code, and what load_model makes of it."""

    reference: PreTrainedModel | LlamaGen
    model: Model


def dense(folder: Path, case: str) -> Dense:
    return Dense(save_family(folder, case), load_model(str(folder)))


def calibration() -> torch.Tensor:
    return torch.randint(2, BASE["vocab_size"], (8, 48), generator=torch.Generator().manual_seed(0))


def target_of(decoder: Decoder) -> Decoder:
    """About 30 % fewer parameters in the layers: a group, or a query head where there is one group, and channels."""
    groups, heads, channels = decoder.layer_widths[0]
    cut = (groups - 1, heads) if groups > 1 else (groups, max(1, heads - 1))
    return decoder.with_widths(*cut, 32 * round(0.7 * channels / 32))


def uneven_target(decoder: Decoder) -> Decoder:
    """Other channels in every layer; one layer without attention, one without MLP."""
    groups, heads, channels = decoder.layer_widths[0]
    return decoder.with_layer_widths([(groups, heads, channels - 32), (0, 1, 32), (groups, heads, 0)])


def pruned(model: Model, target: Decoder) -> tuple[Decoder, dict[str, torch.Tensor]]:
    return result_of(target, METHOD), dict(prune(model, target, calibration(), METHOD, 0))


def as_transformers(model: Model, decoder: Decoder, weights: Weights, folder: Path) -> PreTrainedModel | LlamaGen:
    """The saved checkpoint as `from_pretrained` loads it, without any code but its own; LlamaGen's by its own names."""
    save_checkpoint(decoder, weights.items(), model, folder)
    if decoder.family == "llamagen":
        loaded = load_directory(folder, original_widths(decoder))
    else:
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        loaded, notes = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
        if notes["missing_keys"] or notes["unexpected_keys"] or notes["mismatched_keys"]:
            raise AssertionError(notes)
    if load_model(str(folder)).decoder.layer_widths != decoder.layer_widths:
        raise AssertionError("the checkpoint is read as another model than was saved")
    return loaded.eval()


def original_widths(decoder: Decoder) -> list[tuple[int, int, int]]:
    """Heads, groups and channels of every layer."""
    return [(groups * heads, groups, channels) for groups, heads, channels in decoder.layer_widths]


def batch() -> Sample:
    return sample(sum(WALK), BASE["vocab_size"])


def graph_errors(wanted: np.ndarray, decoder: Decoder, weights: Weights, folder: Path) -> dict[GraphVariant, float]:
    given, errors = batch(), {}
    files = write_graphs(decoder, weights, folder, "fp32", VARIANTS)
    for variant, path in files.graphs.items():
        for capacity in (None, 64) if variant.dialect == "onnxruntime" else (None,):
            found = np.concatenate(run_steps(path, given, WALK, capacity), axis=1)
            first = 0 if variant.logits == "all" else WALK[0] - 1
            real, theirs = given.mask[:, first:] > 0, wanted[:, first:]
            error = np.abs(found - theirs)[real].max() / np.abs(theirs[real]).max()
            errors[variant] = max(errors.get(variant, 0.0), float(error))
    return errors


def torch_logits(decoder: Decoder, weights: Weights, ids: torch.Tensor) -> np.ndarray:
    """Of our own walk over these weights: (samples, tokens - 1, vocabulary)."""
    stream = ((name, weights[name]) for name in decoder.shapes())
    return token_logits(decoder, stream, ids).numpy()


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def stored_errors(decoder: Decoder, stored: Stored, folder: Path, exact: bool = True) -> dict[GraphVariant, float]:
    """Of the graphs of weights in formats against our own walk over the numbers that these stand for."""
    ids = calibration()[:2, :21] % decoder.vocab_size
    wanted, errors = torch_logits(decoder, numbers(stored), ids), {}
    whole = Sample(ids[:, :20].numpy(), np.ones((2, 20), np.int64), np.arange(20)[None].repeat(2, 0))
    for variant, path in write_graphs(decoder, stored, folder, "fp32", VARIANTS).graphs.items():
        found = np.concatenate(run_steps(path, whole, [18, 1, 1], exact=exact), axis=1)
        errors[variant] = distance(found, wanted[:, 20 - found.shape[1] :])
    return errors


def reference(model: PreTrainedModel) -> np.ndarray:
    return reference_logits(model, batch())


def row(case: str, folder: Path) -> tuple[float, float, float]:
    """Largest errors: dense, pruned uniform, pruned per layer (against our own walk)."""
    whole = dense(folder / "dense", case)
    model = whole.model
    first = graph_errors(reference(whole.reference), model.decoder, model.weights, folder / "graph")
    decoder, weights = pruned(model, target_of(model.decoder))
    loaded = as_transformers(model, decoder, weights, folder / "pruned")
    second = graph_errors(reference(loaded), decoder, weights, folder / "pruned-graph")
    return max(first.values()), max(second.values()), uneven_error(model, folder / "uneven")


def uneven_error(model: Model, folder: Path) -> float:
    """Of the graphs of a per-layer candidate in standard operators against our own walk over its weights."""
    decoder, weights = pruned(model, uneven_target(model.decoder))
    variants, ids = [GraphVariant("opset24", "all"), GraphVariant("opset23", "all")], calibration()[:2, :37]
    files, wanted = write_graphs(decoder, weights, folder, "fp32", variants), torch_logits(decoder, weights, ids)
    whole = Sample(ids.numpy(), np.ones_like(ids.numpy()), np.arange(37)[None].repeat(2, 0))
    found = (np.concatenate(run_steps(path, whole, [30, 1, 6]), axis=1) for path in files.graphs.values())
    return max(distance(logits[:, :-1], wanted) for logits in found)


def measured() -> Iterator[dict[str, Any]]:
    """A row for every case, as edgeprune's own file has it."""
    for case in CASES:
        family, _, variant = case.partition(", ")
        with tempfile.TemporaryDirectory() as folder:
            errors = (float(f"{error:.0e}") for error in row(case, Path(folder)))
            layouts = dict(zip(LAYOUTS, errors, strict=True))
        yield {"family": family, "case": variant or "plain", **layouts, "runtimes": runtimes_tried(case)}
        sys.stderr.write(f"{case}: {layouts}\n")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| family | class | case | dense | uniform | per layer | other runtimes tried |",
        "|---|---|---|---|---|---|---|",
    ]
    for of in rows:
        errors = " | ".join(f"{of[layout]:.0e}" for layout in LAYOUTS)
        runtimes = ", ".join(of["runtimes"]) or "none"
        lines.append(
            f"| {of['family']} | {FAMILIES[of['family']].architecture} | {of['case']} | {errors} | {runtimes} |"
        )
    return "\n".join(lines)


def runtimes_tried(case: str) -> list[str]:
    """Those whose tests have the case."""
    tried = {"llama.cpp": EXPORTED, "genai": CONTINUED, "RTX": COMPILED}
    return [name for name, cases in tried.items() if case in cases]


def main() -> None:
    logging.set_verbosity_error()
    begin, end = MARKS
    text = PAGE.read_text(encoding="utf-8")
    rows = list(measured())
    PARITY.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    made = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{table(rows)}\n{end}", text, flags=re.DOTALL)
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
