"""llama.cpp as an engine: what its files offer, what a profile becomes for it, and the candidates that it measures.

It knows no budget. On a processor the package xllamacpp runs the files, elsewhere llama-bench does, where it is
installed. Its formats stand in OFFERED; model/gguf writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any

from edgeprune.engine.answers import ThisMachine
from edgeprune.engine.engines import Exported, normalised
from edgeprune.engine.estimate import counted
from edgeprune.model.decoder import Decoder
from edgeprune.model.model import Model
from edgeprune.ondevice import measure
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.figures import Performance, Workload
from edgeprune.ondevice.llamacpp import MODEL_FILE
from edgeprune.ondevice.measure import Counted, Session
from edgeprune.ondevice.runtimes import LLAMA_BENCH, LLAMA_CPP
from edgeprune.ondevice.worker import OnProgress
from edgeprune.precision import PRECISIONS
from edgeprune.profiles import DeviceProfile, HardwareFigure, OfferedFormats


def _offered(*formats: str, tables: bool = False) -> OfferedFormats:
    """Returns formats of a GGUF file; the others stand in for the first where its blocks do not divide the sizes."""
    source = "llama.cpp has kernels of its own for this type on every device; none has been timed beside F16's"
    return OfferedFormats(formats=formats, prefill=1.0, tables=tables, source=source, confidence="low")


OFFERED = {
    "int8": _offered("q8_0", tables=True),
    "q6_k": _offered("q6_k", "q8_0", tables=True),
    "q5_k": _offered("q5_k", "q5_1"),
    "q4_k": _offered("q4_k", "q5_0"),
    "int4": _offered("q4_k", "q4_1", "q4_0"),
    "q3_k": _offered("q3_k", "q4_0"),
}
"""The weight formats of a GGUF file that llama.cpp runs well, by the words that `--weights` takes."""
BLOCK = 32  # inputs that share a scale: what the width of an MLP has to be a multiple of
FACTOR, OVERHEAD = "llama.cpp of 2025 and 2026, Q4_K_M", "llama.cpp of 2025 and 2026"  # of the published points
PREFILL = 0.5  # of TensorRT's share of the peak
PREFILL_SOURCE = "of 0.3 to 0.6 in llama.cpp's published points (on an RTX 4090 as much as TensorRT's)"


def on_llamacpp(profile: DeviceProfile) -> DeviceProfile:
    """Returns a device's profile with llama.cpp as its engine, and that engine's formats, precision and figures.

    On a GPU it reads and starts kernels as its published points say beside TensorRT's, over all GPUs that have both.
    """
    if profile.engine == LLAMA_CPP:
        return profile
    update: dict[str, Any] = {
        "engine": LLAMA_CPP,
        "description": _description(profile),
        "precision": "fp16",
        "dialect": "onnxruntime",  # of the graphs that this machine judges by; the cache is in place as well
        "channel_multiple": lcm(profile.channel_multiple, BLOCK),
        "tensorrt": None,
        "weights": OFFERED,
        "cache": {},
        "formats": {},
    }
    if not profile.on_processor:
        from edgeprune.engine.calibration import discrete_fit
        from edgeprune.engine.fits import TENSORRT

        fit = discrete_fit()
        launches = fit.overheads[OVERHEAD] / fit.overheads[TENSORRT]
        beside = "of llama.cpp's published points beside TensorRT's, over all GPUs"
        for name, factor, words in (
            ("decode_efficiency", fit.factors[FACTOR], beside),
            ("layer_overhead", launches, beside),
            ("decode_overhead", launches, beside),
            ("prefill_efficiency", PREFILL, PREFILL_SOURCE),
        ):
            if (figure := getattr(profile, name)) is not None:
                update[name] = _scaled(figure, factor, words)
    return profile.model_copy(update=update)


def _description(profile: DeviceProfile) -> str:
    return profile.description.replace("with ONNX Runtime", "with llama.cpp")


def _scaled(figure: HardwareFigure, factor: float, words: str) -> HardwareFigure:
    """Returns a figure of TensorRT's as llama.cpp's; words: where the factor is from."""
    value = min(figure.value * factor, 1.0) if figure.unit == "1" else figure.value * factor
    source = f"{figure.source}; times {factor:.2f}, {words}"
    return figure.model_copy(update={"value": value, "source": source, "confidence": "low"})


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp on a device, which measures candidates interleaved with the dense model.

    tool: what measures there, the package xllamacpp (`llama.cpp`) or `llama-bench`; version: its own; checkpoint: the
    folder of the model's configuration, once the model is known.
    """

    profile: DeviceProfile
    workload: Workload
    precision: str
    reason: str
    tool: str = LLAMA_CPP
    version: str = ""
    session: Session = ThisMachine()
    checkpoint: Path | None = None
    name: str = LLAMA_CPP
    builds: bool = True
    measures: bool = True
    compiles: bool = False
    one_width: bool = True

    def performance(
        self, candidate: Exported, dense: tuple[Exported, Performance] | None, on_progress: OnProgress
    ) -> Performance:
        """Returns the measured performance of a candidate; raises EngineError where its logits are wrong.

        llama-bench gives no logits: the file is checked on this machine then.
        """
        path = candidate.engine / MODEL_FILE
        checked = {}
        if self.tool == LLAMA_BENCH:
            files = {"graph": str(path), "reference": str(candidate.reference)}
            agreement = measure.check_logits(ThisMachine(), LLAMA_CPP, files, self.precision, path.name, on_progress)
            checked = {f"{what}, on the workstation": words for what, words in agreement.items()}
        measured = measure.in_process(
            self.session,
            self.tool,
            None if dense is None else dense[0].engine / MODEL_FILE,
            path,
            self.workload,
            counted_of(path, candidate.decoder, self.workload),
            on_progress,
            None if checked else candidate.reference,
            self.precision,
        )
        measured = replace(measured, conditions={**checked, **measured.conditions})
        return measured if dense is None else normalised(measured, dense[1])

    def identity(self, on_progress: OnProgress) -> dict[str, Any]:
        """Returns the machine, its processor, and the release of llama.cpp."""
        description = measure.describe(self.session, on_progress)
        own = {name: description[name] for name in ("machine", "processor")}
        return {**own, "gpu": (description["gpu"] or {}).get("name"), "tool": self.tool, "version": self.version}

    def write(self, decoder: Decoder, weights: Mapping[str, Any], folder: Path) -> None:
        """Writes a model of random weights to be timed, without a tokenizer."""
        model = Model("random", self.checkpoint, decoder, weights, "", weights)
        write_file(model, folder, self.precision, has_tokenizer=False)

    def latencies(self, models: dict[str, Exported], on_progress: OnProgress) -> dict[str, dict[str, float]]:
        """Returns the latencies of several models, measured in turns."""
        files = {name: model.engine / MODEL_FILE for name, model in models.items()}
        seconds = timing().survey_seconds * len(models)
        return measure.relative_latencies(self.session, self.tool, files, self.workload, seconds, on_progress)


def write_file(model: Model, folder: Path, precision: str, has_tokenizer: bool = True) -> None:
    """Writes a model's file into the folder of its engine, which it makes. Raises InputError as export_gguf does.

    A model in ggml's formats has its file in its own folder already. precision: of the matrices that are floats.
    """
    import torch

    from edgeprune.model.gguf.export import export_gguf
    from edgeprune.model.gguf.weights import is_in_blocks

    folder.mkdir(parents=True, exist_ok=True)
    if has_tokenizer and is_in_blocks(model.decoder):
        (folder / MODEL_FILE).hardlink_to(model.directory / MODEL_FILE)
    else:
        export_gguf(model, folder / MODEL_FILE, getattr(torch, PRECISIONS[precision].torch_dtype), has_tokenizer)


def counted_of(path: Path, decoder: Decoder, workload: Workload) -> Counted:
    """Returns the bytes of a file, and of the cache in fp16 and the buffers beside it."""
    return replace(counted(decoder, "fp16", workload), weights=path.stat().st_size)
