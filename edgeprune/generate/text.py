"""Text from a model's exported graph: samples for calibration, one for the report, and `edgeprune run`.

It knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.generate.runner import runner_of
from edgeprune.model.tokens.generation import end_ids
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.bundle import CODEC, open_to_run
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.sampling import generate
from edgeprune.progress import Progress

BATCH = 8  # the processor gains nothing from more
CHAT_SAMPLING = (0.7, 0.9)  # temperature and top_p
SAMPLE_TOP_P = 0.95  # of a small model the tail is noise
MARK = "What the user says"  # a placeholder for the user's words in the chat template


def generate_documents(
    graph: Path, directory: Path, count: int, length: int, seed: int, progress: Progress
) -> np.ndarray:
    """Returns token ids (count, length) int64 that the model draws: a user's turn, the answer, and so on.

    Without a chat template a sample begins after the begin (or end) token. An end token does not end a sample: the
    model goes on with whatever follows. length: at least 2; an opening that leaves no room for text is cut to its first
    token. Raises InputError for a tokenizer that has neither of these tokens.
    """
    # The tokens that every sample starts with.
    tokenizer = load_tokenizer(directory)
    opening = _opening(tokenizer)
    opening = opening if len(opening) < length else opening[:1]
    # Draw the samples in batches, step by step; every batch has a seed of its own.
    advance = progress.stage("generate samples", (length - len(opening)) * -(-count // BATCH))
    rows = []
    for first in range(0, count, BATCH):
        size = min(BATCH, count - first)
        runner = GraphRunner(graph, size, length)
        drawn = []
        new_tokens = length - len(opening)
        for tokens in generate(
            runner, [opening] * size, new_tokens, temperature=1.0, top_p=SAMPLE_TOP_P, seed=seed + first
        ):
            drawn.append(tokens)  # (size,)
            advance()
        rows.append(np.concatenate([np.tile(opening, (size, 1)), np.stack(drawn, axis=1)], axis=1))  # (size, length)
    return np.concatenate(rows)


def _opening(tokenizer: Any) -> list[int]:
    """Returns the tokens before a user's first words in the chat template; without one, the begin or end token."""
    if tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
        before, mark, _ = text.partition(MARK)
        if mark:
            return tokenizer(before, add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError(
            "the tokenizer has neither a begin nor an end token to start samples with", "Give --calibration PATH."
        )
    return [start]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Returns the token ids of a prompt as the model expects it: in its chat template where it has one."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def sample_text(graph: Path, directory: Path, prompt: str, context: int, max_new_tokens: int, seed: int) -> str:
    """Returns an answer to a prompt within the context, drawn as a chat would draw it.

    Greedily, a small model repeats itself.
    """
    tokenizer = load_tokenizer(directory)
    ids = prompt_ids(tokenizer, prompt)[-(context // 2) :]
    runner = GraphRunner(graph, 1, context)
    steps = generate(
        runner, [ids], min(max_new_tokens, context - len(ids)), *CHAT_SAMPLING, seed, end_ids(tokenizer, directory)
    )
    return tokenizer.decode([int(tokens[0]) for tokens in steps], skip_special_tokens=True).strip()


def stream_text(
    bundle: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    note: Callable[[str], None],
) -> Iterator[str]:
    """Yields pieces of text as they are generated from a bundle. note: called where the engine is not what generates.

    Raises InputError for the bundle of an image generator, a prompt beyond the context, or a bundle that cannot run.
    """
    # Open the bundle; where it was finished on its device, with the rung that was chosen there.
    chosen = open_to_run(bundle)
    if (bundle / CODEC).is_dir():
        raise InputError(
            f"{bundle} is the bundle of an image generator, which reads no text",
            "Leave --prompt out: edgeprune run BUNDLE --class N --count N --output grid.png",
        )
    chosen.check(chosen.tokenizer)
    tokenizer = load_tokenizer(chosen.tokenizer)
    # The prompt must leave room in the context.
    ids = prompt_ids(tokenizer, prompt)
    context = chosen.workload.context
    room = context - len(ids)
    if room < 1:
        raise InputError(f"the prompt of {len(ids)} tokens exceeds the bundle's context of {context}", "Shorten it.")
    # Generate token by token, and yield what each adds to the text.
    runner = runner_of(chosen, 1, 1, note)
    shown, new_ids = "", []
    for tokens in generate(
        runner, [ids], min(max_new_tokens, room), temperature, top_p, seed, end_ids(tokenizer, chosen.tokenizer), top_k
    ):
        new_ids.append(int(tokens[0]))
        text = tokenizer.decode(new_ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half a character: the rest is still to come
            yield text[len(shown) :]
            shown = text
