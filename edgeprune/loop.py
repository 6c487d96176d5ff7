"""fit(): the one way through the house. Read this file first.

    samples -> dense -> sensitivities -> search (plan, prune, export, build, measure) -> evaluation
    -> cross-check -> bundle and report

Every station is a stage of the journal: a killed run goes on after the last one that finished.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.budget import judge
from edgeprune.engine import perform
from edgeprune.engine.base import Measured, Performance
from edgeprune.engine.choose import RUNTIME_GRAPH, Exported
from edgeprune.engine.estimate import estimate_performance
from edgeprune.engine.graph import Spelling, unsupported, write_graphs
from edgeprune.engine.wire import figure_from_json, figure_to_json, performance_from_json, performance_to_json
from edgeprune.journal import Journal, open_journal
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.save import save_checkpoint
from edgeprune.prepare import Request, Setup, prepare
from edgeprune.progress import Progress, Silent
from edgeprune.results import Candidate, Fitted, Quality, Samples
from edgeprune.search import Costs, Outcome, search, smaller_rungs
from edgeprune.sensitivities import sensitivities_of

if TYPE_CHECKING:
    from edgeprune.pruning.allocate import Sensitivities, Widths

SPELLINGS = tuple(Spelling(d, logits) for d in ("opset23", "primitive", "onnxruntime") for logits in ("all", "last"))
REFERENCE = "reference.npz"
MEASUREMENT_MARGIN = 0.015  # share of a limit to stay below where the figure carries noise
CROSS_CHECK_SECONDS = 10.0
SAMPLE_PROMPT = "Explain in a few sentences why the sky is blue."
SAMPLE_TOKENS = 80


def fit(request: Request, progress: Progress | None = None) -> Path:
    """Fit the model into the budget; returns the finished bundle's folder.

    Raises InputError, BudgetError or EngineError; a budget that turns out to be out of reach is no
    error here: the best candidate is kept and the report says so.
    """
    from edgeprune.shipping import ship

    progress = progress or Silent()
    setup = prepare(request)
    for choice in setup.choices:
        progress.note(f"{choice.name}: {choice.value} ({choice.reason})")
    work = setup.output.with_name(setup.output.name + ".work")
    journal = open_journal(work, setup.fingerprint, request.resume, request.force)
    run = Run(setup, journal, progress)
    plain = run.export_dense()
    samples = run.draw_samples(plain)
    dense = run.measure_dense(plain, samples)
    if judge(setup.budget, dense.performance, dense.performance).met:
        progress.note("the dense model already meets the budget: it is exported as it is")
        rungs, outcome = [run.keep_dense(dense, samples)], None
    else:
        outcome, chosen = run.search(dense, samples, run.measure_sensitivities(samples))
        rungs = [chosen]
    rungs += run.further_rungs(dense, rungs[0], samples)
    qualities = [run.evaluate(plain, rung, samples, index) for index, rung in enumerate(rungs)]
    cross_check = run.cross_check(plain, rungs[0]) if outcome is not None else None
    fitted = [
        Fitted(setup, samples, dense.performance, rung, outcome, quality, cross_check, journal.seconds)
        for rung, quality in zip(rungs, qualities, strict=True)
    ]
    ship(fitted, work)
    shutil.rmtree(work)
    return setup.output


@dataclass(frozen=True)
class Run:
    """The stations of one run."""

    setup: Setup
    journal: Journal
    progress: Progress

    def _graphs(self, model: Model, folder: Path, precision: str, length: int = 0) -> Path:
        """The folder of a model's graphs in a precision, written by the stage that fills `folder`."""
        target = folder / f"onnx-{precision}"
        spellings = [s for s in SPELLINGS if unsupported(model.decoder, s.dialect) is None]
        context = max(self.setup.workload.context, length)
        write_graphs(model.decoder, model.weights, target, precision, spellings, context)
        return target

    def export_dense(self) -> Path:
        """The dense model's fp32 graphs, which this machine runs: for samples and comparisons."""
        self.progress.stage("export the dense model")
        length = self.setup.request.length  # of the samples that this graph is to generate
        fill = lambda folder: self._graphs(self.setup.model, folder, "fp32", length)  # noqa: E731
        return self.journal.folder_stage("dense", fill) / "onnx-fp32"

    def draw_samples(self, plain: Path) -> Samples:
        """The user's texts and some samples of the model's own; or those alone, of which one in five is held out."""
        from edgeprune.pruning.calibration import GENERATED

        setup, texts = self.setup, self.setup.texts
        own = texts.calibration is not None
        count = GENERATED if own else setup.request.samples
        held_out = 0 if own or texts.evaluation else max(1, count // 4)

        def draw(folder: Path) -> None:
            from edgeprune.generation import BATCH, generate_documents

            advance = self.progress.stage("generate samples", setup.request.length * -(-(count + held_out) // BATCH))
            ids = generate_documents(
                plain / RUNTIME_GRAPH, setup.model.directory, count + held_out, setup.request.length,
                setup.request.seed, advance,
            )  # fmt: skip
            np.save(folder / "ids.npy", ids)

        ids = np.load(self.journal.folder_stage("samples", draw) / "ids.npy")
        if own:
            return Samples(texts.calibration, ids, texts.evaluation, self_generated=False)
        evaluation = texts.evaluation or {"generated by the dense model": list(ids[count:])}
        return Samples(ids[:count], None, evaluation, self_generated=not texts.evaluation)

    def _reference(self, plain: Path, samples: Samples, path: Path) -> None:
        """What an engine's logits are checked against: those of the fp32 graph on a calibration sample."""
        from edgeprune.engine.check import write_reference
        from edgeprune.engine.onnxruntime import Runner

        workload = self.setup.workload
        runner = Runner(plain / RUNTIME_GRAPH, 1, workload.context)
        write_reference(runner, samples.calibration[0], workload.prompt, path)

    def measure_dense(self, plain: Path, samples: Samples) -> Candidate:
        """The dense model on the engine: what relative budgets refer to."""
        setup = self.setup
        self.progress.stage("measure the dense model")

        def build(folder: Path) -> None:
            if setup.engine.builds and setup.precision != "fp32":
                self._graphs(setup.model, folder, setup.precision)
            self._reference(plain, samples, folder / REFERENCE)

        folder = self.journal.folder_stage("dense-engine", build)
        graphs = folder if setup.precision != "fp32" else self.journal.folder / "dense"
        exported = Exported(
            setup.model.decoder, graphs / f"onnx-{setup.precision}", folder / "engine", folder / REFERENCE
        )
        performance = self.journal.stage(
            "dense performance",
            lambda: performance_to_json(setup.engine.performance(exported, None, self.progress.track)),
        )
        return Candidate(setup.model, exported, performance_from_json(performance), ())

    def keep_dense(self, dense: Candidate, samples: Samples) -> Candidate:
        """The dense model as a candidate of its own: checkpoint and graphs in the device's precision."""
        return self._candidate("dense-candidate", None, samples, dense, dense.performance)

    def measure_sensitivities(self, samples: Samples) -> Sensitivities:
        """What every possible cut would cost; reused by other budgets for the same model and samples."""
        setup = self.setup
        request = setup.request
        return sensitivities_of(setup.model, samples.calibration, request.method, request.seed, self.progress)

    def search(self, dense: Candidate, samples: Samples, sensitivities: Sensitivities) -> tuple[Outcome, Candidate]:
        """Propose, prune, build, measure, correct; the chosen candidate."""
        from edgeprune.pruning.allocate import dense_widths, uniform_options

        setup = self.setup
        limits = setup.budget.absolute(dense.performance).limits
        widths = dense_widths(setup.model.decoder)
        candidates: list[Candidate] = []

        def obtain(index: int, widths: Widths, predicted: dict[str, float]) -> Costs:
            self.progress.note(
                f"candidate {index + 1}: {widths.num_key_value_heads} key/value heads x {widths.heads_per_group} "
                f"query heads, {widths.intermediate_size} MLP channels"
            )
            candidates.append(self.build_candidate(index, widths, dense, samples))
            obtained = candidates[-1].performance
            status = judge(setup.budget, dense.performance, obtained).status
            return Costs({name: obtained.values[name] for name in limits}, status)

        outcome = search(
            uniform_options(widths, setup.profile.channel_multiple), sensitivities.uniform_loss, self._estimate,
            (widths, dense.performance.values), limits, self._margins(dense.performance), obtain,
        )  # fmt: skip
        return outcome, candidates[outcome.chosen]

    def _estimate(self, widths: Widths) -> dict[str, float]:
        decoder = self.setup.model.decoder.with_widths(*widths)
        return estimate_performance(decoder, self.setup.profile, self.setup.workload, self.setup.precision).values

    def further_rungs(self, dense: Candidate, chosen: Candidate, samples: Samples) -> list[Candidate]:
        """Smaller candidates for the bundle, in case the device's own figures are worse than what is known here."""
        from edgeprune.pruning.allocate import dense_widths, uniform_options

        setup = self.setup
        if setup.request.rungs == 1 or not judge(setup.budget, dense.performance, chosen.performance).met:
            return []
        options = uniform_options(dense_widths(setup.model.decoder), setup.profile.channel_multiple)
        found = smaller_rungs(
            options, self.measure_sensitivities(samples).uniform_loss, self._estimate,
            (dense_widths(chosen.model.decoder), chosen.performance.values),
            setup.budget.absolute(dense.performance).limits, setup.request.rungs - 1,
        )  # fmt: skip
        return [self._candidate(f"rung-{index}", widths, samples, dense) for index, widths in enumerate(found, 1)]

    def _margins(self, dense: Performance) -> dict[str, float]:
        measured = {name for name in ("prefill", "decode") if isinstance(getattr(dense, name), Measured)}
        if isinstance(dense.memory.activations, Measured):
            measured.add("memory")
        return {name: MEASUREMENT_MARGIN if name in measured else 0.0 for name in ("memory", "prefill", "decode")}

    def build_candidate(self, index: int, widths: Widths, dense: Candidate, samples: Samples) -> Candidate:
        """Prune to the widths, write checkpoint and graphs, build and measure."""
        return self._candidate(f"candidate-{index + 1}", widths, samples, dense)

    def _candidate(
        self, name: str, widths: Widths | None, samples: Samples, dense: Candidate, known: Performance | None = None
    ) -> Candidate:
        """widths None: the dense model as it is, its performance known where nothing is built for the bundle."""
        setup, source = self.setup, self.setup.model
        records: list[dict[str, Any]] = []

        def fill(folder: Path) -> None:
            decoder = source.decoder if widths is None else source.decoder.with_widths(*widths)
            tensors: Any = ((name, source.weights[name]) for name in decoder.shapes())
            if widths is not None:
                tensors = self._pruned(decoder, samples, records)
            save_checkpoint(decoder, tensors, source, folder / "model")
            model = load_model(str(folder / "model"))
            self._graphs(model, folder, setup.precision)
            if setup.precision != "fp32":
                self._graphs(model, folder, "fp32")
            self._reference(folder / "onnx-fp32", samples, folder / REFERENCE)
            (folder / "records.json").write_text(json.dumps(records))

        folder = self.journal.folder_stage(name, fill)
        model = load_model(str(folder / "model"))
        exported = Exported(model.decoder, folder / f"onnx-{setup.precision}", folder / "engine", folder / REFERENCE)

        def perform() -> dict[str, Any]:
            self.progress.stage(f"{name}: build and measure")
            if known is not None and not setup.engine.builds:
                return performance_to_json(known)
            reference = None if widths is None else (dense.exported, dense.performance)
            return performance_to_json(setup.engine.performance(exported, reference, self.progress.track))

        performance = performance_from_json(self.journal.stage(f"{name} performance", perform))
        return Candidate(model, exported, performance, tuple(json.loads((folder / "records.json").read_text())))

    def _pruned(self, decoder: Any, samples: Samples, records: list[dict[str, Any]]) -> Any:
        from edgeprune.pruning.methods import method_named
        from edgeprune.pruning.prune import prune

        setup = self.setup
        advance = self.progress.stage("prune and compensate", 2 * len(decoder.layers))

        def on_module(record: Any) -> None:
            records.append(asdict(record))
            advance()

        return prune(
            setup.model, decoder, _tensor(samples.calibration), method_named(setup.request.method),
            setup.request.seed, on_module, None if samples.generated is None else _tensor(samples.generated),
        )  # fmt: skip

    def evaluate(self, plain: Path, chosen: Candidate, samples: Samples, rung: int) -> Quality:
        """Perplexity of both models on the held-out texts, and a sample of each from one prompt."""

        def compute() -> dict[str, Any]:
            from edgeprune.evaluate.perplexity import document_losses, rise
            from edgeprune.generation import sample_text

            length = max(self.setup.request.length, 256)
            advance = self.progress.stage(
                "evaluate", 2 * len(samples.evaluation) * len(self.setup.model.decoder.layers)
            )
            texts = {}
            for name, documents in samples.evaluation.items():
                losses = [
                    document_losses(model, documents, length, advance) for model in (self.setup.model, chosen.model)
                ]
                texts[name] = {
                    "dense": losses[0].perplexity, "fitted": losses[1].perplexity,
                    "tokens": int(losses[0].tokens.sum()),
                    **asdict(rise(*losses, self.setup.request.seed)),
                }  # fmt: skip
            self.progress.stage("generate a sample of both")
            graphs = (plain, chosen.exported.graphs.parent / "onnx-fp32")
            directory, seed = self.setup.model.directory, self.setup.request.seed
            context = self.setup.workload.context
            texts_of_both = [
                sample_text(g / RUNTIME_GRAPH, directory, SAMPLE_PROMPT, context, SAMPLE_TOKENS, seed) for g in graphs
            ]
            return {
                "texts": texts, "prompt": SAMPLE_PROMPT,
                "dense_sample": texts_of_both[0], "fitted_sample": texts_of_both[1],
            }  # fmt: skip

        return Quality(**self.journal.stage(f"evaluation {rung}", compute))

    def cross_check(self, plain: Path, chosen: Candidate) -> dict[str, Measured] | None:
        """Where the device was not measured: fitted against dense on this machine's processor."""
        if isinstance(chosen.performance.decode, Measured):
            return None

        def compute() -> dict[str, Any]:
            self.progress.stage("cross-check on this machine")
            candidate = chosen.exported.graphs.parent / "onnx-fp32" / RUNTIME_GRAPH
            ratios = perform.ratios_on_onnxruntime(
                perform.Here(), plain / RUNTIME_GRAPH, candidate, self.setup.workload, CROSS_CHECK_SECONDS,
                self.progress.track,
            )  # fmt: skip
            return {name: figure_to_json(figure) for name, figure in ratios.items()}

        return {name: figure_from_json(figure) for name, figure in self.journal.stage("cross-check", compute).items()}


def _tensor(ids: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(ids)
