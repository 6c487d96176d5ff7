"""The deployment steps that a report lists for a device, an engine and a bundle. It carries none of them out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from edgeprune.ondevice.runtimes import RUNTIMES
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.report.schema import Report, Step

FINISH = "finish.pyz"
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
        steps.append(
            Step(
                title=f"Build and measure the engine on the {report.device.description}, over ssh or by a copy",
                command=f"edgeprune measure {name} --target ssh://USER@DEVICE\n"
                f"tar -cf - {name} | ssh USER@DEVICE 'tar -xf - && python3 {name}/{FINISH}'",
            )
        )
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
