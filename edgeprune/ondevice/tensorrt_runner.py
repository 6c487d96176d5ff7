"""The runner of engines on the GPU, whose KV cache stays there, and their timing.

This file also runs on the device: Python 3.10, numpy, TensorRT or TensorRT for RTX, and a CUDA module. It knows
neither models nor tokenizers. The next step reads what the last one wrote, without a copy of ours: an engine that
updates its KV cache in place has one set of buffers, which is bound as past and present; one that joins past and new
tokens has two sets, which are swapped after every step.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import EngineError
from edgeprune.ondevice.cuda import Cuda
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.tensorrt import Messages, import_tensorrt

IDS = ("input_ids", "position_ids", "attention_mask")
WRITE_INDICES = "write_indices"  # of engines that update their KV cache in place: where a row's new tokens begin
LESS_MEMORY = "Close what else uses the GPU, or take a smaller --batch or --context."
ALIGNMENT = 256  # bytes, at a multiple of which TensorRT takes a tensor's memory
LAUNCH_BOUND = 0.8  # share of a step's GPU time; where putting the step on the stream takes longer, a replay is tried


class EngineRunner:
    """An engine of one of edgeprune's graphs with `last` logits, with room for `capacity` tokens.

    It has the interface of reference.StepRunner. `with` or `close` frees all that is on the GPU. Raises EngineError
    where the engine does not fit this GPU or release, or the memory does not suffice.
    """

    def __init__(self, plan: Path, batch: int, capacity: int, flavour: str) -> None:
        self.batch, self.capacity, self.past = batch, capacity, 0
        self._first = self._rows = 0  # the row of the cache that the first sequence of a step has; sequences of a step
        self.cuda = Cuda()
        self._engine = self._context = None
        try:
            self._open(plan, flavour)
        except BaseException:
            self.close()
            raise

    def _open(self, plan: Path, flavour: str) -> None:
        """Loads the engine and allocates its context and buffers. Raises EngineError."""
        # Load the engine.
        trt = import_tensorrt(flavour)
        self._messages = Messages(trt)
        self._runtime = trt.Runtime(self._messages.logger)
        # No variable holds the engine: in an error's traceback it would outlive CUDA's context.
        with mapped(plan) as content:
            self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            errors = self._messages.errors()
            raise EngineError(
                f"{plan.name} cannot be loaded by {flavour} {trt.__version__} on {self.cuda.gpu.name}: {errors}",
                LESS_MEMORY
                if "out of memory" in errors
                else "An engine fits the release and the GPU that it was "
                "built for: build it here with `edgeprune measure BUNDLE`, or finish.pyz in the bundle.",
            )
        # Create its context, which takes the memory for activations.
        self.memory_bytes = self._engine.device_memory_size_v2  # activations and scratch of one context
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(
                f"no memory for the {self.memory_bytes / 2**20:.0f} MiB that {plan.name} needs while it runs: "
                f"{self._messages.errors()}",
                LESS_MEMORY,
            )
        self._describe(trt)
        self._allocate()

    def _describe(self, trt: Any) -> None:
        """Reads the names, shapes and types of the engine's tensors, and the limits of its profile.

        Raises EngineError where the engine takes fewer sequences at once than the batch.
        """
        # Read the tensors.
        elements = {
            trt.DataType.FLOAT: np.float32,
            trt.DataType.HALF: np.float16,
            trt.DataType.INT64: np.int64,
            # numpy has no such types: the bits of such a cache are moved.
            trt.DataType.BF16: np.uint16,
            trt.DataType.FP8: np.uint8,
            trt.DataType.INT8: np.int8,
        }
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._types = {name: np.dtype(elements[self._engine.get_tensor_dtype(name)]) for name in names}
        self._caches = [name for name in names if name.startswith("past_key_values.")]
        self._shapes = {name: tuple(self._engine.get_tensor_shape(name)) for name in names}
        # Read the largest shapes: input_ids (batch, tokens), attention_mask (batch, past + tokens) or (batch, slots).
        _, _, most = self._engine.get_tensor_profile_shape("input_ids", 0)
        _, _, longest = self._engine.get_tensor_profile_shape("attention_mask", 0)
        self.most_batch, self.most_tokens = most
        if self.batch > self.most_batch:
            raise EngineError(
                f"the engine takes {self.most_batch} sequences at once, not {self.batch}", "Take a smaller --batch."
            )
        self.in_place = WRITE_INDICES in names
        self._slots = longest[1] if self.in_place else min(self.capacity, longest[1] - self.most_tokens + 1)
        self.capacity = min(self.capacity, self._slots)
        self.vocab_size = self._shapes["logits"][-1]
        if self.in_place:
            self._check_aliases()

    def _check_aliases(self) -> None:
        """Raises EngineError where the engine does not write its cache into the buffer that it reads.

        TensorRT has the call since the release that has such engines; a binding without it is taken at its word.
        """
        if not hasattr(self._engine, "get_aliased_input_tensor"):
            return
        for past in self._caches:
            present = _present(past)
            if (found := self._engine.get_aliased_input_tensor(present)) != past:
                raise EngineError(
                    f"the engine writes {present} over {found or 'no input'}, not over {past}",
                    "Build it again from the bundle's graph; if it persists, use an own profile with the dialect "
                    "opset23, which joins past and new tokens.",
                )

    def _allocate(self) -> None:
        """Allocates inputs, logits and the KV cache, and binds them to the engine."""
        self._logits = np.empty((self.batch, 1, self.vocab_size), self._types["logits"])
        # The inputs are int64: ids and positions (batch, most_tokens), the mask (batch, slots), write indices (batch,).
        self._address = {name: self.cuda.allocate(8 * self.batch * self.most_tokens) for name in IDS[:2]}
        self._address[IDS[2]] = self.cuda.allocate(8 * self.batch * self._slots)
        if self.in_place:
            self._address[WRITE_INDICES] = self.cuda.allocate(8 * self.batch)
        self._address["logits"] = self.cuda.allocate(self._logits.nbytes)
        # One set of buffers of the KV cache, or two that are swapped; all of it is zero, because 0 times NaN is NaN.
        self._sets = [
            {name: self.cuda.allocate(self.batch * self._row_bytes(name)) for name in self._caches}
            for _ in range(1 if self.in_place else 2)
        ]
        for name, address in self._address.items():
            self._bind(name, address)
        self._exchange()

    def __enter__(self) -> EngineRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the engine and its memory in the order that TensorRT requires, after the work that still runs."""
        if self._context is not None:
            with contextlib.suppress(EngineError):  # the failure of a GPU was reported at the step
                self.cuda.synchronize()
        self._context = self._engine = self._runtime = None  # from left to right
        self.cuda.close()

    @property
    def cache_bytes(self) -> int:
        """The bytes of the KV cache, of which an engine that is not in place has two, as allocated."""
        return sum(self.cuda.size_of(address) for one in self._sets for address in one.values())

    @property
    def buffer_bytes(self) -> int:
        """The bytes of inputs and logits, as allocated."""
        return sum(self.cuda.size_of(address) for address in self._address.values())

    def reset(self, past: int = 0) -> None:
        """Continues as if `past` tokens were in the cache, whatever it holds."""
        self.past = past

    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Returns the logits (batch, vocabulary) of the last token, after ids (batch, tokens) int64 join the cache.

        A prompt longer than the engine's longest sequence is run in parts. mask: (batch, past + tokens) int64, 0 for
        left padding. Raises EngineError where the cache is full or a step fails.
        """
        logits = self.run_rows(0, self.past, ids, mask)
        self.past += ids.shape[1]
        return logits

    def run_rows(self, first: int, past: int, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Returns what `run` does, of the sequences from the row `first` of the cache on, behind `past` tokens each."""
        self._check_room(total := past + ids.shape[1])
        mask = np.ones((len(ids), total), np.int64) if mask is None else mask
        # (rows, tokens): positions of the new tokens, in which padding does not count.
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past:]
        # Run as many tokens at once as the engine takes.
        for begin in range(0, ids.shape[1], self.most_tokens):
            part = slice(begin, begin + self.most_tokens)
            end = past + begin + ids[:, part].shape[1]
            self.stage(ids[:, part], positions[:, part], mask[:, :end], np.full(len(ids), past + begin), first)
            self.step()
            if not self.in_place:
                self._exchange()
        return self.last_logits()

    def advance(self, tokens: np.ndarray, pasts: np.ndarray) -> np.ndarray:
        """Returns the logits (batch, vocabulary) behind one token of each sequence, which joins the cache behind so
        many others; of an engine that has rows.

        tokens, pasts: (batch,) int64. Raises EngineError as `run`.
        """
        self._check_room(int(pasts.max()) + 1)
        mask = (np.arange(pasts.max() + 1) <= pasts[:, None]).astype(np.int64)
        self.stage(tokens[:, None], pasts[:, None], mask, pasts)
        self.step()
        return self.last_logits()

    @property
    def has_rows(self) -> bool:
        """Returns whether each sequence can have a past of its own: whether the KV cache is updated in place, and each
        row of it lies where TensorRT takes memory."""
        return self.in_place and all(self._row_bytes(name) % ALIGNMENT == 0 for name in self._caches)

    def row(self, place: int) -> EngineRow:
        """Returns a runner of one sequence, whose cache is a row of this one's."""
        return EngineRow(self, place)

    def last_logits(self) -> np.ndarray:
        """Returns the logits (rows, vocabulary) of the last step, once it has ended."""
        logits = self._logits[: self._rows]
        self.cuda.download(logits, self._address["logits"])
        return logits[:, -1].copy()

    def stage(
        self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, begins: np.ndarray, first: int = 0
    ) -> None:
        """Puts the inputs of a step on the GPU and sets their shapes in the engine.

        ids, positions: (rows, tokens). mask: (rows, past + tokens). begins: (rows,), the slots of the cache that the
        rows' first new tokens get, which only an engine with rows takes unequal. first: the row of the cache that the
        first one is. Raises EngineError where the engine does not take such shapes.
        """
        self._rows = len(ids)
        inputs = dict(zip(IDS, (ids, positions, mask), strict=True))
        if self.in_place:
            inputs[IDS[2]] = np.pad(mask, ((0, 0), (0, self._slots - mask.shape[1])))  # free slots
            inputs[WRITE_INDICES] = begins
            self._bind_rows(first)
        for name, value in inputs.items():
            self._shape(name, value.shape)
            self.cuda.upload(self._address[name], value)
        for name in self._caches:
            _, heads, _, head_dim = self._shapes[name]
            self._shape(name, (self._rows, heads, self._slots if self.in_place else int(begins[0]), head_dim))

    def step(self) -> None:
        """Puts the staged step on the stream, without waiting for it. Raises EngineError where TensorRT refuses it."""
        if not self._context.execute_async_v3(self.cuda.stream):
            raise EngineError(f"TensorRT refuses a step: {self._messages.errors()}", "Run `edgeprune doctor`.")

    def _check_room(self, total: int) -> None:
        """Raises EngineError where so many tokens have no room in the cache."""
        if total > self.capacity:
            raise EngineError(
                f"{total} tokens do not fit into the cache of {self.capacity}", "Shorten the prompt or the output."
            )

    def _row_bytes(self, name: str) -> int:
        """Returns the bytes of a row (num_key_value_heads, slots, head_dim) of a cache."""
        _, heads, _, head_dim = self._shapes[name]
        return heads * self._slots * head_dim * self._types[name].itemsize

    def _bind_rows(self, first: int) -> None:
        """Binds the rows of the cache from one on."""
        if first != self._first:
            self._first = first
            for name, address in self._sets[0].items():
                self._bind(name, address + first * self._row_bytes(name))
                self._bind(_present(name), address + first * self._row_bytes(name))

    def _exchange(self) -> None:
        """Swaps the past and present buffers of the KV cache, or binds the one set as both."""
        past, present = self._sets[0], self._sets[-1]
        for name in self._caches:
            self._bind(name, past[name])
            self._bind(_present(name), present[name])
        self._sets.reverse()

    def _bind(self, name: str, address: int) -> None:
        """Sets the address of a tensor. Raises EngineError where the engine has no such tensor."""
        if not self._context.set_tensor_address(name, address):
            raise EngineError(
                f"the engine has no tensor {name}: {self._messages.errors()}", "Build it again from the bundle's graph."
            )

    def _shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Sets the shape of an input. Raises EngineError where the engine does not take it."""
        if not self._context.set_input_shape(name, shape):
            raise EngineError(
                f"the engine does not take {name} of {'x'.join(map(str, shape))}: {self._messages.errors()}",
                "Build it again with a larger --context or --batch.",
            )


class EngineRow:
    """One sequence of an engine that has rows, with the interface of reference.StepRunner."""

    batch = 1

    def __init__(self, engine: EngineRunner, place: int) -> None:
        self.engine, self.place, self.past = engine, place, 0
        self.capacity, self.vocab_size = engine.capacity, engine.vocab_size

    def reset(self, past: int = 0) -> None:
        """Continues as if `past` tokens were in the row, whatever it holds."""
        self.past = past

    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Returns the logits (1, vocabulary) of the last token, as EngineRunner.run."""
        logits = self.engine.run_rows(self.place, self.past, ids, mask)
        self.past += ids.shape[1]
        return logits


def _present(past: str) -> str:
    """Returns the name of the output that continues a cache."""
    return past.replace("past_key_values", "present")


@contextmanager
def mapped(plan: Path) -> Iterator[mmap.mmap]:
    """Maps the bytes of a file without a copy: on a Jetson the GPU shares the memory that a copy would take.

    Raises EngineError where the file cannot be read.
    """
    try:
        with plan.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        reason = getattr(error, "strerror", None) or error
        raise EngineError(f"{plan} cannot be read: {reason}", "Build the engine first, or copy it again.") from None
    with content:
        yield content


class Timed:
    """Prefill and decode of one engine on random tokens, each as a function that returns ms of the GPU's own clock.

    Where the processor takes about as long to launch a decode step as the GPU to run it, the step is captured once
    and replayed; `note` then describes that, or the reason why it was not possible.
    """

    def __init__(self, runner: EngineRunner, workload: Workload, seed: int = 0) -> None:
        self._runner, self._workload = runner, workload
        generator = np.random.default_rng(seed)
        self._prompt = generator.integers(0, runner.vocab_size, (workload.batch, workload.prompt))  # (batch, prompt)
        self.note = ""
        self._replay: Any = None

    def prepare_decode(self) -> None:
        """Prepares the slowest step, at past = context - 1; the content of the cache does not change its time."""
        # Warm up, and compare the time of launching the step with the time of the GPU.
        self._stage(self._prompt[:, :1], self._workload.context - 1)
        times = []  # (gpu_ms, enqueue_ms) of each step
        spent = 0.0
        while spent < 1e3 * timing().warm_up_seconds or len(times) < 3:
            times.append(self._runner.cuda.time_ms(self._runner.step))
            spent += max(times[-1])
        gpu_ms, enqueue_ms = np.median(times, axis=0)
        if enqueue_ms <= LAUNCH_BOUND * gpu_ms:
            return
        # Replay a captured step where launching it takes too long.
        self._replay = self._runner.cuda.capture(self._runner.step)
        share = f"launching a decode step takes {enqueue_ms:.2f} ms of its {gpu_ms:.2f} ms"
        layer = self._runner.cuda.gpu.layer
        if self._replay:
            self.note = f"{share}: decode was measured as the replay of a captured CUDA graph"
        elif layer.startswith("pycuda"):
            self.note = f"{share}, and {layer} cannot replay it: with cuda-python it may be faster"
        else:
            self.note = f"{share}, and the engine cannot be captured for a replay"

    def decode(self) -> float:
        """Runs the prepared decode step, or its replay, and returns its ms."""
        return self._runner.cuda.time_ms(self._replay or self._runner.step)[0]

    def prepare_prefill(self) -> None:
        """Prepares the prompt from an empty cache; a captured decode step is not replayed after this."""
        self._replay = None
        self._stage(self._prompt, 0)

    def prefill(self) -> float:
        """Runs the prepared prefill and returns its ms."""
        return self._runner.cuda.time_ms(self._runner.step)[0]

    def _stage(self, ids: np.ndarray, past: int) -> None:
        """Stages a step of ids (batch, tokens) after `past` tokens, without padding."""
        self._runner.reset(past)
        batch, tokens = ids.shape
        positions = np.broadcast_to(np.arange(past, past + tokens), (batch, tokens))
        self._runner.stage(ids, positions, np.ones((batch, past + tokens), np.int64), np.full(batch, past))
