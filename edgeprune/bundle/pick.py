"""A picked rung as a bundle of its own, made from the files of the bundle that holds the rungs.

It knows neither the model nor the run that made them.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from edgeprune import __version__
from edgeprune.bundle.read import read_report
from edgeprune.bundle.readme import readme
from edgeprune.bundle.store import write_bundle
from edgeprune.bundle.write import as_json, json_text, rendered
from edgeprune.engine.remote import program, service_program
from edgeprune.errors import InputError
from edgeprune.files import check_text, checked, writing
from edgeprune.ondevice.bundle import (
    CODEC,
    COPY_AGAIN,
    FRONTIER,
    MANIFEST,
    MEASUREMENT,
    OTHER_VERSION,
    REPORT,
    TOKENIZER,
    check_file,
    check_files,
    open_bundle,
    rungs_of,
    tokenizer_of,
)
from edgeprune.ondevice.documents import DEPLOYMENT, read_deployment
from edgeprune.pipeline.journal import open_journal
from edgeprune.pipeline.output import check_output, check_space, work_folder
from edgeprune.pipeline.provenance import now
from edgeprune.pipeline.run_file import RUN_FILE, toml_of
from edgeprune.progress import Progress, Silent
from edgeprune.report.deploy import FINISH, SERVE, deploy_steps
from edgeprune.report.schema import Choice, Report


def pick(
    bundle: Path, index: int, output: Path | None = None, force: bool = False, progress: Progress | None = None
) -> Path:
    """Writes one rung as a bundle whose chosen model it is, and returns that bundle's folder.

    bundle: a frontier's, or any of several rungs; what `edgeprune measure` measured with it stays there. output: by
    default BUNDLE-pickK in the current folder. Raises InputError where the rung or the bundle cannot be read, or the
    output cannot be written.
    """
    # Check the bundle, the rung and the output before anything is written.
    progress = progress or Silent()
    check_text(output, "--output")
    manifest = open_bundle(bundle)
    report = _check(bundle, index, manifest)
    written = output or Path(f"{bundle.resolve().name}-pick{index}")
    output = written.absolute()
    _check_apart(bundle, output)
    check_output(output, force)
    measured = MEASUREMENT in manifest["sha256"]
    names = _names(bundle, index, manifest, measured)
    folder, plan = Path("rungs") / str(index), _plan(bundle, index, manifest)
    if (graph := f"{folder}/onnx/{plan['rungs'][0]['graph']}") not in names:
        raise InputError(f"{bundle / MANIFEST} does not list the rung's graph {graph}", COPY_AGAIN)
    check_files(bundle, manifest, [*_shared(bundle, index), bundle / "profile.toml"])
    check_space(output, sum((bundle / name).stat().st_size for name in names))
    if measured:
        progress.note(f"what was measured with {bundle} stays there: measure the new bundle with `edgeprune measure`")
    # Write the texts of the new bundle: the rung's report with its own command and deployment steps, and the rest.
    command, again = _commands(manifest, bundle, index, written)
    report = report.model_copy(
        update={
            "command": command,
            "files": {},
            "choices": [*report.choices, Choice(name="rung", value=str(index), reason=f"picked from {bundle.name}")],
            "deploy": deploy_steps(
                report,
                output.name,
                plan["engine"],
                sorted(name.rsplit("/", 1)[1] for name in names if name.endswith(".engine")),
                any(name.startswith(f"{folder}/model/") for name in names),
                again,
            ),
        }
    )
    texts = {
        "profile.toml": (bundle / "profile.toml").read_bytes(),
        "README.md": readme(report, any(name.endswith(".embeddings.last.onnx") for name in names)),
        DEPLOYMENT: json_text(plan),
        FINISH: program(),
        **({} if report.quality.pictures else {SERVE: service_program()}),
        RUN_FILE: toml_of({"from": bundle.absolute(), "pick": index}),
    }

    def render(files: dict[str, int]) -> dict[str, str]:
        return rendered(report.model_copy(update={"files": files}))

    # Copy the rung's files aside and assemble the bundle from them.
    kept = {name: value for name, value in manifest.items() if name not in ("kind", "sha256")}
    identity = {"pick": [str(bundle.absolute()), index]}
    with writing(output), open_journal(work_folder(output), identity, not force, force) as journal:
        kept |= {"edgeprune": __version__, "run": journal.id, "created": now(), "command": command, "rung": index}
        rungs = journal.folder / "rungs"
        shutil.rmtree(rungs, ignore_errors=True)  # of a pick that was killed
        try:
            advance = progress.stage(f"copy rung {index}", len(names))
            for name in names:
                _copy(bundle / name, journal.folder / name, manifest["sha256"][name])
                advance()
            (rungs / str(index) / REPORT).write_text(as_json(report), encoding="utf-8")
            progress.stage("write the bundle")
            shared = {
                f"{folder.name}/{path.name}": path
                for folder in _shared(bundle, index)
                for path in sorted(folder.iterdir())
            }
            write_bundle(journal.folder / "bundle", output, [rungs / str(index)], shared, texts, kept, render)
        finally:
            journal.remove()
    return output


def _check(bundle: Path, index: int, manifest: dict[str, Any]) -> Report:
    """Returns the rung's report. Raises InputError where there is no such rung, or nothing to pick from."""
    rungs = rungs_of(bundle)
    if len(rungs) == 1 and manifest.get("kind") != FRONTIER:
        raise InputError(f"{bundle} holds one rung: there is nothing to pick", "It is ready as it is.")
    if index not in rungs:
        raise InputError(f"{bundle} holds no rung {index}", f"Give --pick {rungs[0]} to {rungs[-1]}.")
    return read_report(bundle / "rungs" / str(index))


def _shared(bundle: Path, index: int) -> list[Path]:
    """Returns the folders that a rung shares with the others of the bundle: its tokenizer and the codec."""
    return [folder for folder in (tokenizer_of(bundle, index), bundle / CODEC) if folder.is_dir()]


def _check_apart(bundle: Path, output: Path) -> None:
    """Raises InputError where the output would replace the bundle that is read or lie in it, --force or not."""
    source, target = bundle.resolve(), output.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise InputError(f"the output {output} is, holds or is in the bundle {bundle}", "Name another --output.")


def _names(bundle: Path, index: int, manifest: dict[str, Any], measured: bool) -> list[str]:
    """Returns the rung's files to copy, as the manifest names them.

    Documents are written anew and tokenizers are shared. measured: whether `edgeprune measure` ran, so that an engine
    that was built is that of a device and not this run's.
    """
    folder = bundle / "rungs" / str(index)
    names = (str(path.relative_to(bundle)) for path in sorted(folder.rglob("*")) if path.is_file())
    left_out = {folder / REPORT, folder / DEPLOYMENT, folder / TOKENIZER}
    left_out |= set(folder.glob("engine/*.engine")) if measured else set()
    return [
        name for name in names if name in manifest["sha256"] and not left_out & {bundle / name, (bundle / name).parent}
    ]


def _commands(manifest: dict[str, Any], bundle: Path, index: int, output: Path) -> tuple[str, str]:
    """Returns the command line that makes the picked bundle again, and the one that makes it once more, over this one.

    Raises InputError where the manifest holds no command line.
    """
    path = bundle / MANIFEST
    checked(manifest, {"command": str, ...: Any}, str(path), OTHER_VERSION)
    try:
        words = shlex.split(manifest["command"])
        if "--output" not in words:
            words += ["--output", bundle.resolve().name]
        source = words[words.index("--output") + 1]
    except (ValueError, IndexError):
        raise InputError(f"{path}: its command is not whole", OTHER_VERSION) from None
    last = ["edgeprune", "fit", "--from", source, "--pick", str(index), "--output", str(output)]
    command, again = (" && ".join(shlex.join([*step, *more]) for step in (words, last)) for more in ((), ("--force",)))
    return command, again


def _plan(bundle: Path, index: int, manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns deployment.json with the one rung. Raises InputError where it cannot be read."""
    own = bundle / "rungs" / str(index) / DEPLOYMENT
    path = own if manifest.get("kind") == FRONTIER else bundle / DEPLOYMENT
    plan = read_deployment(path)
    if path == own:
        return plan
    if index >= len(plan["rungs"]):
        raise InputError(f"{path} knows no rung {index}", OTHER_VERSION)
    return {**plan, "rungs": [plan["rungs"][index]]}


def _copy(source: Path, target: Path, digest: str) -> None:
    """Copies a file and checks its sha256. Raises InputError where it is not the digest.

    It is a copy and not a second name: onnx refuses weights in a file that has two. Blocks on the disk are shared
    where the file system can.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as old, target.open("wb") as new:
        try:
            while os.copy_file_range(old.fileno(), new.fileno(), 2**30):
                pass
        except (AttributeError, OSError):  # another system, or two file systems that cannot
            old.seek(0)
            new.seek(0)
            shutil.copyfileobj(old, new, 2**20)
    check_file(target, {digest}, source)
