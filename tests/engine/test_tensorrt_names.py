"""Every name of TensorRT, pycuda and cuda-python that the code uses is one that every recorded release has.

The names are read from the syntax trees; the tables below say what each expression is. A new expression, or a
new name of a known one, fails here until it stands in a table. The lists are in tests/data; a release without
one is untested.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

import edgeprune
from tests.support import DATA

ON_DEVICE = Path(edgeprune.__file__).parent / "ondevice"

# Expression -> class, as the files write it; "" is the module itself.
TENSORRT = {
    "trt": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "network.get_layer(index)": "ILayer",
    "output": "IAttentionOutputLayer",
    "output.attention": "IAttention",
    "trt.LayerType": "LayerType",
    "parser": "OnnxParser",
    "first": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "config.get_timing_cache()": "ITimingCache",
    "trt.NetworkDefinitionCreationFlag": "NetworkDefinitionCreationFlag",
    "trt.MemoryPoolType": "MemoryPoolType",
    "trt.ComputeCapability": "ComputeCapability",
    "trt.ILogger": "ILogger",
    "trt.IStreamWriter": "IStreamWriter",
    "trt.IProgressMonitor": "IProgressMonitor",
    "trt.DataType": "DataType",
    "self._runtime": "Runtime",
    "self._engine": "ICudaEngine",
    "self._context": "IExecutionContext",
}
USED = {
    "": {
        "Builder",
        "DataType",
        "ILogger",
        "IProgressMonitor",
        "MemoryPoolType",
        "NetworkDefinitionCreationFlag",
        "OnnxParser",
        "Runtime",
        "ComputeCapability",
        "IStreamWriter",
        "IAttentionOutputLayer",
        "LayerType",
    },
    "Builder": {
        "build_serialized_network",
        "build_serialized_network_to_stream",
        "create_builder_config",
        "create_network",
        "create_optimization_profile",
    },
    "DataType": {"BF16", "FLOAT", "FP8", "HALF", "INT64", "INT8"},
    "IBuilderConfig": {
        "add_optimization_profile",
        "create_timing_cache",
        "get_timing_cache",
        "progress_monitor",
        "set_memory_pool_limit",
        "set_timing_cache",
        "num_compute_capabilities",
        "set_compute_capability",
    },
    "ICudaEngine": {
        "create_execution_context",
        "device_memory_size_v2",
        "get_aliased_input_tensor",
        "get_tensor_dtype",
        "get_tensor_name",
        "get_tensor_profile_shape",
        "get_tensor_shape",
        "num_io_tensors",
    },
    "IExecutionContext": {"execute_async_v3", "set_input_shape", "set_tensor_address"},
    "IAttention": {"decomposable"},
    "IAttentionOutputLayer": {"attention"},
    "ILayer": {"name", "type"},
    "ILogger": {"log"},
    "INetworkDefinition": {"get_input", "get_layer", "num_inputs", "num_layers"},
    "IOptimizationProfile": {"set_shape"},
    "IProgressMonitor": {"phase_finish", "phase_start", "step_complete"},
    "IStreamWriter": {"write"},
    "ITensor": {"name", "shape"},
    "ITimingCache": {"serialize"},
    "LayerType": {"ATTENTION_OUTPUT"},
    "MemoryPoolType": {"WORKSPACE"},
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED"},
    "OnnxParser": {"get_error", "num_errors", "parse_from_file"},
    "ParserError": {"desc", "node_name", "node_operator"},
    "Runtime": {"deserialize_cuda_engine"},
}
# Used for a GPU that is not there, which TensorRT for RTX alone builds for.
RTX_ONLY = {
    ("", "ComputeCapability"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
}
# Used where the builder has the first of them; older releases give the whole engine at once.
STREAMED = {("Builder", "build_serialized_network_to_stream"), ("", "IStreamWriter"), ("IStreamWriter", "write")}
WITHOUT_STREAMS = ("tensorrt-10.3.0", "tensorrt-10.7.0")
# Used where the module has the first of them; older parsers know no Attention, and no KV cache in place.
ATTENTION = {
    ("", "IAttentionOutputLayer"),
    ("ICudaEngine", "get_aliased_input_tensor"),
    ("IAttentionOutputLayer", "attention"),
    ("IAttention", "decomposable"),
    ("LayerType", "ATTENTION_OUTPUT"),
}
WITHOUT_ATTENTION = (*WITHOUT_STREAMS, "tensorrt-10.13")
OTHERS = {  # what else has attributes in these files
    "_NO_DRIVER",
    "inputs",
    "mmap",
    "one",
    "past",
    "self._sets",
    "tensor.name",
    "values.view(np.uint32) >> 16",
    "part",
    "temporaries[0]",
    "plan.parent",
    "problems",
    "Path('/sys/devices/system/cpu/cpu0/cache')",
    "_FIGURE",
    "_REMEDIES",
    "_onnxruntime()",
    "engine",
    "logits[:, -1]",
    "np.arange(pasts.max() + 1) <= pasts[:, None]",
    "pasts",
    "self._sets[0]",
    "self.engine",
    "contextlib",
    "cuda",
    "error",
    "machine",
    "machine.memory_state()",
    "PRECISIONS[precision]",
    "PRECISIONS[self.precision]",
    "RUNTIMES[flavour]",
    "timing()",
    "figures",
    "file",
    "generator",
    "graph",
    "graph.parent",
    "half",
    "ids",
    "ids[:, part]",
    "importlib",
    "kept",
    "layer",
    "limits",
    "mask",
    "messages",
    "messages.figures()",
    "name",
    "next(iter(paths.values()))",
    "np",
    "np.random",
    "opened",
    "os",
    "path",
    "path.parent",
    "path.read_text(encoding='utf-8')",
    "path.read_text(encoding='utf-8').strip()",
    "path.stat()",
    "paths",
    "paths[role]",
    "plan",
    "platform",
    "re",
    "request['files']",
    "request['stacks']",
    "result",
    "result.stdout",
    "runner",
    "self",
    "self._address",
    "self._cuda",
    "self._cuda.gpu",
    "self._logits",
    "self._logits[:, -1]",
    "self._messages",
    "self._runner",
    "self._runner.cuda",
    "self._runner.cuda.gpu",
    "self._steps",
    "self._types[name]",
    "self._workload",
    "self.cuda",
    "self.cuda.gpu",
    "session",
    "shutil",
    "shutil.disk_usage(folder)",
    "sizes",
    "stack",
    "stacks",
    "stacks[role]",
    "subprocess",
    "temporary",
    "time",
    "times",
    "value",
    "values",
    "weights_file(graph)",
    "workload",
}

PYCUDA = {
    "self._cuda": "",
    "self._cuda.Device": "Device",
    "self._device": "Device",
    "self._context": "Context",
    "memory": "DeviceAllocation",
    "stream": "Stream",
    "event": "Event",
    "start": "Event",
}
PYCUDA_USED = {
    "": {
        "Device",
        "Event",
        "Stream",
        "get_driver_version",
        "init",
        "mem_alloc",
        "mem_get_info",
        "memcpy_dtoh",
        "memcpy_htod",
        "memset_d8",
    },
    "Context": {"pop", "push", "synchronize"},
    "Device": {"compute_capability", "count", "name", "retain_primary_context", "total_memory"},
    "DeviceAllocation": {"free"},
    "Event": {"record", "time_till"},
    "Stream": {"handle", "synchronize"},
}
CUDA_PYTHON = {
    "self._cuda": "",
    "self._cuda.CUresult": "CUresult",
    "code": "CUresult",
    "self._cuda.CUstreamCaptureMode": "CUstreamCaptureMode",
}
CUDA_PYTHON_USED = {
    "": {
        "CUresult",
        "CUstreamCaptureMode",
        "cuCtxSetCurrent",
        "cuCtxSynchronize",
        "cuDeviceGet",
        "cuDeviceGetAttribute",
        "cuDeviceGetCount",
        "cuDeviceGetName",
        "cuDevicePrimaryCtxRelease",
        "cuDevicePrimaryCtxRetain",
        "cuDriverGetVersion",
        "cuEventCreate",
        "cuEventDestroy",
        "cuEventElapsedTime",
        "cuEventRecord",
        "cuGraphDestroy",
        "cuGraphExecDestroy",
        "cuGraphInstantiate",
        "cuGraphLaunch",
        "cuInit",
        "cuMemAlloc",
        "cuMemFree",
        "cuMemGetInfo",
        "cuMemcpyDtoH",
        "cuMemcpyHtoD",
        "cuMemsetD8",
        "cuStreamBeginCapture",
        "cuStreamCreate",
        "cuStreamDestroy",
        "cuStreamEndCapture",
        "cuStreamSynchronize",
    },
    "CUresult": {"CUDA_SUCCESS", "name"},
    "CUstreamCaptureMode": {"CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"},
}
CUDA_OTHERS = {
    "contextlib",
    "np",
    "importlib",
    "importlib.import_module('pycuda')",
    "array",
    "array.ctypes",
    "self",
    "self._made",
    "self._call('cuDeviceGetName', 256, self._device)",
    "self._device",
    "self._call('cuDeviceGetName', 256, self._device).split(b'\\x00')[0]",
}


def tree(name: str, kind: str | None = None) -> ast.AST:
    """Of a file, or of a class in it."""
    module = ast.parse((ON_DEVICE / name).read_text(encoding="utf-8"))
    if kind is None:
        return module
    return next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == kind)


def accesses(node: ast.AST) -> Iterable[tuple[str, str]]:
    """(expression, attribute): of the code, of getattr with a literal name, and what a class overrides."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            yield ast.unparse(part.value), part.attr
        elif isinstance(part, ast.Call) and ast.unparse(part.func) == "getattr":
            thing, name = part.args[:2]
            if isinstance(name, ast.Constant):
                yield ast.unparse(thing), name.value
        elif isinstance(part, ast.ClassDef):
            methods = [method.name for method in part.body if isinstance(method, ast.FunctionDef)]
            for base in part.bases:
                yield from ((ast.unparse(base), name) for name in methods)


def found(pairs: Iterable[tuple[str, str]], known: dict[str, str]) -> tuple[dict[str, set[str]], set[str]]:
    """class -> names used, dunder names and our own left out; and the expressions that are of no known class."""
    used: dict[str, set[str]] = {}
    unknown = set()
    for expression, name in pairs:
        if expression not in known:
            unknown.add(expression)
        elif not name.startswith("_"):
            used.setdefault(known[expression], set()).add(name)
    return used, unknown


def recorded(pattern: str) -> dict[str, dict[str, list[str]]]:
    return {path.stem: json.loads(path.read_text())["names"] for path in sorted(DATA.glob(pattern))}


def users() -> list[str]:
    """Files that have the module in hand."""
    names = []
    for path in sorted(ON_DEVICE.parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name | ast.arg) and getattr(node, "id", getattr(node, "arg", "")) == "trt":
                names.append(str(path.relative_to(ON_DEVICE)))
                break
    return names


@pytest.mark.slow
def test_the_table_is_what_the_code_uses() -> None:
    assert {"tensorrt.py", "tensorrt_runner.py"} <= set(users())
    pairs = [pair for name in users() for pair in accesses(tree(name))]
    used, unknown = found(pairs, TENSORRT)
    used.pop("ComputeCapability", None)
    assert used == USED
    new = {text for text in unknown if not text.startswith(("'", '"', "f'"))} - OTHERS
    assert not new, f"put them into TENSORRT with their class, or into OTHERS: {sorted(new)}"


@pytest.mark.parametrize("release", recorded("tensorrt_names/*.json"))
def test_every_recorded_release_has_the_names(release: str) -> None:
    names = recorded("tensorrt_names/*.json")[release]
    rtx = release.startswith("tensorrt_rtx")
    for kind, used in USED.items():
        for name in used:
            if (kind, name) in RTX_ONLY and not rtx:
                assert name not in names[kind], f"{kind}.{name} is in {release}: no longer a name of RTX alone"
            elif ((kind, name) in STREAMED and release.startswith(WITHOUT_STREAMS)) or (
                (kind, name) in ATTENTION and release.startswith(WITHOUT_ATTENTION)
            ):
                assert name not in names.get(kind, ()), f"{kind}.{name} is in {release}"
            else:
                assert name in names[kind], f"{release} has no {kind}.{name}"


@pytest.mark.slow
def test_names_of_rtx_alone_are_used_for_a_named_sm_alone() -> None:
    """Or to say which it offers; another flavour is refused before, with a named SM."""
    everywhere = [pair for name in users() for pair in accesses(tree(name))]
    inside = [
        pair
        for name in users()
        for node in ast.walk(tree(name))
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "sm is not None"
        or isinstance(node, ast.FunctionDef)
        and node.name == "offered_sms"
        for pair in accesses(node)
    ]
    for _, name in RTX_ONLY:
        count = sum(attribute == name for _, attribute in everywhere)
        assert count == sum(attribute == name for _, attribute in inside) > 0


def test_the_tables_of_the_cuda_modules_are_what_the_code_uses() -> None:
    used, unknown = found(accesses(tree("cuda.py", "_PyCuda")), PYCUDA)
    assert used == PYCUDA_USED
    assert unknown <= CUDA_OTHERS
    node = tree("cuda.py", "_CudaPython")
    used, unknown = found(accesses(node), CUDA_PYTHON)
    texts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str))
    used[""] |= {text for text in texts if text.startswith("cu") and text[2:3].isupper()}
    used[""].remove("CUdevice_attribute")  # see below
    assert used == CUDA_PYTHON_USED
    assert unknown - {"kinds"} <= CUDA_OTHERS


@pytest.mark.parametrize(
    ("pattern", "table"), [("pycuda-*.json", PYCUDA_USED), ("cuda-bindings-*.json", CUDA_PYTHON_USED)]
)
def test_every_recorded_cuda_module_has_the_names(pattern: str, table: dict[str, set[str]]) -> None:
    releases = recorded(f"cuda_names/{pattern}")
    assert len(releases) == 2
    for release, names in releases.items():
        for kind, used in table.items():
            assert used <= set(names[kind]), (release, kind)


def test_the_enum_that_the_lists_leave_out_is_cuda_s_own() -> None:
    """CUdevice_attribute is not listed for cuda-python; pycuda's lists have its members from the same header."""
    text = ast.unparse(tree("cuda.py", "_CudaPython"))
    assert "'CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}'" in text
    assert "('MAJOR', 'MINOR')" in text
    for names in recorded("cuda_names/pycuda-*.json").values():
        assert {f"COMPUTE_CAPABILITY_{part}" for part in ("MAJOR", "MINOR")} <= set(names["device_attribute"])
