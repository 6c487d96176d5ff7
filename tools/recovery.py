"""The cells and the table of docs/quality.md about recovery: what a training toward the dense model wins back.

They are run by tools/quality.py (`recover`) on its texts and samples. The model is the demo's, turned
(tools/turned.py), so that no weight lies on an old grid. The training reads the 16 calibration samples and text that
the dense model writes; the held-out rows that choose are of the latter.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
from edgeprune.evaluate.perplexity import Losses, log_rise, text_losses
from edgeprune.generate.text import generate_documents
from edgeprune.model.forward import WeightStream, weight_stream
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.save import save_checkpoint
from edgeprune.ondevice.machine import peak_bytes, reset_peak_bytes
from edgeprune.ondevice.onnxruntime import GRAPH_FILE
from edgeprune.pipeline.comparison import Comparison, Layout, WidthRule, generate_samples
from edgeprune.pipeline.kind import Language
from edgeprune.pipeline.packing import GENERATED
from edgeprune.pipeline.recovery import FIRST_SEED, with_continued
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.progress import Silent
from edgeprune.pruning.effort import RANK, ROW, Effort
from edgeprune.pruning.methods import DEFAULT, METHODS
from edgeprune.pruning.prune import prune, result_of
from edgeprune.pruning.recover import Rows, recover, rows_of
from tools.pages import table
from tools.turned import turned

if TYPE_CHECKING:
    from edgeprune.model.decoder import Decoder
    from tools.quality import Texts

CALIBRATION, LENGTH = 16, 512
STEPS = (60, 240)
CHANNELS = 1216  # of 1536: 20 % of them are cut


@dataclass(frozen=True)
class RecoveryCell:
    """One model and one training. ratio: of attention and MLP parameters that go, 0: only channels do, down to
    CHANNELS; form: that the layers' matrices are rounded to; steps: 0: none; rank: of what matrices are changed by,
    None where they are trained whole."""

    ratio: float
    form: str | None
    steps: int
    rank: int | None = None

    @property
    def key(self) -> str:
        cell = asdict(self)
        return json.dumps(cell if self.rank else {name: cell[name] for name in ("ratio", "form", "steps")})

    @property
    def start(self) -> RecoveryCell:
        """Returns the same model before its training."""
        return replace(self, steps=0, rank=None)


def recovery_cells() -> Iterator[RecoveryCell]:
    """Returns the cells, the most informative first."""
    for ratio, form in ((0.3, None), (0.2, None), (0.0, "int4-64")):
        for steps in (0, *STEPS):
            yield RecoveryCell(ratio, form, steps)
    yield RecoveryCell(0.3, None, STEPS[0], RANK)


class RecoveryBench:
    """Runs cells on the turned model. work: a folder where pruned models, the dense model's own text and the state of a
    training are kept, so that a run that was ended goes on."""

    def __init__(self, texts: Texts, work: Path) -> None:
        self.texts, self.work = texts, work
        self.demo = load_model("demo")
        self.model = turned(self.demo)
        self.ids = torch.from_numpy(texts.rows(CALIBRATION, 0))
        work.mkdir(parents=True, exist_ok=True)

    def dense(self) -> dict[str, Any]:
        """Returns the dense model's line: its nats by excerpt."""
        return {"nats": _nats(self._dense_losses)}

    @functools.cached_property
    def _dense_losses(self) -> dict[str, Losses]:
        return self._losses(self.model.decoder, weight_stream(self.model))

    def _losses(self, decoder: Decoder, stream: WeightStream) -> dict[str, Losses]:
        return text_losses(decoder, stream, self.texts.evaluation, LENGTH)

    def run(self, cell: RecoveryCell) -> dict[str, Any]:
        """Returns a cell's line: the rise on each text, the divergence on the held-out rows, CPU minutes and memory."""
        model, row = self._pruned(cell), {}
        stream: WeightStream = weight_stream(model)
        if cell.steps:
            state = self.work / f"state-{cell.ratio:g}-{cell.form}-{cell.steps}-{cell.rank}"
            state.mkdir(exist_ok=True)
            reset_peak_bytes()
            start, rows = time.process_time(), Rows(rows_of(self.ids, ROW), self._draw, ROW, 0)
            stream, done = recover(
                self.model,
                model,
                rows,
                Effort(cell.steps),
                state,
                torch.float32,
                rank=cell.rank,
                on_step=lambda *at: print(*at, flush=True),
            )
            row = asdict(done) | {"cpu_seconds": time.process_time() - start, "peak_bytes": peak_bytes()}
        losses = self._losses(model.decoder, stream)
        rises = {text: log_rise(self._dense_losses[text], fitted, 0) for text, fitted in losses.items()}
        return {"rise": rises, "nats": _nats(losses), **{"seconds": 0.0, **row}}

    def _draw(self, first: int, count: int) -> torch.Tensor:
        """Returns rows of the dense model, as `edgeprune fit` draws them."""
        path, seed = self.work / f"rows-{first}-{count}.npy", FIRST_SEED + first

        def own(count: int) -> np.ndarray:
            return generate_documents(self._graph, self.demo.directory, count, ROW, seed, Silent())

        if not path.exists():
            np.save(path, with_continued(own, self._graph, self.ids.numpy(), count, ROW, seed))
        return torch.from_numpy(np.load(path))

    @functools.cached_property
    def _graph(self) -> Path:
        """Returns the dense model's graph, whose function is that of the turned one."""
        folder = self.work / "graph"
        if not (folder / GRAPH_FILE).exists():
            write_graphs(self.demo.decoder, self.demo.weights, folder, "fp32", [ONNXRUNTIME_GRAPH], LENGTH)
        return folder / GRAPH_FILE

    def _written(self, first: int, count: int, length: int, seed: int) -> torch.Tensor:
        path = self.work / f"own-{length}-{first}-{count}.npy"
        if not path.exists():
            np.save(path, generate_samples(self.demo, Language(), count, length, seed, Silent()).numpy())
        return torch.from_numpy(np.load(path))

    def _pruned(self, cell: RecoveryCell) -> Model:
        """Returns the pruned model of a cell, from its checkpoint where that is there."""
        generated = self._written(0, GENERATED, LENGTH, 0)
        path, dense = self.work / f"pruned-{cell.ratio:g}-{cell.form}", self.model.decoder
        if not path.exists():
            if cell.ratio:
                given = self.model, self.ids, generated, self.texts.evaluation, LENGTH, 0, Silent()
                target = Comparison(*given).target(cell.ratio, Layout.UNIFORM, WidthRule.SENSITIVITY)
            else:
                attention = dense.layers[0].attention
                groups, heads = attention.num_key_value_heads, attention.heads_per_group
                target = dense.with_widths(groups, heads, CHANNELS)
            target = target.with_format(None if cell.form is None else WEIGHT_FORMATS[cell.form])
            stream = prune(self.model, target, self.ids, METHODS[DEFAULT], 0, generated=generated)
            part = path.with_name(path.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            save_checkpoint(result_of(target, METHODS[DEFAULT]), stream, self.model, part, dtype=torch.float32)
            part.rename(path)
        return load_model(str(path))


def _nats(losses: Mapping[str, Losses]) -> dict[str, list[float]]:
    return {text: of.nats.round(3).tolist() for text, of in losses.items()}


def recovery_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of rises before and after each training, and the share of the rise that it won back; nothing
    where no cell was run."""
    texts, rows = (), []
    for cell in recovery_cells():
        row, start = cells.get(cell.key), cells.get(cell.start.key)
        if row is None or start is None:
            continue
        texts = tuple(row["rise"])
        what = f"{100 * cell.ratio:.0f} %" if cell.ratio else "20 % of the channels"
        what += f", {cell.form}" if cell.form else ""
        columns = [what, str(cell.steps) + (f", of rank {cell.rank}" if cell.rank else "")]
        for text in texts:
            rise, before = row["rise"][text], start["rise"][text]
            won = f", {100 * (1 - rise[0] / before[0]):.0f} % won back" if cell.steps else ""
            columns.append(f"{rise[0]:.3f} [{rise[1]:.3f}, {rise[2]:.3f}]{won}")
        if cell.steps:
            columns += [
                f"{row['before']:.3f} to {row['after']:.3f}",
                f"{row['cpu_seconds'] / 60:.0f}",
                f"{row['peak_bytes'] / 2**30:.1f} GiB",
            ]
        else:
            columns += ["", "", ""]
        rows.append(columns)
    if not rows:
        return ""
    return table(["removed", "steps", *texts, "KL, held-out rows", "CPU minutes", "peak memory"], rows)


WRITERS = {"recovery": recovery_table}
