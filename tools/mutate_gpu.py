"""Breaks the GPU path line by line and shows which test on the doubles notices; exit code 1 if one does not.

    python tools/mutate_gpu.py              # all
    python tools/mutate_gpu.py exchange     # those whose name contains a word

Each mutation is made in a copy of the package, in which the tests of the GPU path run until the first fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {  # the file's own tests first, then those of what rests on it
    "cuda.py": ("test_cuda.py", "test_tensorrt_runner.py"),
    "tensorrt_runner.py": ("test_tensorrt_runner.py", "test_tensorrt_runner_in_place.py", "test_reference.py"),
    "reference.py": ("test_reference.py",),
    "tensorrt.py": ("test_tensorrt.py", "test_tensorrt_runner.py", "test_tensorrt_runner_in_place.py"),
}
OPTIONS = ("-k", "on_a_double or test_reference or test_the_node", "-p", "no:cacheprovider")
COPIED = ("edgeprune", "tests", "profiles", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    """One line of a file below edgeprune/ondevice: `old`, which stands there once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


MUTATIONS = (
    Mutation("halves are not exchanged", "tensorrt_runner.py", "self._sets.reverse()", "pass"),
    Mutation(
        "present is bound to the past's half",
        "tensorrt_runner.py",
        "self._bind(_present(name), present[name])",
        "self._bind(_present(name), past[name])",
    ),
    Mutation(
        "in place all is written at the first slot",
        "tensorrt_runner.py",
        "np.full(len(ids), past + begin)",
        "np.full(len(ids), 0)",
    ),
    Mutation("in place there are two caches", "tensorrt_runner.py", "range(1 if self.in_place else 2)", "range(2)"),
    Mutation(
        "in place the mask ends with the tokens", "tensorrt_runner.py", "(0, self._slots - mask.shape[1])", "(0, 0)"
    ),
    Mutation(
        "in place the cache has room for what was asked alone",
        "tensorrt_runner.py",
        "self._slots = longest[1] if self.in_place else",
        "self._slots = self.capacity if self.in_place else",
    ),
    Mutation(
        "in place aliases are not compared",
        "tensorrt_runner.py",
        "self._engine.get_aliased_input_tensor(present)) != past:",
        'self._engine.get_aliased_input_tensor(present)) == "":',
    ),
    Mutation("in place any context is built", "tensorrt.py", "0 <= slots[0] < workload.context", "0 <= slots[0] < 0"),
    Mutation(
        "past is not advanced",
        "tensorrt_runner.py",
        "self.run_rows(0, self.past, ids, mask)",
        "self.run_rows(0, 0, ids, mask)",
    ),
    Mutation("a row is the first one", "tensorrt_runner.py", "if first != self._first:", "if first == -1:"),
    Mutation(
        "positions are off by one", "tensorrt_runner.py", "mask.cumsum(axis=1) - 1, 0)", "mask.cumsum(axis=1), 0)"
    ),
    Mutation("positions begin at zero", "tensorrt_runner.py", "- 1, 0)[:, past:]", "- 1, 0)[:, : ids.shape[1]]"),
    Mutation("the mask is one short", "tensorrt_runner.py", "mask[:, :end]", "mask[:, : end - 1]"),
    Mutation("the mask is cut at its begin", "tensorrt_runner.py", "mask[:, :end]", "mask[:, -end:]"),
    Mutation(
        "parts overlap by a token",
        "tensorrt_runner.py",
        "range(0, ids.shape[1], self.most_tokens)",
        "range(0, ids.shape[1], self.most_tokens - 1)",
    ),
    Mutation(
        "one token more than there is room for",
        "tensorrt_runner.py",
        "if total > self.capacity:",
        "if total > self.capacity + 1:",
    ),
    Mutation(
        "capacity leaves the profile's end out",
        "tensorrt_runner.py",
        "longest[1] - self.most_tokens + 1)",
        "longest[1] - self.most_tokens)",
    ),
    Mutation(
        "capacity beyond the engine's",
        "tensorrt_runner.py",
        "self.capacity = min(self.capacity,",
        "self.capacity = max(self.capacity,",
    ),
    Mutation(
        "the cache holds one sequence",
        "tensorrt_runner.py",
        "allocate(self.batch * self._row_bytes(name))",
        "allocate(self._row_bytes(name))",
    ),
    Mutation(
        "logits of another memory",
        "tensorrt_runner.py",
        'self.cuda.download(logits, self._address["logits"])',
        "self.cuda.download(logits, self._sets[0][self._caches[0]])",
    ),
    Mutation(
        "the past's shape is not set",
        "tensorrt_runner.py",
        "heads, self._slots if self.in_place else int(begins[0]), head_dim)",
        "heads, self._slots if self.in_place else 0, head_dim)",
    ),
    Mutation(
        "a refused step goes unnoticed",
        "tensorrt_runner.py",
        "if not self._context.execute_async_v3(self.cuda.stream):",
        "if self._context.execute_async_v3(self.cuda.stream) is None:",
    ),
    Mutation(
        "the default stream instead of its own",
        "tensorrt_runner.py",
        "execute_async_v3(self.cuda.stream)",
        "execute_async_v3(0)",
    ),
    Mutation(
        "the runtime goes before the engine",
        "tensorrt_runner.py",
        "self._context = self._engine = self._runtime = None",
        "self._runtime = self._engine = self._context = None",
    ),
    Mutation(
        "the engine outlives CUDA's context",
        "tensorrt_runner.py",
        "self._context = self._engine = self._runtime = None",
        "self._context = None",
    ),
    Mutation(
        "the engine goes before its work",
        "tensorrt_runner.py",
        "                self.cuda.synchronize()\n",
        "                pass\n",
    ),
    Mutation("a failed context is used", "tensorrt_runner.py", "if self._context is None:", "if self._context == 0:"),
    Mutation(
        "the replay is kept after prefill",
        "tensorrt_runner.py",
        "        self._replay = None\n        self._stage(self._prompt, 0)",
        "        self._stage(self._prompt, 0)",
    ),
    Mutation(
        "the replay is never used",
        "tensorrt_runner.py",
        "time_ms(self._replay or self._runner.step)",
        "time_ms(self._runner.step)",
    ),
    Mutation(
        "launch-bound the wrong way round",
        "tensorrt_runner.py",
        "if enqueue_ms <= LAUNCH_BOUND * gpu_ms:",
        "if enqueue_ms > LAUNCH_BOUND * gpu_ms:",
    ),
    Mutation("decode is timed at the wrong past", "tensorrt_runner.py", "self._workload.context - 1)", "0)"),
    Mutation(
        "a step may come before its inputs",
        "cuda.py",
        "np.ascontiguousarray(array))\n        self._driver.settle()\n",
        "np.ascontiguousarray(array))\n",
    ),
    Mutation(
        "download does not wait",
        "cuda.py",
        "        self.synchronize()\n        self._driver.download",
        "        self._driver.download",
    ),
    Mutation(
        "upload does not wait",
        "cuda.py",
        "        self.synchronize()\n        self._driver.upload",
        "        self._driver.upload",
    ),
    Mutation("memory is not cleared", "cuda.py", "        self._driver.clear(memory, size)\n", ""),
    Mutation("memory is not freed", "cuda.py", "                self._driver.free(memory)\n", "                pass\n"),
    Mutation("a copy may be too large", "cuda.py", "if array.nbytes > size:", "if array.nbytes > 2 * size:"),
    Mutation(
        "events in the wrong order",
        "cuda.py",
        "elapsed_ms(self._begin, self._end)",
        "elapsed_ms(self._end, self._begin)",
    ),
    Mutation(
        "the first event comes after the work",
        "cuda.py",
        "        self._driver.record(self._begin, self._stream)\n        start = time.perf_counter()\n        work()",
        "        start = time.perf_counter()\n        work()\n        self._driver.record(self._begin, self._stream)",
    ),
    Mutation(
        "the time is read before it is there",
        "cuda.py",
        "        self.synchronize()\n        return self._driver.elapsed",
        "        return self._driver.elapsed",
    ),
    Mutation(
        "capture begins with work on the stream",
        "cuda.py",
        "        self.synchronize()\n        return self._driver.capture",
        "        return self._driver.capture",
    ),
    Mutation(
        "a broken capture is replayed",
        "cuda.py",
        "        if code != self._cuda.CUresult.CUDA_SUCCESS:\n            return None",
        "        if False:\n            return None",
    ),
    Mutation(
        "streams are not destroyed",
        "cuda.py",
        '        self._made.callback(self._call, "cuStreamDestroy", stream)\n',
        "",
    ),
    Mutation(
        "the tolerance is inverted", "reference.py", 'agreement["cosine"] >= cosine', 'agreement["cosine"] <= cosine'
    ),
    Mutation(
        "the error has no limit", "reference.py", 'and agreement["error"] <= error', 'and agreement["error"] <= 1e301'
    ),
    Mutation("the best position counts", "reference.py", '"cosine": min(cosines)', '"cosine": max(cosines)'),
    Mutation("logits that are no numbers count", "reference.py", 'else float("inf"))', "else 0.0)"),
    Mutation(
        "steps are not compared in order",
        "reference.py",
        "yield runner.run(ids[:, index : index + 1])",
        "yield runner.run(ids[:, index - 1 : index])",
    ),
    Mutation(
        "types are left to the builder",
        "tensorrt.py",
        "1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)",
        "0",
    ),
    Mutation("the workspace has no limit", "tensorrt.py", "if limits.workspace_bytes is not None:", "if False:"),
    Mutation(
        "the profile ends before the prompt",
        "tensorrt.py",
        "most or workload.batch, workload.prompt, last)",
        "most or workload.batch, workload.prompt - 1, last)",
    ),
    Mutation(
        "the context's last place is outside",
        "tensorrt.py",
        "last = workload.context - 1",
        "last = workload.context - 2",
    ),
    Mutation(
        "timings of another GPU are used",
        "tensorrt.py",
        "config.set_timing_cache(timings, False):",
        "config.set_timing_cache(timings, True):",
    ),
)


def mutated(folder: Path, mutation: Mutation) -> None:
    """Makes a mutation in the copy. Raises SystemExit where its line does not stand there exactly once."""
    path = folder / "edgeprune" / "ondevice" / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.name}: {mutation.file} has its line {text.count(mutation.old)} times, not once")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def failed(folder: Path, names: Iterable[str]) -> str:
    """Returns the first test that fails, empty if none does. Raises SystemExit where the tests did not run."""
    tests = [str(folder / "tests" / "ondevice" / name) for name in names]
    result = subprocess.run(
        [sys.executable, "-B", "-m", "pytest", "-x", "-q", *OPTIONS, *tests],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    if result.returncode == 0:
        return ""
    match = re.search(r"^(?:FAILED|ERROR) \S*/(test_\w+\.py::[^\s\[]+)", result.stdout, re.MULTILINE)
    if not match:
        raise SystemExit(f"the tests did not run:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return match[1]


def main() -> int:
    """Prints a line for each mutation and returns 1 where one survived, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only mutations whose name contains this")
    word = parser.parse_args().word
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        if not word and (test := failed(folder, dict.fromkeys(chain.from_iterable(TESTS.values())))):
            raise SystemExit(f"without a mutation {test} fails")
        for mutation in (mutation for mutation in MUTATIONS if word in mutation.name):
            original = folder / "edgeprune" / "ondevice" / mutation.file
            shutil.copy(ROOT / "edgeprune" / "ondevice" / mutation.file, original)
            mutated(folder, mutation)
            test = failed(folder, TESTS[mutation.file])
            survivors += not test
            print(f"| {mutation.file} | {mutation.name} | {test or 'SURVIVED'} |", flush=True)
            shutil.copy(ROOT / "edgeprune" / "ondevice" / mutation.file, original)
    print(f"{survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
