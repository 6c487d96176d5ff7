"""The walk as a runner: transformers' logits, step by step."""

import numpy as np

from edgeprune.evaluate.walked import WalkRunner
from tests.support.graph_models import Sample, llama, reference_logits
from tests.support.tiny import as_model


def test_steps_give_transformers_logits():
    model = llama(True)
    ids = np.random.default_rng(0).integers(0, 200, (1, 12))
    expected = reference_logits(model, Sample(ids, np.ones_like(ids), np.arange(12)[None]))[0]
    runner = WalkRunner(as_model(model), 12)
    for _ in range(2):  # it begins anew
        for start, end in ((0, 9), (9, 10), (10, 12)):
            logits = runner.run(ids[:, start:end])
            assert logits.shape == (1, runner.vocab_size)
            assert np.abs(logits[0] - expected[end - 1]).max() < 1e-4 * np.abs(expected).max()
        runner.reset()
