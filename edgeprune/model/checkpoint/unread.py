"""Stored tensors that no weight of a model explains: which of them change nothing, and which are refused.

It knows names alone, not how a tensor is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable

from edgeprune.errors import InputError
from edgeprune.files import printable

# Buffers that their owners compute anew. Those by family are `_keys_to_ignore_on_load_unexpected` of transformers.
BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids", r"(^|\.)freqs_cis", r"(^|\.)decoder\.version")
BUFFERS_OF = {
    "gpt2": (r"(^|\.)attn\.(masked_)?bias", r"crossattention\.(masked_)?bias"),
    "imagegpt": (r"(^|\.)attn\.(masked_)?bias", r"crossattention\.(masked_)?bias"),
    "gpt_neox": (r"(^|\.)attention\.(masked_)?bias",),
}
LORA = re.compile(r"\.lora_|\.base_layer\.|\.modules_to_save\.|^base_model\.model\.")
QUANTISED = re.compile(
    r"[._](qweight|qzeros|scales|zeros|g_idx|scale_inv|weight_scale|input_scale|weight_zero_point|weight_packed|weight_"
    r"shape|absmax|quant_map|nested_absmax|nested_quant_map|SCB|quant_state\.\w+)$"
)
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,9})\.")
SHOWN = 4  # groups in a message
DO_NOT_MATCH = "config.json and the weights do not match."
ANEW = (
    'If the model is right without these tensors, as transformers loads it, write it anew: python -c "from '
    "transformers import AutoModelForCausalLM as Model; Model.from_pretrained('FOLDER').save_pretrained('NEW')\"."
)


def check_unread(family: str, layers: int, unread: Collection[str], missing: Collection[str]) -> None:
    """Logs the stored tensors that are ignored because they change nothing. Raises InputError for all others.

    unread: the names of those that no weight explains; missing: of those that are asked for and not stored. layers: the
    number that config.json gives.
    """
    harmless = re.compile(f"(?:{'|'.join((*BUFFERS, *BUFFERS_OF.get(family, ())))})$")
    ignored = {name for name in unread if harmless.search(name)}
    others = sorted(set(unread) - ignored)
    if ignored:
        logging.getLogger(__name__).info("ignored, since they are computed anew: %s", _grouped(ignored))
    # What explains a missing tensor too comes before it.
    if found := [name for name in others if LORA.search(name)]:
        raise InputError(
            f"the checkpoint has LoRA weights that were not merged: {_grouped(found)}",
            "Merge them: peft's merge_and_unload(), then save_pretrained.",
        )
    if found := [name for name in others if QUANTISED.search(name)]:
        raise InputError(
            f"the checkpoint is quantised: it has {_grouped(found)}",
            "Restore config.json with its quantization_config, or give the checkpoint that it was made from, in fp32, "
            "fp16 or bf16.",
        )
    if missing:
        rest = f"; it has {_grouped(others)}" if others else ""
        raise InputError(f"the checkpoint has no tensor {_grouped(missing)}{rest}", DO_NOT_MATCH)
    if beyond := [name for name in others if (match := LAYER.search(name)) and int(match[1]) >= layers]:
        raise InputError(
            f"the checkpoint has more than the {layers} layers of config.json: {_grouped(beyond)}",
            f"Restore the checkpoint's own config.json. {ANEW}",
        )
    if biases := [name for name in others if name.endswith(".bias")]:
        raise InputError(
            f"the checkpoint has biases that config.json does not describe: {_grouped(biases)}",
            f'Set "attention_bias" or "mlp_bias" in config.json where the family has it. {ANEW}',
        )
    if others:
        raise InputError(
            f"the checkpoint has tensors that a model of the family {family} does not have: {_grouped(others)}",
            f"Restore the checkpoint's own config.json. {ANEW}",
        )


def _grouped(names: Iterable[str]) -> str:
    """Returns names for a message: those that differ in numbers alone are one group, with their number."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    words = [
        members[0] if len(members) == 1 else f"{pattern} ({len(members)}, such as {members[0]})"
        for pattern, members in groups.items()
    ]
    more = [] if len(words) <= SHOWN else [f"{len(words) - SHOWN} more kinds"]
    return ", ".join([*(printable(word) for word in words[:SHOWN]), *more])
