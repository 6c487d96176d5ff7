"""The stages of a run, each recorded in its journal: a killed run goes on after the last one that finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.engine.answers import ThisMachine
from edgeprune.engine.engines import Exported
from edgeprune.engine.estimate import computes_in
from edgeprune.engine.llamacpp import write_file
from edgeprune.engine.onnx.genai import write_genai
from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.engine.onnx.ops import OPERATORS
from edgeprune.model.checkpoint.nested import MERGED
from edgeprune.model.decoder import Decoder
from edgeprune.model.gguf.weights import is_in_blocks
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.overflow import CLOSE, LIMIT, activation_peaks, check_fp16
from edgeprune.model.save import save_checkpoint
from edgeprune.ondevice import measure
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.figures import (
    Measured,
    figure_from_json,
    figure_to_json,
    performance_from_json,
    performance_to_json,
)
from edgeprune.ondevice.onnxruntime import GRAPH_FILE
from edgeprune.ondevice.reference import ROUNDED_INPUTS
from edgeprune.ondevice.runtimes import LLAMA_CPP
from edgeprune.pipeline.evaluation import Evaluator
from edgeprune.pipeline.journal import Journal
from edgeprune.pipeline.ownership import remove_ours
from edgeprune.pipeline.results import Candidate, Samples
from edgeprune.pipeline.setup import Setup
from edgeprune.pipeline.sharing import Dependencies
from edgeprune.precision import PRECISIONS, CacheFormat
from edgeprune.progress import Progress

if TYPE_CHECKING:
    import torch

    from edgeprune.model.tokens.vocabulary import Vocabulary
    from edgeprune.search.solve import Allocation
    from edgeprune.search.widths import Sensitivities

VARIANTS = tuple(GraphVariant(dialect, logits) for dialect in OPERATORS for logits in ("all", "last"))
OF_EMBEDDINGS = tuple(GraphVariant(dialect, "last", "embeddings") for dialect in OPERATORS)
REFERENCE, SENSITIVITIES, SCALES = "reference.npz", "sensitivities.npz", "cache.safetensors"
RECORDS, RECOVERY = "records.json", "recovery.json"
WALKED = 8  # samples, at most, on which a fitted model is checked for overflow, and its KV cache scaled


@dataclass(frozen=True)
class Run:
    """One run on its way: what each stage gives is there when it is first asked for, from the journal or made now."""

    setup: Setup
    journal: Journal
    progress: Progress

    @cached_property
    def parts(self) -> Dependencies:
        """Returns what the stages depend on that other runs may share."""
        return Dependencies(self.setup)

    @cached_property
    def plain(self) -> Path:
        """Returns the folder of the dense model's fp32 graphs, which this machine runs: for samples and comparisons."""
        self.progress.stage("export the dense model")
        length = self.setup.length  # of the samples that this graph is to generate

        def fill(folder: Path) -> None:
            self._write_graphs(self.setup.model, folder, "fp32", length)

        return self.journal.folder_stage("dense", fill, self.parts.graph) / "onnx-fp32"

    @cached_property
    def samples(self) -> Samples:
        """Returns the user's samples and some of the model's own; or those alone, of which one in five is held out."""
        from edgeprune.pipeline.packing import GENERATED

        setup, given = self.setup, self.setup.samples
        has_given = given.calibration is not None
        count = GENERATED if has_given else setup.request.samples
        held_out = 0 if has_given or given.evaluation else max(1, count // 4)

        def draw(folder: Path) -> None:
            graph, total, seed = self.plain / GRAPH_FILE, count + held_out, setup.request.seed
            ids = setup.kind.draw_samples(
                graph, setup.model, total, setup.length, seed, self.progress, given.calibration
            )
            np.save(folder / "ids.npy", ids)

        folder = self.journal.folder_stage("samples", draw, self.parts.samples)
        ids = np.load(folder / "ids.npy")  # (count + held_out, length)
        most = setup.model.decoder.most_fed  # the last code of a picture is never fed
        if has_given:
            return Samples(given.calibration, ids[:, :most], given.evaluation, self_generated=False)
        evaluation = given.evaluation or {setup.kind.own_evaluation: list(ids[count:])}
        return Samples(ids[:count, :most], None, evaluation, self_generated=not given.evaluation)

    @cached_property
    def dense(self) -> Candidate:
        """Returns the dense model on the engine: what relative budgets refer to."""
        setup, samples, plain = self.setup, self.samples, self.plain
        self.progress.stage("measure the dense model")

        def build(folder: Path) -> None:
            self._check_fp16(setup.model, samples.calibration)
            if setup.engine.builds and setup.precision != "fp32":
                self._write_graphs(setup.model, folder, setup.precision)
            if setup.engine.builds:
                self._write_engine_file(setup.model, folder)
            # The same bf16 weights: what rounding them costs, the evaluation measures.
            is_own_graph = setup.engine.builds and setup.precision == "bf16"
            self._write_reference(folder / "onnx-bf16" if is_own_graph else plain, folder / REFERENCE)

        folder = self.journal.folder_stage("dense-engine", build, self.parts.device)
        graphs = folder if setup.precision != "fp32" else self.plain.parent
        exported = Exported(
            setup.model.decoder, graphs / f"onnx-{setup.precision}", folder / "engine", folder / REFERENCE
        )
        performance = self.journal.stage(
            "dense performance",
            lambda: performance_to_json(setup.engine.performance(exported, None, self.progress.track)),
            self.parts.device,
        )
        return Candidate(setup.model, setup.model.decoder, exported, performance_from_json(performance), ())

    @cached_property
    def evaluator(self) -> Evaluator:
        """Returns what judges candidates against the dense model."""
        return Evaluator(self.setup, self.journal, self.progress, self.samples, self.plain, self.parts)

    @cached_property
    def sensitivities(self) -> Sensitivities:
        """Returns what every possible cut would cost; reused by other budgets for the same model and samples."""
        from edgeprune.search.sensitivity import decoded, encoded, sensitivities_of

        setup, ids = self.setup, self.samples.calibration
        formats = setup.weights.quantised
        tables = tuple(form for form in setup.weights.tables if form is not None)
        caches = setup.cache.quantised

        def fill(folder: Path) -> None:
            how = setup.request.method, setup.request.seed, self.progress
            (folder / SENSITIVITIES).write_bytes(
                encoded(sensitivities_of(setup.model, ids, *how, formats, tables, caches))
            )

        folder = self.journal.folder_stage("sensitivities", fill, self.parts.sensitivities)
        data = (folder / SENSITIVITIES).read_bytes()
        return decoded(data, setup.model.decoder, formats, caches)

    @cached_property
    def vocabularies(self) -> dict[int, Vocabulary | None]:
        """Returns the vocabularies to choose from, by size; None: the whole one."""
        whole: dict[int, Vocabulary | None] = {self.setup.model.decoder.vocab_size: None}
        if self.setup.request.vocabulary == "full":
            return whole
        from edgeprune.search.vocabularies import vocabularies_of

        smaller = vocabularies_of(self.setup.model, self.samples.calibration, self.samples.generated)
        return whole | {vocabulary.size: vocabulary for vocabulary in smaller}

    @cached_property
    def vocabulary_losses(self) -> dict[int, float]:
        """Returns the predicted loss in nats per token of every vocabulary, by size."""
        whole = {self.setup.model.decoder.vocab_size: 0.0}
        if self.setup.request.vocabulary == "full":
            return whole
        from edgeprune.search.vocabularies import measure_losses

        def compute() -> dict[str, float]:
            return measure_losses(self.setup.model, self.samples.calibration, self.samples.generated, self.progress)

        losses = self.journal.stage("vocabularies", compute, self.parts.samples)
        return whole | {int(size): loss for size, loss in losses.items()}

    @cached_property
    def dense_candidate(self) -> Candidate:
        """Returns the dense model as a candidate of its own: checkpoint and graphs in the device's precision."""
        return self._built("dense-candidate", None)

    def candidate(self, name: str, allocation: Allocation) -> Candidate:
        """Prunes to an allocation, writes checkpoint and graphs, builds and measures."""
        self.progress.note(f"{name}: {allocation}")
        return self._built(name, allocation)

    def _built(self, name: str, allocation: Allocation | None) -> Candidate:
        """Returns the candidate of an allocation; None: the dense model as it is."""
        source = self.setup.model.decoder
        target = source if allocation is None else allocation.decoder(source)
        cache = None if allocation is None else allocation.cache
        return self._obtained(name, target, cache, lambda folder: self._write_candidate(folder, target, allocation))

    def recovered(self, candidate: Candidate) -> Candidate:
        """Returns a candidate trained toward the dense model where that was asked for, built and measured again."""
        effort, name = self.setup.effort, candidate.model.directory.parent.name
        if effort is None or not candidate.records:
            return candidate
        form = candidate.decoder.cache_format

        def fill(folder: Path) -> None:
            from edgeprune.model.tokens.vocabulary import read_vocabulary
            from edgeprune.pipeline.recovery import recovered_weights

            source, model = self.setup.model, candidate.model
            state = self.journal.state_folder(f"{name}-recovery")
            given = self.setup, self.samples, self.plain / GRAPH_FILE, model, effort, state, self.progress
            tensors, done = recovered_weights(*given)
            vocabulary = read_vocabulary(model.directory)
            dtype = self._checkpoint_dtype(model.decoder)
            save_checkpoint(model.decoder, tensors, source, folder / "model", vocabulary, dtype)
            (folder / RECOVERY).write_text(json.dumps(done))
            self._write_deployed(folder, vocabulary, form, candidate.records)
            remove_ours(state)

        return self._obtained(f"{name}-recovered", candidate.target, form, fill)

    def _obtained(
        self, name: str, target: Decoder, cache: CacheFormat | None, fill: Callable[[Path], None]
    ) -> Candidate:
        """Returns the candidate in the folder of a stage, which is filled, built and measured where it is not yet."""
        setup = self.setup
        folder = self.journal.folder_stage(name, fill)
        model, scales = load_model(str(folder / "model")), {}
        decoder = model.decoder.with_cache(cache)
        if decoder.cache_format is not None:
            from edgeprune.model.cache import read_scales

            scales = read_scales(folder / SCALES)
        exported = Exported(decoder, folder / f"onnx-{setup.precision}", folder / "engine", folder / REFERENCE)
        records, done = json.loads((folder / RECORDS).read_text()), folder / RECOVERY
        recovery = json.loads(done.read_text()) if done.exists() else None

        def perform() -> dict[str, Any]:
            dense = self.dense
            self.progress.stage(f"{name}: build and measure")
            if not records and not setup.engine.builds:
                return performance_to_json(dense.performance)
            reference = (dense.exported, dense.performance) if records else None
            return performance_to_json(setup.engine.performance(exported, reference, self.progress.track))

        performance = performance_from_json(self.journal.stage(f"{name} performance", perform))
        return Candidate(model, target, exported, performance, tuple(records), scales, recovery)

    def _write_candidate(self, folder: Path, target: Decoder, allocation: Allocation | None) -> None:
        """Fills the folder of a candidate: checkpoint, graphs, reference, and what was done to each module."""
        source = self.setup.model
        records: list[dict[str, Any]] = []
        # The checkpoint is written while the weights are pruned, layer by layer.
        decoder = target.compact()
        if allocation is None:
            vocabulary = None
            tensors: Any = ((name, source.weights[name]) for name in decoder.shapes())
        else:
            vocabulary = self.vocabularies[allocation.vocab_size]
            tensors = self._pruned(target, records)
        if vocabulary is not None:
            decoder = decoder.with_vocabulary(vocabulary.size)
        save_checkpoint(decoder, tensors, source, folder / "model", vocabulary, self._checkpoint_dtype(decoder))
        self._write_deployed(folder, vocabulary, None if allocation is None else allocation.cache, records)

    def _write_deployed(
        self, folder: Path, vocabulary: Vocabulary | None, cache: CacheFormat | None, records: Sequence[dict[str, Any]]
    ) -> None:
        """Writes all that is made of the checkpoint in a candidate's folder, as it stands on the disk: graphs, engine
        file and reference. records: of each module, none of the dense model."""
        setup = self.setup
        model = load_model(str(folder / "model"))
        if records:
            ids = self.samples.calibration[:WALKED]
            ids = ids if vocabulary is None else vocabulary.reduce(ids)
            self._check_fp16(model, ids)
            if cache is not None:
                model = self._with_cache(model, ids, cache, folder)
        self._write_graphs(model, folder, setup.precision)
        if setup.precision != "fp32":
            self._write_graphs(model, folder, "fp32")
        self._write_engine_file(model, folder)
        self._write_reference(folder / "onnx-fp32", folder / REFERENCE, vocabulary, model)
        (folder / RECORDS).write_text(json.dumps(list(records)))

    def _with_cache(self, model: Model, ids: np.ndarray, form: CacheFormat, folder: Path) -> Model:
        """Returns a model with its KV cache in a format, whose scales it writes: those of samples (any, tokens)."""
        from edgeprune.model.cache import cache_scales, with_cache, write_scales

        advance = self.progress.stage("find the scales of the KV cache", len(model.decoder.layers))
        scales = cache_scales(model, _tensor(ids), form, advance)
        write_scales(scales, folder / SCALES)
        return with_cache(model, form, scales)

    def _pruned(self, target: Decoder, records: list[dict[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Returns the pruned weights by name as they are made, and records what was done to each module."""
        from edgeprune.pruning.methods import method_named
        from edgeprune.pruning.prune import prune

        setup, samples = self.setup, self.samples
        advance = self.progress.stage("prune and compensate", 2 * len(target.layers))

        def on_module(record: Any) -> None:
            records.append(asdict(record))
            advance()

        generated = None if samples.generated is None else _tensor(samples.generated)
        method = method_named(setup.request.method)
        return prune(
            setup.model, target, _tensor(samples.calibration), method, setup.request.seed, on_module, generated
        )

    def cross_check(self, chosen: Candidate) -> dict[str, Measured] | None:
        """Compares fitted and dense on this machine's processor; None where the device itself was measured."""
        if isinstance(chosen.performance.decode, Measured):
            return None

        def compute() -> dict[str, Any]:
            self.progress.stage("cross-check on this machine")
            ratios = measure.ratios_on_onnxruntime(
                ThisMachine(),
                self.plain / GRAPH_FILE,
                chosen.runnable_graph,
                self.setup.workload,
                timing().cross_check_seconds,
                self.progress.track,
            )
            return {name: figure_to_json(figure) for name, figure in ratios.items()}

        return {name: figure_from_json(figure) for name, figure in self.journal.stage("cross-check", compute).items()}

    def _write_graphs(self, model: Model, folder: Path, precision: str, length: int = 0) -> None:
        """Writes a model's graphs in a precision into a stage's folder; length: of sequences, where it is more than
        the context."""
        if is_in_blocks(model.decoder):
            model = model.as_floats  # no operator reads ggml's blocks; the graphs judge the same numbers
        target = folder / f"onnx-{precision}"
        context = max(self.setup.workload.context, length)
        variants = VARIANTS + (OF_EMBEDDINGS if self.setup.model.part_of in MERGED else ())
        write_graphs(model.decoder, model.stored, target, precision, variants, context)
        if model.decoder.cache_format is None:  # onnxruntime-genai has no KV cache in codes on a processor
            write_genai(model.decoder, VARIANTS, target, model.directory, context)

    def _write_engine_file(self, model: Model, folder: Path) -> None:
        """Writes the file that llama.cpp runs, where it is the engine, into a stage's folder."""
        if self.setup.profile.engine == LLAMA_CPP:
            write_file(model, folder / "engine", self.setup.precision)

    def _write_reference(
        self, graphs: Path, path: Path, vocabulary: Vocabulary | None = None, model: Model | None = None
    ) -> None:
        """Writes the logits that an engine is checked against: of a graph in fp32 on a calibration sample.

        model: of the graph. ONNX Runtime has no KV cache in fp8: then they are those of the model's own walk.
        """
        from edgeprune.ondevice.onnxruntime import GraphRunner
        from edgeprune.ondevice.reference import write_reference

        cache = None if model is None else model.decoder.cache_format
        if cache is not None and cache.name == "fp8":
            from edgeprune.evaluate.walked import WalkRunner

            runner = WalkRunner(model, self.setup.workload.context)
        else:
            runner = GraphRunner(graphs / GRAPH_FILE, 1, self.setup.workload.context, exact=True)
        ids = self.samples.calibration[0]
        ids = ids if vocabulary is None else vocabulary.reduce(ids)
        write_reference(runner, ids, path, "" if model is None else self._rounded_states(model.decoder))

    def _rounded_states(self, decoder: Decoder) -> str:
        """Returns which states are rounded to codes where a model is deployed, in words."""
        rounds = self.setup.profile.engine == LLAMA_CPP and (decoder.weight_formats or decoder.head_format)
        return decoder.rounded_states or (ROUNDED_INPUTS if rounds else "")

    def _checkpoint_dtype(self, decoder: Decoder) -> Any:
        """Returns the dtype of a checkpoint's floats; None: the source's.

        It is the engine's where the engine runs the checkpoint itself, and bf16 for an engine in it: quality is
        measured of its weights.
        """
        import torch

        precision = self.setup.precision
        is_engines = precision == "bf16" or is_in_blocks(decoder)
        return getattr(torch, PRECISIONS[precision].torch_dtype) if is_engines else None

    def _check_fp16(self, model: Model, ids: np.ndarray) -> None:
        """Raises NumericalError where an fp16 graph would overflow on samples (any, tokens), before it is written."""
        if self.setup.precision != "fp16":
            return
        others = "bf16 or fp32" if computes_in(self.setup.profile, "bf16") else "fp32"
        advance = self.progress.stage("check for fp16 overflow", len(model.decoder.layers))
        largest = check_fp16(activation_peaks(model, _tensor(ids), advance), f"Use --precision {others}.")
        if largest.value > CLOSE * LIMIT:
            self.progress.note(f"close to overflow: {largest}")


def _tensor(ids: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(ids)
