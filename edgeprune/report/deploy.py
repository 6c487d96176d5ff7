"""The deployment steps that a report lists for a device, an engine and a bundle. It carries none of them out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from edgeprune.ondevice.llamacpp import MODEL_FILE
from edgeprune.ondevice.runtimes import LLAMA_CPP, RUNTIMES
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.report.schema import Report, Step

FINISH, SERVE = "finish.pyz", "serve.pyz"
LOADERS = {"imagegpt": "ImageGPTForCausalImageModeling", "llamagen": None}  # of transformers; others: Auto...


def in_blocks(report: Report) -> bool:
    """Returns whether a bundle's checkpoint is a GGUF file, which alone holds formats of ggml."""
    forms = (WEIGHT_FORMATS.get(name) for name in report.fitted.formats)
    return any(form is not None and form.storage == "gguf" for form in forms)


def deploy_steps(
    report: Report, bundle: str, engine: str, plans: Sequence[str], checkpoint: bool, again: str
) -> list[Step]:
    """Returns what to do with the bundle of that name, in order.

    engine: the one that the device's profile names; plans: file names of the built engine, empty where none could
    be built; checkpoint: whether the bundle holds one; again: the command that makes the bundle once more, over
    this one.
    """
    # Build, load or install the engine, whichever the device still lacks.
    name = shlex.quote(bundle)
    steps = []
    if engine == "tensorrt":
        steps.append(_measure_there(report, name, "Build and measure the engine"))
    elif report.engine.name == "tensorrt-rtx" and plans:
        steps.append(
            Step(
                title="Load the engine with TensorRT for RTX of the version in manifest.json",
                command="\n".join(f"engine/{plan}" for plan in plans),
            )
        )
    elif report.engine.name == "tensorrt-rtx":
        steps.append(
            Step(
                title="Build the engine: install TensorRT for RTX and fit again",
                command=f"{RUNTIMES[report.engine.name].install_here}\n{again}",
            )
        )
    if engine == LLAMA_CPP:
        measured = report.fitted.performance.decode.source == "measured"
        steps += [
            *([] if measured else [_measure_there(report, name, "Measure it with llama-bench")]),
            Step(title="Run it in llama.cpp", command=f"llama-cli -m {name}/engine/{MODEL_FILE}"),
        ]
    # Try the model on this machine, from the command line and from Python.
    subject = (
        f"--prompt {shlex.quote(report.quality.prompt)}" if report.quality.prompt else "--count 16 --output grid.png"
    )
    steps.append(Step(title="Try it on this machine", command=f"edgeprune run {name} {subject}"))
    loader = LOADERS.get(report.model.family, "AutoModelForCausalLM")
    if checkpoint and loader is not None:
        file = ', gguf_file="model.gguf"' if in_blocks(report) else ""
        command = f'transformers.{loader}.from_pretrained("{bundle}/model"{file})'
        steps.append(Step(title="Load the checkpoint in Python", command=command))
    return steps


def _measure_there(report: Report, name: str, what: str) -> Step:
    """Returns the step that measures a bundle on its device; name: of the bundle, quoted; what: is done."""
    return Step(
        title=f"{what} on the {report.device.description}, over ssh or by a copy",
        command=f"edgeprune measure {name} --target ssh://USER@DEVICE\n"
        f"tar -cf - {name} | ssh USER@DEVICE 'tar -xf - && python3 {name}/{FINISH}'",
    )
