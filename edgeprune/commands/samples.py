"""samples(): calibration data out of logs, chats and texts: masked, without duplicates, balanced, and chosen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.commands.result import Result
from edgeprune.errors import InputError
from edgeprune.files import at_home, check_output_file, check_text, write_text
from edgeprune.model.checkpoint.llamagen import NO_HINTS
from edgeprune.model.load import load_shape
from edgeprune.pipeline.kit import MARK, Collection, Sample, collect
from edgeprune.pipeline.masking import DEFAULT, masker_of
from edgeprune.pipeline.packing import hold_out
from edgeprune.pipeline.request import check_seed
from edgeprune.pipeline.samples import LENGTH
from edgeprune.pipeline.selection import Selection, select
from edgeprune.progress import OnProgress, Progress, progress_of

COUNT = 32  # samples, as a fit takes


@dataclass(frozen=True)
class SamplesReport:
    """The report of what was read, masked, removed and chosen.

    next_command: that fits a model with it, None where no model was named.
    """

    output: Path
    held_out: Path | None
    model: str | None
    count: int
    length: int
    collection: Collection
    selection: Selection
    next_command: str | None

    def as_json(self) -> dict[str, Any]:
        chosen = self.selection.chosen
        return {
            "output": str(self.output),
            "held_out": None if self.held_out is None else str(self.held_out),
            "model": self.model,
            "count": self.count,
            "length": self.length,
            "read": [asdict(source) for source in self.collection.sources],
            "masked": dict(self.collection.masked),
            "masked_documents": self.collection.masked_documents,
            "duplicates": {"exact": self.collection.exact, "near": self.collection.near},
            "documents": len(chosen),
            "held_out_documents": len(self.selection.held_out),
            **self.selection.as_json(),
            "next_command": self.next_command,
        }


def samples(
    paths: str | Path | Sequence[str | Path],
    *,
    output: str | Path,
    held_out: str | Path | None = None,
    count: int = COUNT,
    length: int | None = None,
    model: str | Path | None = None,
    mask: str | Iterable[str] = DEFAULT,
    names: str | Path | None = None,
    column: str | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | OnProgress | None = None,
) -> Result[SamplesReport]:
    """Writes calibration data of `count` samples as JSON lines with provenance, which --calibration takes.

    paths: files and folders as of --calibration; held_out: a second file, of documents to evaluate on; length: tokens
    of a sample; model: whose moments the choice covers, None: it is random; mask: kinds of masking.KINDS, or `none`;
    names: a file of names to mask; column: that holds the text in tables and records. Raises InputError, for options
    before anything is read.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    for value in (*given, output, held_out, names, model, column):
        check_text(value, "the path")
    if not given:
        raise InputError("there is nothing to read", "Name files or folders of texts, logs or chats.")
    sources, written = [_path(path) for path in given], _path(output)
    length = LENGTH if length is None else length
    # All that can be wrong before anything is read.
    check_seed(seed)
    for name, value, least in (("count", count, 1), ("length", length, 2)):
        if value < least:
            raise InputError(f"--{name} {value} is less than {least}", f"Give at least {least}.")
    masker = masker_of(mask, None if names is None else _path(names))
    kept = None if held_out is None else _path(held_out)
    _check_outputs(sources, written, kept, force)
    if model is not None:
        _check_model(str(model), length)
    shown = progress_of(progress)
    collection = collect(sources, masker, column, length, shown)
    dense = None
    if model is not None:
        from edgeprune.pipeline.setup import load_dense

        dense = load_dense(str(model), NO_HINTS)
    selection = select(collection.samples, count, length, dense, kept is not None, seed, shown)
    # Both files at the end, each at once.
    _write(written, [collection.samples[number] for number in selection.chosen], "calibration")
    if kept is not None:
        _write(kept, [collection.samples[number] for number in selection.held_out], "held out")
    command = None
    if model is not None:
        command = _next_command(str(model), written, kept, collection, selection, count, length)
    name = None if model is None else str(model)
    return Result(None, SamplesReport(written, kept, name, count, length, collection, selection, command))


def _path(value: str | Path) -> Path:
    return Path(at_home(value))


def _check_outputs(sources: Sequence[Path], output: Path, held_out: Path | None, force: bool) -> None:
    """Raises InputError where a file cannot be written, or would be read as a sample the next time."""
    if held_out is not None and held_out.resolve() == output.resolve():
        raise InputError(f"--output and --held-out are both {output}", "Name two files.")
    for option, path in (("--output", output), ("--held-out", held_out)):
        if path is None:
            continue
        if path.suffix not in (".jsonl", ".ndjson"):
            raise InputError(f"{option} {path} does not end in .jsonl", "JSON lines are written: name it so.")
        check_output_file(path, option, MARK, force)
        for source in sources:
            if source.resolve() in (path.resolve(), *path.resolve().parents):
                raise InputError(
                    f"{option} {path} is within {source}, which is read", "Name a file outside of what is read."
                )


def _check_model(model: str, length: int) -> None:
    """Raises InputError for a model that is none, that draws pictures, or has no room for a sample."""
    decoder = load_shape(model)[1]
    if decoder.picture is not None:
        raise InputError(
            f"{model} draws pictures: its samples are a folder of these", "Give the folder to --calibration as it is."
        )
    if length > (limit := decoder.max_position_embeddings):
        raise InputError(f"samples of {length} tokens exceed the model's {limit} positions", f"Try --length {limit}.")


def _write(path: Path, chosen: Sequence[Sample], role: str) -> None:
    lines = [json.dumps(sample.as_record(role), ensure_ascii=False) for sample in chosen]
    write_text(path, "".join(f"{line}\n" for line in lines))


def _next_command(
    model: str,
    output: Path,
    held_out: Path | None,
    collection: Collection,
    selection: Selection,
    count: int,
    length: int,
) -> str:
    """Returns the command that fits a model with the files, with as many samples as they hold."""
    words, tokens = ["edgeprune", "fit", model, "--calibration", str(output)], selection.tokens
    if held_out is not None:
        words += ["--evaluate", str(held_out)]
    else:  # a fit holds some of them out itself
        left, _ = hold_out(selection.chosen, seed=0)
        chosen = [collection.samples[number] for number in selection.chosen]
        tokens = int(tokens * sum(collection.samples[number].bytes for number in left) / sum(s.bytes for s in chosen))
    return shlex.join([*words, "--samples", str(max(1, min(count, tokens // length))), "--length", str(length)])
