"""The runner of graphs in ONNX Runtime on the CPU, with a KV cache that is updated in place, and its measurements.

This file also runs on the device: Python 3.10, standard library, numpy and onnxruntime. It knows no model. Its
measurements are meant for a process of their own.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import EngineError
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.machine import peak_bytes
from edgeprune.ondevice.timing import described, interleave, stopwatch

ELEMENTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
GRAPH_FILE = "model.onnxruntime.last.onnx"  # the graph of a candidate in the dialect that ONNX Runtime runs
GRAPH_OF_ALL = "model.onnxruntime.onnx"  # the same with the logits of all positions
BY_CHANNEL_BLOCKS = ("session.qdq_matmulnbits_block_size", "-1")
"""The entry of a session's options with which a product of int8 codes runs in blocks as wide as its inputs allow, up to
256, and not of 32: prefill then takes 0.8 of the time, and the scales are not repeated as often (1.32)."""
_EXACT = ("session.disable_quant_qdq", "1")
_EXACT_EXPERTS = {"ORT_QMOE_CPU_QNBIT_GEMM": "0"}  # the same of experts, which no option of a session sets (1.32)
ROW_LENGTHS = "row_lengths"  # the property of a graph whose sequences may differ in length, padded on the right
DECODE_STEPS = 8  # steps over which the peak memory is measured


class GraphRunner:
    """A session on a graph of the onnxruntime dialect, and its KV cache of `capacity` tokens.

    exact: as of open_session. Raises EngineError where ONNX Runtime cannot load the graph.
    """

    def __init__(self, graph: Path, batch: int, capacity: int, threads: int | None = None, exact: bool = False) -> None:
        self.capacity = capacity
        self.session = open_session(graph, threads, exact)
        self.vocab_size = int(self.session.get_outputs()[0].shape[-1])
        self.hold(batch)

    def another(self) -> GraphRunner:
        """Returns a runner of the same session with an empty cache of its own."""
        runner = copy.copy(self)
        runner.hold(self.batch)
        return runner

    def row(self, place: int) -> GraphRunner:
        """Returns a runner of one sequence, whose cache is that of one of this one's."""
        runner = copy.copy(self)
        runner.batch, runner.past = 1, 0
        runner._cache = {name: buffer[place : place + 1] for name, buffer in self._cache.items()}
        return runner

    def hold(self, batch: int) -> None:
        """Makes an empty cache for another number of sequences, in the same session."""
        self.batch, self.past, self._cache = batch, 0, {}  # the old cache is freed first
        self._cache = {
            # np.full writes the pages; those of np.zeros would cost neither memory nor time until they are written.
            # (batch, num_key_value_heads, capacity, head_dim)
            node.name: np.full((batch, node.shape[1], self.capacity, node.shape[3]), 0, ELEMENTS[node.type])
            for node in self.session.get_inputs()
            if node.name.startswith("past_key_values.")
        }

    @property
    def buffers(self) -> list[np.ndarray]:
        """Returns the cache, (batch, num_key_value_heads, capacity, head_dim) for each key and value of a layer."""
        return list(self._cache.values())

    @property
    def cache_bytes(self) -> int:
        """Returns the bytes of the cache of all its sequences."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def reset(self, past: int = 0) -> None:
        """Continues as if `past` tokens were in the cache, whatever it holds."""
        self.past = past

    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Returns the logits (batch, vocabulary) of the last token, as `logits` does of all."""
        return self.logits(ids, mask)[:, -1]

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Returns the graph's logits (batch, positions, vocabulary), after ids (batch, tokens) int64 join the cache.

        mask: (batch, past + tokens) int64, 0 for left padding. Raises EngineError where the cache is full or ONNX
        Runtime refuses the step.
        """
        batch, tokens = ids.shape
        total = self.past + tokens
        if mask is None:
            mask = np.ones((batch, total), np.int64)
        # (batch, tokens): positions of the new tokens, in which padding does not count.
        logits = self._run(ids, mask, np.maximum(mask.cumsum(axis=1) - 1, 0)[:, self.past :])
        self.past = total
        return logits

    def advance(self, tokens: np.ndarray, pasts: np.ndarray) -> np.ndarray:
        """Returns the logits (batch, vocabulary) behind one token of each sequence, which joins the cache behind so
        many others.

        tokens, pasts: (batch,) int64. A row's logits are the same to the last bit whatever the others hold. Raises
        EngineError as `logits`, and for a graph whose sequences are of one length.
        """
        if len(tokens) > 1 and ROW_LENGTHS not in self.session.get_modelmeta().custom_metadata_map:
            raise EngineError(
                "the bundle's graph is of an older edgeprune, and takes one request at a time",
                "Fit it again, or give --slots 1.",
            )
        mask = (np.arange(pasts.max() + 1) <= pasts[:, None]).astype(np.int64)
        return self._run(tokens[:, None], mask, pasts[:, None])[:, -1]

    def _run(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Returns the logits of new tokens, which join the cache. ids, positions: (batch, tokens) int64; mask: (batch,
        past + tokens) int64. Raises EngineError where the cache is full or ONNX Runtime refuses the step."""
        import onnxruntime as ort

        (batch, tokens), total = ids.shape, mask.shape[1]
        if total > self.capacity:
            raise EngineError(
                f"{total} tokens do not fit into the cache of {self.capacity}", "Shorten the prompt or the output."
            )
        # Bind the inputs.
        binding = self.session.io_binding()
        for name, value in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)):
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        # The same buffer is past and present: the step updates it in place.
        for name, buffer in self._cache.items():
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits", "cpu")
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            raise EngineError(
                f"ONNX Runtime failed at a step of {batch} x {tokens} tokens: {error}",
                "Try a smaller batch or context; if it persists, export the model again.",
            ) from None
        return binding.get_outputs()[-1].numpy()


def open_session(graph: Path, threads: int | None, exact: bool = False) -> Any:
    """Opens a session on a graph on the CPU. Raises EngineError where ONNX Runtime cannot load it.

    exact: matrices of a weight format are dequantised when the graph is loaded, so that the logits are those of floats
    and the memory is that of a float model, as references need it. Otherwise, as is deployed, their products stay on
    the codes: each block of inputs is rounded to 8 bits, and sums are of whole numbers.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Threads that still spin take the processor from the next session that is timed, for tens of milliseconds.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(*(_EXACT if exact else BY_CHANNEL_BLOCKS))
    if threads:
        options.intra_op_num_threads = threads
    before = {name: os.environ.get(name) for name in _EXACT_EXPERTS}
    try:
        os.environ.update(_EXACT_EXPERTS if exact else {})
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise EngineError(
            f"ONNX Runtime cannot load {graph}: {error}", "Export the model again, or update onnxruntime."
        ) from None
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Timed:
    """Prefill and decode of one graph on random tokens, each as a function to be timed."""

    def __init__(self, graph: Path, workload: Workload, threads: int | None, seed: int) -> None:
        self.runner = GraphRunner(graph, workload.batch, workload.context, threads)
        generator = np.random.default_rng(seed)
        self._prompt = generator.integers(
            0, self.runner.vocab_size, (workload.batch, workload.prompt)
        )  # (batch, prompt)
        self._last = workload.context - 1

    def prefill(self) -> None:
        """Runs the prompt from an empty cache."""
        self.runner.reset()
        self.runner.run(self._prompt)

    def decode(self) -> None:
        """Runs the slowest step, at past = context - 1; the content of the cache does not change its time."""
        self.runner.reset(self._last)
        self.runner.run(self._prompt[:, :1])


def measure_latency(
    graphs: dict[str, Path], workload: Workload, seconds: float, threads: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Times prefill and decode of graphs by name, in turn.

    Returns, for `decode` and `prefill` and each graph, the percentiles and the interval of the median in ms and, for
    all but the first graph, the interval of the ratio to it.
    """
    timed = {name: Timed(graph, workload, threads, seed) for name, graph in graphs.items()}
    return {
        kind: described(
            interleave({name: stopwatch(getattr(graph, kind)) for name, graph in timed.items()}, seconds / 2),
            list(graphs),
        )
        for kind in ("decode", "prefill")
    }


def measure_memory(graph: Path, workload: Workload, threads: int | None = None, seed: int = 0) -> dict[str, int]:
    """Returns the peak resident bytes of this process before the graph is loaded, and over a prefill and some steps.

    It is meant for a fresh process: whatever else the process holds counts as well.
    """
    import onnxruntime  # noqa: F401

    baseline = peak_bytes()
    timed = Timed(graph, workload, threads, seed)
    timed.prefill()
    for _ in range(DECODE_STEPS):
        timed.decode()
    return {"baseline": baseline, "peak": peak_bytes()}
