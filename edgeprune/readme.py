"""The words that go with a bundle: its README.md, and the steps on the way to the device."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from edgeprune.finish import DEPLOYMENT
from edgeprune.report.schema import Report, Step

FINISH = "finish.pyz"


def deploy_steps(
    report: Report, bundle: str, engine: str, plans: Sequence[str], checkpoint: bool, again: str
) -> list[Step]:
    """What to do with the bundle of that name, in order.

    engine: that the device's profile names; plans: names of the files of the built engine, none where none could
    be built; again: the command that makes the bundle once more, over this one.
    """
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
                command=f'pip install "edgeprune[rtx]"\n{again}',
            )
        )
    prompt = shlex.quote(report.quality.prompt)
    steps.append(Step(title="Try it on this machine", command=f"edgeprune run {name} --prompt {prompt}"))
    if checkpoint:
        steps.append(
            Step(
                title="Load the checkpoint in Python",
                command=f'transformers.AutoModelForCausalLM.from_pretrained("{bundle}/model")',
            )
        )
    return steps


def readme(report: Report) -> str:
    """README.md of a bundle whose model was chosen."""
    lines = [
        f"# {report.model.name} for {report.device.description}", "", report.headline, "",
        "`report.html` is the whole report, `report.json` the same for programs.", "",
    ]  # fmt: skip
    for step in report.deploy:
        lines += [f"## {step.title}", "", "```", step.command, "```", ""]
    lines += [
        "## Files", "",
        "| file | what it is |", "|---|---|",
        *GRAPHS,
        "| `model/` | a standard checkpoint for `from_pretrained` |",
        "| `engine/` | the built engine, where one could be built |",
        "| `rungs/` | `rungs/0` is the chosen model, further ones are smaller; the folders above lead to one |",
        f"| `{FINISH}` | `python3 {FINISH}` on the device builds the engine, checks, measures and judges it |",
        f"| `{DEPLOYMENT}` | what `{FINISH}` needs to know |",
        *RECORDS, "",
        f"Inputs and outputs are those of Optimum and onnxruntime-genai; context {report.workload.context} at most.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


GRAPHS = (
    "| `onnx/model.onnx` | the model as ONNX, opset 23, all logits; its weights in the `.data` files beside it |",
    "| `onnx/model.primitive*.onnx` | the same in operators of opset 17, for older parsers |",
    "| `onnx/model.onnxruntime*.onnx` | the same for ONNX Runtime, its cache updated in place |",
    "| `onnx/*.last.onnx` | the same with the logits of the last position only: what engines are built from |",
)
RECORDS = (
    "| `profile.toml` | the device profile that was used |",
    "| `manifest.json` | versions, seed, the command that reproduces it, sha256 of every file |",
)
