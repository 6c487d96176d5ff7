"""Counted memory against what a process really held, and a run that this machine has no room for."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from transformers import LlamaForCausalLM

from edgeprune.errors import InputError
from edgeprune.pipeline import room
from edgeprune.pipeline.flow import working
from edgeprune.pipeline.room import PROCESS_BYTES, memory_bytes
from edgeprune.progress import Silent
from tests.support.runs import home, setup_of
from tests.support.tiny import as_model, llama

HELD = """
import json, sys
from edgeprune.ondevice.machine import peak_bytes, reset_peak_bytes
import torch
from edgeprune.pruning.methods import DEFAULT, METHODS
from edgeprune.pruning.prune import prune
from tests.pipeline.test_room import wide
from tests.support.tiny import as_model

model = as_model(wide())
ids = torch.randint(0, model.decoder.vocab_size, (16, 256))
target = model.decoder.with_widths(6, 2, 2944)
reset_peak_bytes()
before = peak_bytes()
for _ in prune(model, target, ids, METHODS[DEFAULT], 0):
    pass
print(json.dumps(peak_bytes() - before))
"""


def wide() -> LlamaForCausalLM:
    """Of which the moments of the MLP are most of what a pruning holds."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "max_position_embeddings": 256}
    return llama(**sizes, num_attention_heads=16, num_key_value_heads=8, head_dim=32, initializer_range=0.02)


@pytest.mark.slow
def test_a_pruning_holds_about_what_was_counted() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    held, counted = (
        json.loads(done.stdout.splitlines()[-1]),
        memory_bytes(as_model(wide()).decoder, 16 * 256, 256)["pruning"],
    )
    assert 0.7 < held / (counted - PROCESS_BYTES) < 1.3, (held, counted)


def test_generation_counts_every_weight_and_pruning_one_layer() -> None:
    decoder = as_model(wide()).decoder
    deep = replace(decoder, layers=decoder.layers * 10)
    once, tenfold = (memory_bytes(one, 1024, 256) for one in (decoder, deep))
    assert once["pruning"] == tenfold["pruning"]
    assert tenfold["generation"] - once["generation"] >= 4 * 9 * decoder.layer_parameters


def test_what_this_machine_cannot_hold_is_refused_before_it_starts(tmp_path, tmp_path_factory, monkeypatch) -> None:
    setup = setup_of(home(tmp_path_factory), tmp_path / "out")
    monkeypatch.setattr(room, "memory_state", lambda: {"total": 2**20, "swap_free": 2**20})
    with pytest.raises(InputError, match="this machine has 2.0 MiB") as caught, working(setup, "fit", Silent()):
        pass
    assert "plan MODEL --device NAME --work" in caught.value.remedy
    assert not list(tmp_path.iterdir())
