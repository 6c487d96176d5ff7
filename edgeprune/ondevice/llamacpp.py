"""The runner of GGUF files in llama.cpp on a processor, and its measurements, as llama-bench makes them.

This file also runs on the device: Python 3.10, standard library, numpy, and the package xllamacpp, whose library
exports llama.cpp's C interface. It knows no model. Its measurements are meant for a process of their own.

Of the two structures that the interface takes by value, which grow from release to release, only the first fields are
named; the rest is room, which the library fills with its defaults and reads as far as it goes. Those are llama-bench's:
a cache in fp16, flash attention where the model allows it, batches of 2048 tokens in parts of 512.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import EngineError
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.lines import one_line
from edgeprune.ondevice.machine import cores, peak_bytes
from edgeprune.ondevice.timing import described, interleave, stopwatch

MODEL_FILE = "model.gguf"  # of a candidate, in the folder of its engine
DECODE_STEPS = 8  # steps over which the peak memory is measured
_ROOM = 128  # of 8 bytes each, for the fields that are not named
_DEFAULTS = (512, 2048, 512, 1)  # that the first fields of a context have in every release with this layout
_ERROR, _CONTINUED = 4, 5  # levels of a log's lines
_LAST_WORDS = 6  # lines of the log that an error tells
_UPDATE = "Update it: pip install --upgrade xllamacpp"


class _ModelParams(ctypes.Structure):
    _fields_ = [("devices", ctypes.c_void_p), ("rest", ctypes.c_uint64 * _ROOM)]


class _ContextParams(ctypes.Structure):
    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * _ROOM),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [("n_tokens", ctypes.c_int32), ("pointers", ctypes.c_void_p * 6)]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_TOKENS = ctypes.POINTER(ctypes.c_int32)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG, _POINTER)),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, _ModelParams)),
    "llama_init_from_model": (_POINTER, (_POINTER, _ContextParams)),
    "llama_model_free": (None, (_POINTER,)),
    "llama_free": (None, (_POINTER,)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
    "llama_n_ctx": (ctypes.c_uint32, (_POINTER,)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_clear": (None, (_POINTER, ctypes.c_bool)),
    "llama_memory_seq_rm": (ctypes.c_bool, (_POINTER, _INT, _INT, _INT)),
    "llama_batch_get_one": (_Batch, (_TOKENS, _INT)),
    "llama_decode": (_INT, (_POINTER, _Batch)),
    "llama_synchronize": (None, (_POINTER,)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_POINTER, _INT)),
    "llama_set_n_threads": (None, (_POINTER, _INT, _INT)),
    "llama_attach_threadpool": (None, (_POINTER, _POINTER, _POINTER)),
    "ggml_threadpool_params_init": (None, (_POINTER, ctypes.c_int)),
    "ggml_threadpool_new": (_POINTER, (_POINTER,)),
    "ggml_threadpool_free": (None, (_POINTER,)),
}


class Library:
    """llama.cpp's functions in the library of xllamacpp, and what they log.

    Raises EngineError where the package is missing, or where its library has another interface.
    """

    def __init__(self) -> None:
        try:
            from xllamacpp import xllamacpp
        except Exception as error:  # a missing library is not an ImportError in every release
            raise EngineError(
                f"llama.cpp cannot be loaded: {type(error).__name__}: {one_line(str(error))}", "pip install xllamacpp"
            ) from None
        library = ctypes.CDLL(xllamacpp.__file__)
        for name, (result, arguments) in _FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise _other_interface(f"it has no {name}") from None
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("llama_"), function)
        # The log is kept, for the reason of a refusal; the callback lives as long as the library.
        self._lines: deque[str] = deque(maxlen=_LAST_WORDS)
        self._callback = _LOG(self._log)
        self.log_set(self._callback, None)
        self.backend_init()

    def _log(self, level: int, text: bytes, _: object) -> None:
        if level in (_ERROR, _CONTINUED):
            self._lines.append(text.decode(errors="replace"))

    @property
    def reason(self) -> str:
        """Returns the last errors that were logged, in one line."""
        return one_line("".join(self._lines)) or "it logged no reason"


def _other_interface(what: str) -> EngineError:
    return EngineError(f"this release of xllamacpp has another llama.cpp than is known: {what}", _UPDATE)


class LlamaRunner:
    """A GGUF file in llama.cpp on the processor, with a KV cache of `capacity` tokens of one sequence.

    threads: None for all cores. Raises EngineError where llama.cpp cannot load it.
    """

    batch = 1

    def __init__(self, path: Path, capacity: int, threads: int | None = None, library: Library | None = None) -> None:
        self.capacity, self.past = capacity, 0
        self._library = library or Library()
        self._held: list[tuple[Any, int]] = []  # what frees it, and the handle
        # Freed before the interpreter and the library's log are gone, to which llama.cpp tells it.
        self._free = weakref.finalize(self, _free, self._held, self._library)
        self._open(path, threads or cores())

    def _open(self, path: Path, threads: int) -> None:
        """Loads the file, and makes the context and its threads. Raises EngineError."""
        library = self._library
        # The model, on no device but the processor: the list of devices is empty.
        model = library.model_default_params()
        model.devices = ctypes.addressof(nothing := ctypes.c_void_p(None))
        loaded = library.model_load_from_file(str(path).encode(), model)
        del nothing
        if not loaded:
            raise EngineError(f"llama.cpp cannot load {path}: {library.reason}", f"Write the file again. {_UPDATE}")
        self._held.append((library.model_free, loaded))
        self.vocab_size = int(library.vocab_n_tokens(library.model_get_vocab(loaded)))
        # The context.
        params = library.context_default_params()
        if (found := (params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max)) != _DEFAULTS:
            raise _other_interface(f"a context begins with {found}")
        params.n_ctx, self._part = self.capacity, params.n_batch
        self._context = library.init_from_model(loaded, params)
        if not self._context:
            raise EngineError(
                f"llama.cpp cannot hold {self.capacity} tokens of {path}: {library.reason}", "Try a shorter --context."
            )
        self._held.append((library.free, self._context))
        if library.n_ctx(self._context) < self.capacity:
            raise _other_interface("a context is shorter than was asked for")
        # Threads of its own, which wait between the steps; without them llama.cpp starts new ones at every step.
        library.set_n_threads(self._context, threads, threads)
        pool = (ctypes.c_uint64 * 1024)()
        library.ggml_threadpool_params_init(pool, threads)
        threadpool = library.ggml_threadpool_new(pool)
        self._held.insert(1, (library.ggml_threadpool_free, threadpool))  # behind the context, which uses it
        library.attach_threadpool(self._context, threadpool, None)
        self._memory = library.get_memory(self._context)

    def close(self) -> None:
        """Frees all that llama.cpp holds, as the end of the runner or of the process does."""
        self._free()

    def reset(self, past: int = 0) -> None:
        """Continues behind `past` tokens: those that the cache holds, or as many others."""
        if past == 0:
            self._library.memory_clear(self._memory, False)
        elif self.past < past or not self._library.memory_seq_rm(self._memory, 0, past, -1):
            self._library.memory_clear(self._memory, False)
            self.past = 0
            self._decode(np.arange(past) % self.vocab_size)
        self.past = past

    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Returns the logits (1, vocabulary) of the last token, fp32, after ids (1, tokens) join the cache.

        mask: not looked at, as one sequence has no padding. Raises EngineError where the cache is full, or where
        llama.cpp refuses the step.
        """
        total = self.past + ids.shape[1]
        if total > self.capacity:
            raise EngineError(
                f"{total} tokens do not fit into the cache of {self.capacity}", "Shorten the prompt or the output."
            )
        self._decode(ids[0])
        logits = self._library.get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (1, self.vocab_size)).copy()

    def _decode(self, ids: np.ndarray) -> None:
        """Takes ids (tokens,) into the cache, in parts as long as a batch. Raises EngineError."""
        tokens = np.ascontiguousarray(ids, np.int32)
        for begin in range(0, len(tokens), self._part):
            part = tokens[begin : begin + self._part]
            batch = self._library.batch_get_one(part.ctypes.data_as(_TOKENS), len(part))
            if status := self._library.decode(self._context, batch):
                raise EngineError(
                    f"llama.cpp failed at a step of {len(part)} tokens, status {status}: {self._library.reason}",
                    "Try a shorter context.",
                )
        self._library.synchronize(self._context)
        self.past += len(tokens)


def _free(held: list[tuple[Any, int]], library: Library) -> None:
    """Frees what is held, the last first; library: kept until then."""
    while held:
        free, handle = held.pop()
        free(handle)


class Timed:
    """Prefill and decode of one file on random tokens, each as a function to be timed."""

    def __init__(self, path: Path, workload: Workload, threads: int | None, seed: int, library: Library) -> None:
        self.runner = LlamaRunner(path, workload.context, threads, library)
        generator = np.random.default_rng(seed)
        self._prompt = generator.integers(0, self.runner.vocab_size, (1, workload.prompt))
        self._last = workload.context - 1

    def prefill(self) -> None:
        """Runs the prompt from an empty cache."""
        self.runner.reset()
        self.runner.run(self._prompt)

    def prepare_decode(self) -> None:
        """Fills the cache up to the slowest step."""
        self.runner.reset(self._last)

    def decode(self) -> None:
        """Runs the slowest step, at past = context - 1."""
        self.runner.reset(self._last)
        self.runner.run(self._prompt[:, :1])


def measure_latency(
    files: dict[str, Path], workload: Workload, seconds: float, threads: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Times prefill and decode of files by name, in turn; returns what onnxruntime.measure_latency does."""
    library = Library()
    timed = {name: Timed(path, workload, threads, seed, library) for name, path in files.items()}
    latency = {}
    for one in timed.values():
        one.prepare_decode()
    for kind in ("decode", "prefill"):
        runs = {name: stopwatch(getattr(one, kind)) for name, one in timed.items()}
        latency[kind] = described(interleave(runs, seconds / 2), list(files))
    return latency


def measure_memory(path: Path, workload: Workload, threads: int | None = None, seed: int = 0) -> dict[str, int]:
    """Returns the peak resident bytes of this process before the file is loaded, and over a prefill and some steps.

    It is meant for a fresh process. Pages of the file that llama.cpp reads count as long as they are mapped.
    """
    library = Library()
    baseline = peak_bytes()
    timed = Timed(path, workload, threads, seed, library)
    timed.prefill()
    timed.prepare_decode()
    for _ in range(DECODE_STEPS):
        timed.decode()
    return {"baseline": baseline, "peak": peak_bytes()}
