"""drift(): how far new texts lie from the calibration data of a bundle, what they cost, and what to do."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.bundle.read import read_report
from edgeprune.commands.result import Result
from edgeprune.errors import InputError
from edgeprune.files import at_home, check_text
from edgeprune.ondevice.bundle import Chosen, open_to_run
from edgeprune.pipeline.request import DEMO, check_seed
from edgeprune.pipeline.run_file import RUN_FILE, read_run_file
from edgeprune.pipeline.sketch import SAMPLES, SKETCH_FILE, Sketch, read_sketch
from edgeprune.progress import OnProgress, Progress, progress_of
from edgeprune.report.drift import DriftReport, Module, Sample, concluded
from edgeprune.report.quality import Text, text_part, worst_text
from edgeprune.report.schema import Report
from edgeprune.report.verdict import frontier_command

if TYPE_CHECKING:
    from edgeprune.model.model import Model
    from edgeprune.pipeline.documents import Document, Reading

WORDS = 80  # characters of a document, by which it is named
LENGTH = 256  # tokens of a sample, where the bundle holds none to go by


def drift(
    bundle: str | Path,
    *,
    texts: str | Path,
    since: str | Path | None = None,
    model: str | Path | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Progress | OnProgress | None = None,
) -> Result[DriftReport]:
    """Compares new texts with the calibration data of a bundle that fit wrote.

    texts, since: files or folders as calibration data is; since: None for the sketch that the bundle holds of it.
    model: the dense one, by default that of the fit where it is on this machine; without it there is no cost, and since
    is needed. samples: of the new texts, at most. Raises InputError.
    """
    from edgeprune.evaluate.drift import LEAST_SAMPLES, module_names
    from edgeprune.evaluate.drift import drift as compared
    from edgeprune.pipeline.documents import read

    # What is asked for, checked before any long work.
    check_seed(seed)
    if samples < LEAST_SAMPLES:
        raise InputError(f"--samples {samples} is less than {LEAST_SAMPLES}", f"Give at least {LEAST_SAMPLES}.")
    for value, option in ((texts, "--texts"), (since, "--since"), (model, "--model")):
        check_text(value, option)
    folder, shown = Path(bundle), progress_of(progress)
    chosen = open_to_run(folder)
    fitted_report = read_report(folder)
    if fitted_report.quality.pictures is not None:
        raise InputError(f"{folder} draws pictures: drift compares texts", "Give the bundle of a language model.")
    new = read(Path(at_home(texts)))
    old = None if since is None else read(Path(at_home(since)))
    sketch = None if old is not None else _sketch(chosen)
    # The models: that which reads the samples, and both where the cost can be told.
    dense, no_dense = _dense(chosen, fitted_report, model)
    fitted = _fitted(chosen)
    reader = _reader(chosen, sketch, fitted, dense, no_dense)
    length = sketch.length if sketch else min(LENGTH, reader.decoder.max_position_embeddings)
    rows = _rows(new, reader, samples, length, seed)
    # Moments of what its modules read.
    layers = len(reader.decoder.layers)
    moments = (
        sketch.moments if sketch else _moments(reader, _rows(old, reader, SAMPLES, length, seed).ids, shown, "old")
    )
    if moments.shape[1] < LEAST_SAMPLES:
        raise InputError(
            f"{folder} was calibrated on {moments.shape[1]} samples: fewer than {LEAST_SAMPLES} have no splits",
            "Give more calibration data of the same kind: --since PATH.",
        )
    found = compared(moments, _moments(reader, rows.ids, shown, "new"), seed)
    # The cost, by both models.
    cost, no_cost = None, no_dense
    if fitted is None:
        no_cost = f"{folder} holds no checkpoint of the fitted model"
    elif dense is not None:
        advance = shown.stage("evaluate both models", layers + len(dense.decoder.layers))
        cost = _cost(dense, fitted, _rows(new, dense, samples, length, seed).ids, seed, str(texts), advance)
    report = DriftReport(
        bundle=str(folder),
        model=fitted_report.model.name,
        texts=str(texts),
        since=f"{since}" if since is not None else "the calibration data of the fit",
        reader="dense" if reader is dense else "fitted",
        samples=len(rows.ids),
        calibration_samples=moments.shape[1],
        length=length,
        distance_percent=100 * found.whole.value,
        limit_percent=100 * found.whole.limit,
        p=found.whole.p,
        drifted=found.whole.is_drift,
        modules=[
            Module(
                layer=index,
                kind=kind,
                distance_percent=100 * of.value,
                limit_percent=100 * of.limit,
                drifted=of.is_drift,
            )
            for (index, kind), of in zip(module_names(reader.decoder), found.modules, strict=True)
        ],
        cost=cost,
        no_cost="" if cost else no_cost,
        reference=worst_text(fitted_report.quality.texts),
        covering=[
            Sample(distance_percent=100 * float(found.samples[row]), documents=rows.names[row])
            for row in found.covering
        ],
        verdict="",
        steps=[],
    )
    return Result(folder, concluded(report, folder, _larger(chosen, fitted_report)))


def _sketch(chosen: Chosen) -> Sketch:
    """Returns the sketch of the calibration data. Raises InputError where the bundle holds none."""
    path = chosen.folder / SKETCH_FILE
    if not path.is_file():
        raise InputError(
            f"{chosen.bundle} holds no sketch of its calibration data: it was made before there was one",
            "Give the calibration data itself: --since PATH.",
        )
    chosen.check(path)
    return read_sketch(path)


def _fitted(chosen: Chosen) -> Model | None:
    """Returns the model of the rung's checkpoint; None where the bundle holds none."""
    from edgeprune.model.load import load_model

    folder = chosen.folder / "model"
    if not folder.is_dir():
        return None
    chosen.check(folder)
    return load_model(str(folder))


def _dense(chosen: Chosen, report: Report, given: str | Path | None) -> tuple[Model | None, str]:
    """Returns the dense model and why it is not there: as given, or as the fit had it where that is on this machine.

    Raises InputError where another one is given.
    """
    from edgeprune.model.load import load_model

    path = chosen.bundle / RUN_FILE
    name = str(given) if given is not None else None
    if name is None and path.is_file():
        name = str(read_run_file(path).get("model", ""))
    if not name or (given is None and name != DEMO and not Path(name).exists()):
        return None, f"the dense model {name or report.model.name} is not on this machine; name it with --model"
    try:
        model = load_model(name)
    except InputError as error:
        if given is not None:
            raise
        return None, f"the dense model cannot be read: {error.message}"
    if model.fingerprint != report.model.fingerprint:
        if given is not None:
            raise InputError(f"{given} is not the model that {chosen.bundle} was made of", "Leave --model out.")
        return None, f"{name} is no longer the model that the bundle was made of; name that with --model"
    return model, ""


def _reader(chosen: Chosen, sketch: Sketch | None, fitted: Model | None, dense: Model | None, no_dense: str) -> Model:
    """Returns the model that reads the samples: the dense one, or the fitted one where the calibration data is read
    again. Raises InputError where it is not there."""
    if dense is not None:
        return dense
    if sketch is not None:
        raise InputError(no_dense, "Or give the calibration data with --since: then the fitted model reads both.")
    if fitted is None:
        raise InputError(f"{chosen.bundle} holds no checkpoint, and {no_dense}", "Give the dense model with --model.")
    return fitted


@dataclass(frozen=True)
class _Rows:
    """ids: (samples, length) int64; names: of each row's documents, by their first words."""

    ids: np.ndarray
    names: list[list[str]]


def _rows(reading: Reading, model: Model, samples: int, length: int, seed: int) -> _Rows:
    """Returns samples of parts of the documents in a drawn order, packed as calibration data, as many as there are.

    Raises InputError where that is less than LEAST_SAMPLES.
    """
    from edgeprune.chats import check_ids
    from edgeprune.evaluate.drift import LEAST_SAMPLES
    from edgeprune.model.tokens.tokenizer import load_tokenizer
    from edgeprune.pipeline.packing import pack, shuffled, tokenize

    tokenizer = load_tokenizer(model.directory)
    separator = tokenizer.eos_token_id
    extra = separator is not None  # a token behind each document
    documents = shuffled(reading.documents, seed)
    # Samples of many documents stand for the texts better than those of one: each gives a part, a sample at most where
    # there are enough documents.
    tokens: list[np.ndarray] = []
    most, missing = length, samples * length
    for ids in tokenize(documents, tokenizer):
        tokens.append(ids)
        missing -= min(len(ids), most) + extra
        if missing <= 0:
            break
    while missing > 0 and most < max(map(len, tokens)):
        most *= 2
        missing = samples * length - sum(min(len(ids), most) + extra for ids in tokens)
    generator = np.random.default_rng(seed)
    starts = [int(generator.integers(max(1, len(ids) - most + 1))) for ids in tokens]
    taken = [ids[start : start + most] for ids, start in zip(tokens, starts, strict=True)]
    ends = np.cumsum([len(ids) + extra for ids in taken])
    count = min(samples, int(ends[-1]) // length)
    if count < LEAST_SAMPLES:
        raise InputError(
            f"{reading.path} has {ends[-1]:,} tokens: fewer than {LEAST_SAMPLES} samples of {length}", "Add text."
        )
    packed = pack(taken, count, length, separator)
    check_ids(packed, model.decoder.vocab_size, tokenizer, str(reading.path))
    firsts = np.searchsorted(ends, np.arange(count) * length, side="right")
    lasts = np.searchsorted(ends, np.arange(1, count + 1) * length, side="left")
    names = [[_name(of) for of in documents[first : last + 1]] for first, last in zip(firsts, lasts, strict=True)]
    return _Rows(packed, names)


def _name(document: Document) -> str:
    text = document if isinstance(document, str) else str(document[0].get("content") or document.place)
    return " ".join(text.split())[:WORDS]


def _moments(model: Model, ids: np.ndarray, progress: Progress, which: str) -> np.ndarray:
    from edgeprune.evaluate.drift import sketches

    return sketches(model, ids, progress.stage(f"read the {which} texts", len(model.decoder.layers)))


def _cost(dense: Model, fitted: Model, ids: np.ndarray, seed: int, name: str, advance: Any) -> Text:
    """Returns perplexity and agreement of both models on the new samples (n, length) int64 of the dense tokens."""
    from edgeprune.pipeline.robustness import Variant, judged, variant_losses

    variants = [Variant(name, "", list(ids))]
    (row,) = judged(dense, variant_losses(dense, variants, advance), fitted, variants, seed, advance)
    return Text(**text_part(name, row))


def _larger(chosen: Chosen, report: Report) -> str:
    """Returns the command that gives the next larger rung, or shows which sizes there are."""
    if chosen.rung:
        return shlex.join(["edgeprune", "fit", "--from", str(chosen.bundle), "--pick", str(chosen.rung - 1)])
    return frontier_command(report)
