import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.checkpoint.unread import BUFFERS_OF, check_unread
from edgeprune.model.load import load_model
from tests.support.checkpoints import save_llama

Q = "model.layers.{}.self_attn.q_proj."
REFUSED = {
    "biases": (
        [Q.format(0) + "bias", Q.format(1) + "bias"],
        "biases",
        "(2, such as model.layers.0.self_attn.q_proj.bias)",
    ),
    "LoRA": (
        [Q.format(0) + "lora_A.default.weight", Q.format(0) + "base_layer.weight"],
        "LoRA",
        "lora_A.default.weight",
    ),
    "scales": ([Q.format(0) + "weight_scale_inv"], "is quantised", "weight_scale_inv"),
    "AWQ": ([Q.format(0) + "qzeros", Q.format(0) + "scales", Q.format(0) + "qweight"], "is quantised", "qweight"),
    "bitsandbytes": ([Q.format(0) + "weight.quant_state.bitsandbytes__nf4"], "is quantised", "nf4"),
    "layers": (
        [Q.format(2) + "weight", Q.format(3) + "weight"],
        "more than the 2 layers",
        "(2, such as model.layers.2.",
    ),
    "others": (["model.vision.weight"], "does not have: model.vision.weight", ""),
    "a mask of another family": (["model.layers.0.self_attn.bias"], "biases", ""),
}


@pytest.mark.parametrize(("names", "reason", "shown"), REFUSED.values(), ids=REFUSED)
def test_tensors_that_would_change_the_result_are_refused(tmp_path, names, reason, shown):
    save_llama(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(2) for name in names}, path, {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path / "model"))
    assert reason in caught.value.message
    assert shown in caught.value.message


def test_what_explains_a_missing_weight_is_said_instead_of_it():
    with pytest.raises(InputError, match="is quantised: it has a.qweight"):
        check_unread("llama", 2, {"a.qweight"}, ["a.weight"])
    with pytest.raises(InputError, match=r"no tensor a.weight; it has b\.\*\.weight \(2, such as b.0.weight\)"):
        check_unread("llama", 2, {"b.0.weight", "b.1.weight"}, ["a.weight"])


def test_many_kinds_of_tensors_make_a_short_message():
    with pytest.raises(InputError, match="996 more kinds") as caught:
        check_unread("llama", 2, {f"{number}{'x' * 1000}" for number in range(1000)}, [])
    assert len(caught.value.message) < 2000


def test_buffers_are_ignored_and_listed(tmp_path, caplog):
    save_llama(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    buffers = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    save_file(load_file(path) | {name: torch.ones(2) for name in buffers}, path, {"format": "pt"})
    with caplog.at_level(logging.INFO, "edgeprune"):
        load_model(str(tmp_path / "model"))
    (record,) = [record for record in caplog.records if "ignored" in record.message]
    assert "model.layers.*.self_attn.rotary_emb.inv_freq (2, such as" in record.message


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llamagen"}))
def test_what_transformers_ignores_by_family_is_ignored(family):
    """Its patterns match these names, and ours too; a bias that is a weight is none of them."""
    theirs = getattr(transformers, FAMILIES[family].architecture)._keys_to_ignore_on_load_unexpected or ()
    names = {"attn.bias": "h.0.attn.bias", "crossattention.bias": "h.0.crossattention.bias"}
    names |= {f"attention.{kind}": f"gpt_neox.layers.0.attention.{kind}" for kind in ("bias", "masked_bias")}
    unread = {names[pattern.replace("\\", "")] for pattern in theirs}
    check_unread(family, 2, unread, [])
    assert bool(unread) <= (family in BUFFERS_OF)
    with pytest.raises(InputError):
        check_unread(family, 2, {"h.0.attn.c_attn.bias"}, [])
