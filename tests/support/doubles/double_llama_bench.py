"""A test double of llama.cpp's llama-bench: its options and its answer in JSON, with times made of the file's size.

    python3 double_llama_bench.py -m FILE -p 16 -n 0 -d 0 -r 3 -o json

It computes nothing: a token of a prompt takes a nanosecond for each byte of the file, a step of decode ten, and a
hundred more for each token before it. Every command line is added to the file `llama-bench.calls` in the home folder.
The release in DOUBLE_RELEASE=old has no option -d, as those before April of 2025; DOUBLE_GPU names a GPU.
"""

import json
import os
import sys
import time
from pathlib import Path

OPTIONS = {"-m": "", "-p": "512", "-n": "128", "-d": "0", "-r": "5", "-o": "md"}
HELP = """  -p, --n-prompt <n>
  -n, --n-gen <n>
  -d, --n-depth <n>
  -o, --output <csv|json|jsonl|md|sql>
  --list-devices
"""


def main(words: list[str]) -> int:
    old = os.environ.get("DOUBLE_RELEASE") == "old"
    if words == ["--help"]:
        print("\n".join(line for line in HELP.splitlines() if not (old and "depth" in line)))
        return 0
    if words == ["--list-devices"]:
        print(f"Available devices:\n  {os.environ.get('DOUBLE_GPU', '(none)')}")
        return 0
    with (Path.home() / "llama-bench.calls").open("a") as file:
        file.write(json.dumps(words) + "\n")
    options = OPTIONS | dict(zip(words[::2], words[1::2], strict=True))
    assert options.keys() == OPTIONS.keys() and not old
    model = Path(options["-m"])
    time.sleep(0.02)
    if not model.is_file():
        print(f"error: failed to load model '{model}'", file=sys.stderr)
        return 1
    prompt, generated, depth, repetitions = (int(options[name]) for name in ("-p", "-n", "-d", "-r"))
    assert (prompt == 0) != (generated == 0)
    assert options["-o"] == "json"
    size = model.stat().st_size
    ns = size * prompt + (10 * size + 100 * depth) * generated
    test = {"build_number": 6000, "cpu_info": "a double's processor", "gpu_info": os.environ.get("DOUBLE_GPU", "")}
    test |= {"n_prompt": prompt, "n_gen": generated, "n_depth": depth, "avg_ns": ns}
    print(json.dumps([{**test, "samples_ns": [ns + index for index in range(repetitions)]}]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
