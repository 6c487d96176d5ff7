"""The model families: what each can lose, where it is stored and run, and how near its logits are to transformers'."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.checkpoint.quantization import can_be_packed
from edgeprune.model.gguf.metadata import BY_FAMILY, BY_LAYER

PARITY = Path(__file__).parent.parent / "model" / "checkpoint" / "parity.json"
"""The largest distances of logits by family and case, as `python -m tests.support.parity` measures them."""
HEADS = {
    "free": "any",
    "divide": "any; zeros fill a checkpoint up to a divisor of hidden_size",
    "whole": "any; zeros fill a checkpoint up to hidden_size",
    "fixed": "any; zeros fill a checkpoint up to hidden_size",
}


@dataclass(frozen=True)
class FamilyRow:
    """One family.

    heads: how many may be left; packed: whether a checkpoint holds weight formats; llama_cpp: its architecture there,
    by_layer: that of layers of different widths; dense, uniform, per_layer: the largest max|a - b| / max|b| of logits
    in fp32, of all cases of the family; runtimes: others that were tried.
    """

    family: str
    architecture: str
    heads: str
    packed: bool
    llama_cpp: str | None
    by_layer: str | None
    dense: float
    uniform: float
    per_layer: float
    runtimes: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def families() -> list[FamilyRow]:
    """Returns a row for every family, in the order of the docs' table."""
    measured: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(PARITY.read_text(encoding="utf-8")):
        measured.setdefault(row["family"], []).append(row)
    rows = []
    for name, cases in measured.items():
        family = FAMILIES[name]
        rows.append(
            FamilyRow(
                name,
                family.architecture,
                HEADS[family.heads],
                can_be_packed(name),
                next(iter(BY_FAMILY.get(name, ())), None),
                BY_LAYER.get(name),
                *(max(case[layout] for case in cases) for layout in ("dense", "uniform", "per_layer")),
                list(dict.fromkeys(runtime for case in cases for runtime in case["runtimes"])),
            )
        )
    return rows
