"""Text from a model's exported graph: samples for calibration, one for the report, and `edgeprune run`.

It knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.chats import check_ids, encode, render
from edgeprune.errors import InputError
from edgeprune.model.tokens.generation import end_ids
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.bundle import CODEC, open_to_run
from edgeprune.ondevice.bundle_runner import drafted_runner, runner_of
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.sampling import check_sampling, generate
from edgeprune.progress import Progress

BATCH = 32  # samples that are drawn at once, at most
CACHE_BYTES = 1 << 29  # of their caches, at most
CHAT_SAMPLING = (0.7, 0.9)  # temperature and top_p
SAMPLE_TOP_P = 0.95  # of a small model the tail is noise
MAX_NEW_TOKENS = 256  # of an answer, where nothing else is asked for
MARK = "What the user says"  # a placeholder for the user's words in the chat template


def generate_documents(
    graph: Path,
    directory: Path,
    count: int,
    length: int,
    seed: int,
    progress: Progress,
    given: np.ndarray | None = None,
) -> np.ndarray:
    """Returns token ids (count, length) int64 that the model draws: a user's turn, the answer, and so on.

    Without a chat template a sample begins after the begin (or end) token; where there is none of these, with the first
    token of each of the given samples (any, tokens) in turn. An end token does not end a sample: the model goes on with
    whatever follows. length: at least 2; an opening that leaves no room for text is cut to its first token. Raises
    InputError where nothing can begin a sample.
    """
    # The tokens that every sample starts with.
    tokenizer = load_tokenizer(directory)
    runner = GraphRunner(graph, 1, length)
    try:
        opening = opening_of(tokenizer, runner.vocab_size, progress.note)
        openings = [opening if len(opening) < length else opening[:1]]
    except InputError as error:
        if given is None:
            raise
        openings = [[token] for token in given[:, 0].tolist()]
        progress.note(f"samples of the model's own begin with a token of yours: {error.message}")
    return _drawn(runner, [openings[row % len(openings)] for row in range(count)], length, seed, progress)


def continued(graph: Path, pieces: np.ndarray, length: int, seed: int, progress: Progress) -> np.ndarray:
    """Returns token ids (count, length) int64: what the model draws behind pieces (count, tokens) int64, with these."""
    return _drawn(GraphRunner(graph, 1, length), pieces.tolist(), length, seed, progress)


def _drawn(
    runner: GraphRunner, beginnings: Sequence[Sequence[int]], length: int, seed: int, progress: Progress
) -> np.ndarray:
    """Returns samples (beginnings, length) int64 in batches; every batch has a seed of its own."""
    count, new_tokens = len(beginnings), length - len(beginnings[0])
    batches = -(-count // max(1, min(BATCH, CACHE_BYTES // max(1, runner.cache_bytes))))
    advance = progress.stage("generate samples", new_tokens * batches)
    rows = []
    for part in np.array_split(np.arange(count), batches):
        first, size = int(part[0]), len(part)
        prompts = beginnings[first : first + size]
        if size != runner.batch:
            runner.hold(size)
        drawn = []
        for tokens in generate(runner, prompts, new_tokens, temperature=1.0, top_p=SAMPLE_TOP_P, seed=seed + first):
            drawn.append(tokens)  # (size,)
            advance()
        rows.append(np.concatenate([np.array(prompts), np.stack(drawn, axis=1)], axis=1))  # (size, length)
    return np.concatenate(rows)


def opening_of(tokenizer: Any, vocab_size: int, note: Callable[[str], None] | None = None) -> list[int]:
    """Returns the tokens before a user's first words in the chat template; without one, the begin or end token.

    note: called where the template refuses a user's lone message, or has tokens without an embedding. Raises InputError
    where there is no token to begin with.
    """
    if tokenizer.chat_template is not None:
        try:
            before, mark, _ = render(tokenizer, [{"role": "user", "content": MARK}]).partition(MARK)
            ids = encode(tokenizer, before, special=False) if mark else []
            check_ids([ids], vocab_size, tokenizer, "the chat template")
            if ids:
                return ids
        except InputError as error:
            if note is not None:
                note(f"samples of the model's own begin without the chat template: {error.message}")
    if (start := _start_of(tokenizer, vocab_size)) is None:
        raise InputError(
            "the tokenizer has neither a begin nor an end token to start samples with", "Give --calibration PATH."
        )
    return [start]


def _start_of(tokenizer: Any, vocab_size: int) -> int | None:
    """Returns the begin or end token, the first of them that the model has an embedding for."""
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((token for token in tokens if token is not None and token < vocab_size), None)


def prompt_ids(tokenizer: Any, prompt: str, vocab_size: int, note: Callable[[str], None] | None = None) -> list[int]:
    """Returns the token ids of a prompt as the model expects it: in its chat template where it has one.

    note: called where the template refuses a user's lone message, writes nothing, or has tokens without an embedding;
    the prompt is then continued as plain text. Raises InputError for a prompt with such tokens.
    """
    if tokenizer.chat_template is not None:
        try:
            text = render(tokenizer, [{"role": "user", "content": prompt}], prompted=True)
            ids = encode(tokenizer, text, special=False)
            check_ids([ids], vocab_size, tokenizer, "the chat template")
            reason = "the model's chat template writes nothing"
            if ids:
                return ids
        except InputError as error:
            reason = error.message
        if note is not None:
            note(f"the prompt is continued as plain text: {reason}")
    ids = encode(tokenizer, prompt)
    check_ids([ids], vocab_size, tokenizer, "the prompt")
    return ids


def sample_text(graph: Path, directory: Path, prompt: str, context: int, max_new_tokens: int, seed: int) -> str:
    """Returns an answer to a prompt within the context, drawn as a chat would draw it.

    Greedily, a small model repeats itself.
    """
    tokenizer = load_tokenizer(directory)
    runner = GraphRunner(graph, 1, context)
    ids = prompt_ids(tokenizer, prompt, runner.vocab_size)[-(context // 2) :]
    steps = generate(
        runner, [ids], min(max_new_tokens, context - len(ids)), *CHAT_SAMPLING, seed, end_ids(tokenizer, directory)
    )
    return tokenizer.decode([int(tokens[0]) for tokens in steps], skip_special_tokens=True).strip()


def stream_text(
    bundle: Path,
    prompt: str,
    max_new_tokens: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    note: Callable[[str], None],
    draft: Path | None = None,
) -> Iterator[str]:
    """Yields pieces of text as they are generated from a bundle.

    max_new_tokens: None for MAX_NEW_TOKENS, or as many as the context has room for. note: called where the engine is
    not what generates, the chat template is not used, or the context ends the text before max_new_tokens. draft: as of
    runners_of. Raises InputError for the bundle of an image generator, a sampling that draws nothing, a prompt beyond
    the context or the vocabulary, or a bundle that cannot run.
    """
    check_sampling(temperature, top_k, top_p)
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
    runner = runner_of(chosen, 1, 1, note) if draft is None else drafted_runner(chosen, draft)
    ids = prompt_ids(tokenizer, prompt, runner.vocab_size, note)
    context = chosen.workload.context
    room = context - len(ids)
    if room < 1:
        raise InputError(f"the prompt of {len(ids)} tokens exceeds the bundle's context of {context}", "Shorten it.")
    if max_new_tokens is not None and max_new_tokens > room:
        note(f"no more than {room} new tokens: the bundle's context of {context} holds prompt and answer")
    # Generate token by token, and yield what each adds to the text.
    ends, count = end_ids(tokenizer, chosen.tokenizer), min(max_new_tokens or MAX_NEW_TOKENS, room)
    shown, new_ids = "", []
    for tokens in generate(runner, [ids], count, temperature, top_p, seed, ends, top_k):
        new_ids.append(int(tokens[0]))
        text = tokenizer.decode(new_ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half a character: the rest is still to come
            yield text[len(shown) :]
            shown = text
