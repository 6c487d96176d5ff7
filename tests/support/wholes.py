"""Small random models of images and text, of transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.support.checkpoints import save_tokenizer
from tests.support.families import BASE

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
IMAGE_IDS = {
    "image_token_id": 5,
    "image_token_index": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}
WHOLES = {
    "gemma3": ("gemma3_text", VISION, {}, {"mm_tokens_per_image": 4}),
    "qwen2_5_vl": ("qwen2", QWEN_VISION, {"rope_parameters": MROPE}, {}),
    "qwen3_vl": ("qwen3", QWEN_VISION | {"deepstack_visual_indexes": [0]}, {"rope_parameters": MROPE}, {}),
    "mistral3": ("mistral", VISION | {"head_dim": 16}, {}, {}),
    "smolvlm": ("llama", VISION, {}, {}),
    "idefics3": ("llama", VISION, {}, {}),
    "llava": ("llama", VISION, {}, {}),
}
"""By model_type: the family of the text part, settings of the image part, of the text part and of the whole."""


def save_whole(folder: Path, kind: str) -> PreTrainedModel:
    """Norms and biases are random too, so that none may be forgotten."""
    _, vision, text, whole = WHOLES[kind]
    default = AutoConfig.for_model(kind)
    settings = BASE | {"num_attention_heads": 4} | text
    texts = {name: value for name, value in default.text_config.to_dict().items() if name != "layer_types"}
    config = AutoConfig.for_model(
        kind, text_config=texts | settings, vision_config=default.vision_config.to_dict() | vision, **IMAGE_IDS, **whole
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model
