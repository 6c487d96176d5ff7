"""Builds engines with TensorRT or TensorRT for RTX, through one adapter, in a process of its own.

This file also runs on the device: Python 3.10, standard library and one of the two modules. Without a
GPU nothing is deserialised or run: memory is read from the builder's messages.
`python -m edgeprune.engine.tensorrt` answers one JSON request on standard input.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.engine.base import Workload
from edgeprune.engine.onnxruntime import peak_bytes
from edgeprune.errors import EdgepruneError, EngineError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
WEIGHTS_TOLERANCE = 1.05  # more than that over the graph's bytes, and something is stored twice
_FIGURE = re.compile(r"(Total Weights Memory|Total Activation Memory|Max Scratch Memory):\s*(\d+)")


@dataclass(frozen=True)
class BuildResult:
    """What the builder said of an engine: bytes, seconds, its version; warnings in words.

    A context needs activation_bytes + scratch_bytes: the builder's total activation memory contains the
    scratch memory (it is one of the blocks that are assigned to it), here the two are apart.
    """

    version: str
    weights_bytes: int
    activation_bytes: int
    scratch_bytes: int
    seconds: float
    peak_build_bytes: int
    warnings: tuple[str, ...]


def import_tensorrt(flavour: str) -> Any:
    """The module of a flavour. Raises EngineError with the command that installs it."""
    try:
        return importlib.import_module(MODULES[flavour])
    except Exception as error:  # a missing library is no ImportError in every release
        raise EngineError(
            f"{flavour} cannot be imported: {error}", f'Install it with: pip install "edgeprune[{EXTRAS[flavour]}]"'
        ) from None


def available(flavour: str) -> tuple[bool, str]:
    """Whether engines of this flavour can be built here, and its version or the reason."""
    try:
        trt = import_tensorrt(flavour)
    except EngineError as error:
        return False, error.message
    return True, f"{MODULES[flavour]} {trt.__version__}"


def offered_sms() -> list[int]:
    """The compute capabilities that TensorRT for RTX builds for without the GPU. Raises EngineError."""
    trt = import_tensorrt("tensorrt-rtx")
    names = [name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    return sorted(int(name[2:]) for name in names)


def compile_plan(graph: Path, plan: Path, workload: Workload, sm: int | None, flavour: str) -> BuildResult:
    """Build in this process; where that stores weights twice, again with room for a batch of two.

    With a batch of exactly one TensorRT for RTX 1.7 keeps a transposed second copy of a tied embedding;
    with a maximum of two it does not (measured). The smaller of the two engines is kept.
    sm: compute capability to build for (TensorRT for RTX only). Raises EngineError naming the node
    where the parser refuses one.
    """
    result, serialized = _compile(graph, workload, workload.batch, sm, flavour)
    if result.warnings and workload.batch == 1:
        wider, other = _compile(graph, workload, 2, sm, flavour)
        if _held(wider) < _held(result):
            result, serialized = wider, other
    temporary = plan.with_name(f"{plan.name}.part")
    temporary.write_bytes(serialized)
    temporary.replace(plan)
    return result


def _held(result: BuildResult) -> int:
    return result.weights_bytes + result.activation_bytes + result.scratch_bytes


def _compile(graph: Path, workload: Workload, most: int, sm: int | None, flavour: str) -> tuple[BuildResult, Any]:
    """One build with one merged profile (two hold the weights twice), for batches from 1 to `most`."""
    trt = import_tensorrt(flavour)
    if sm is not None and flavour != "tensorrt-rtx":
        raise EngineError(
            f"{flavour} builds for the GPU of its own machine only, not for SM {sm}", "Build on the device itself."
        )
    if sm is not None and sm not in (offered := offered_sms()):
        raise EngineError(
            f"TensorRT for RTX does not build for SM {sm}", f"It offers SM {', '.join(map(str, offered))}."
        )
    start = time.monotonic()
    logger, messages = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise EngineError(_parser_errors(parser, graph), "Export again; a newer TensorRT may know the operator.")
    config = builder.create_builder_config()
    if sm is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *shapes(tensor.name, tuple(tensor.shape), workload, most))
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        errors = [text for severity, text in messages if severity <= 1]  # internal errors and errors
        raise EngineError(
            f"TensorRT cannot build {graph}: {' '.join(errors)[-400:]}",
            "Try a smaller --context or --batch, or another release of TensorRT.",
        )
    figures = {match[1]: int(match[2]) for _, text in messages for match in _FIGURE.finditer(text)}
    weights, scratch = figures.get("Total Weights Memory", 0), figures.get("Max Scratch Memory", 0)
    result = BuildResult(
        version=trt.__version__,
        weights_bytes=weights,
        activation_bytes=max(0, figures.get("Total Activation Memory", 0) - scratch),
        scratch_bytes=scratch,
        seconds=time.monotonic() - start,
        peak_build_bytes=peak_bytes(),
        warnings=_warnings(weights, graph),
    )
    return result, serialized


def shapes(
    name: str, shape: tuple[int, ...], workload: Workload, most: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Minimum, optimum and maximum shape of an input of our graph's contract (-1: dynamic).

    most: the largest batch, if not the workload's.
    The optimum is the decode step in the middle of the context: most of the time is spent there.
    """

    def at(batch: int, sequence: int, past: int) -> tuple[int, ...]:
        if name.startswith("past_key_values."):
            return batch, shape[1], past, shape[3]
        return batch, past + sequence if name == "attention_mask" else sequence

    last = workload.context - 1
    return at(1, 1, 0), at(workload.batch, 1, last // 2), at(most or workload.batch, workload.prompt, last)


def _logger(trt: Any) -> tuple[Any, list[tuple[int, str]]]:
    messages: list[tuple[int, str]] = []

    class Keeping(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.append((int(severity), text))

    return Keeping(), messages


def _parser_errors(parser: Any, graph: Path) -> str:
    """The first error, with the node that it is about; errors of the file itself have none."""
    if parser.num_errors == 0:
        return f"TensorRT cannot parse {graph} and does not say why"
    first = parser.get_error(0)
    name = getattr(first, "node_name", str)()  # releases before 10 have no name
    node = f" at node {name} ({first.node_operator()})" if name else ""
    return f"TensorRT cannot parse {graph}{node}: {first.desc()}"


def _warnings(weights: int, graph: Path) -> tuple[str, ...]:
    held = sum(path.stat().st_size for path in graph.parent.glob("*.data"))
    if not weights:
        return ("the builder reported no memory figures",)
    if weights > WEIGHTS_TOLERANCE * held:
        return (f"the engine holds {weights / held:.2f} times the graph's weights: something is stored twice",)
    return ()


def trtexec_commands(graph: str, caches: list[tuple[str, int, int]], workload: Workload, plan: str) -> list[list[str]]:
    """The commands that build an engine on a device with full TensorRT and measure decode and prefill.

    caches: name, key/value heads and head_dim of every cache input. Each command is a list of words.
    Copying the cache to and from the device at every step would compete for its memory bandwidth: it is
    left out. TensorRT 11 does all this by default and takes the flags with a warning.
    """
    inputs = [(name, (-1, -1)) for name in ("input_ids", "position_ids", "attention_mask")]
    inputs += [(name, (-1, heads, -1, head_dim)) for name, heads, head_dim in caches]

    def listed(pick: int) -> str:
        return ",".join(f"{name}:{_by_x(shapes(name, shape, workload)[pick])}" for name, shape in inputs)

    def at(sequence: int, past: int) -> str:
        fixed = Workload(workload.batch, sequence, past + 1)
        return ",".join(f"{name}:{_by_x(shapes(name, shape, fixed)[2])}" for name, shape in inputs)

    measure = ["trtexec", f"--loadEngine={plan}", "--useCudaGraph", "--noDataTransfers"]
    measure += ["--warmUp=200", "--iterations=100"]
    return [
        ["trtexec", f"--onnx={graph}", f"--saveEngine={plan}", "--stronglyTyped", "--skipInference",
         f"--minShapes={listed(0)}", f"--optShapes={listed(1)}", f"--maxShapes={listed(2)}"],
        [*measure, f"--shapes={at(1, workload.context - 1)}"],
        [*measure, f"--shapes={at(workload.prompt, 0)}"],
    ]  # fmt: skip


def _by_x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def main() -> int:
    request = json.load(sys.stdin)
    try:
        result = asdict(
            compile_plan(
                Path(request["graph"]), Path(request["plan"]), Workload(**request["workload"]), request["sm"],
                request["flavour"],
            )
        )  # fmt: skip
    except EdgepruneError as error:
        result = {"error": error.message, "remedy": error.remedy}
    sys.stdout.write(json.dumps(result) + "\n")
    return EngineError.exit_code if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
