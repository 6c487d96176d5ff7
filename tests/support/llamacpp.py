"""The real llama.cpp, through the package xllamacpp, and checkpoints with a tokenizer that it takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from edgeprune.ondevice.reference import StepRunner
from tests.support.checkpoints import LETTERS, SPECIAL

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
VOCABULARY = [*SPECIAL, *LETTERS, *("".join(pair) for pair in MERGES)]  # 260 tokens
NEAR_TIE = 0.2  # of two logits; those of two engines differ by 0.16 at most


def save_merging_tokenizer(folder: Path) -> None:
    """Byte-level with a few merges: llama.cpp takes none without."""
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(VOCABULARY)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>").save_pretrained(
        folder
    )


class LlamaCpp:
    """A GGUF file in a server of this process; greedy. draft: the file of one, which guesses four tokens at a time."""

    def __init__(self, path: Path, context: int = 64, draft: Path | None = None) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = context, 1, 0, 0
        params.warmup = params.fit_params = False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        if draft is not None:
            params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
            params.speculative.draft.mparams.path = str(draft)
            params.speculative.draft.n_max, params.speculative.draft.n_gpu_layers = 4, 0
            params.speculative.draft.cpuparams.n_threads = params.speculative.draft.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def generate(self, prompt: list[int] | str, count: int, top: int = 1, **more: object) -> list[dict]:
        """For every new token its `id`, and the `top_logprobs` of the best ones; those that end within a character
        come with the next one."""
        return self.reply(prompt, count, top, **more)["choices"][0]["logprobs"]["content"]

    def reply(self, prompt: list[int] | str, count: int, top: int = 1, **more: object) -> dict:
        """The server's whole answer."""
        request = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0,
            "n_probs": top,
            "ignore_eos": True,
            "cache_prompt": False,
            **more,
        }
        reply = self.server.handle_completions(request)
        return json.loads(reply) if isinstance(reply, str | bytes) else reply

    def log_probabilities(self, prompt: list[int] | str, size: int = len(VOCABULARY)) -> np.ndarray:
        """Of the token after the prompt, (size,) fp64, nan where none came; the token that is then taken is a
        whole character whatever the model wants, and the figures are those before that choice."""
        taken = [["a", 1000.0]]
        result = np.full(size, np.nan)
        for entry in self.generate(prompt, 1, size, logit_bias=taken)[0]["top_logprobs"]:
            result[entry["id"]] = entry["logprob"]
        return result


def assert_same_choices(runner: StepRunner, llama: LlamaCpp, prompt: list[int], ids: list[int]) -> None:
    """Asserts that llama.cpp takes each of a runner's greedy tokens `ids`, but for near ties, since each rounds what
    a quantised matrix multiplies, and keeps its cache, in a way of its own; at least a quarter are none."""
    decided = 0
    for index, taken in enumerate(ids):
        runner.reset()
        logits = runner.run(np.array([prompt + ids[:index]]))[0]
        if np.ptp(np.sort(logits)[-2:]) >= NEAR_TIE:
            assert int(np.argmax(llama.log_probabilities(prompt + ids[:index]))) == taken
            decided += 1
    assert decided >= len(ids) // 4
