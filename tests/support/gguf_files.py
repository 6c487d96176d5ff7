"""A tiny Llama as a GGUF file, as llama.cpp's converter writes it."""

import torch
from gguf import GGUFWriter
from gguf.quants import quantize

from edgeprune.model.gguf.names import LAYER, OUTER
from tests.support.checkpoints import LETTERS, SPECIAL
from tests.support.reference import decoder_of, weights_of

SETTINGS = {"vocab_size": 257, "hidden_size": 96, "head_dim": 16, "max_position_embeddings": 256}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The row order of q and k in GGUF files: llama.cpp's converter, `permute`."""
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, reference, quantised=None, architecture="llama", pre="gpt-2", model="gpt2", drop=(), more=None):
    """A reference model as llama.cpp's converter writes it; `more` gets the writer before it writes."""
    config, decoder = reference.config, decoder_of(reference.config)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(96)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(SPECIAL + LETTERS)
    writer.add_token_types([3] + [1] * 256)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    weights = weights_of(reference)
    heads = {"attention.q": config.num_attention_heads, "attention.k": config.num_key_value_heads}
    for name in decoder.shapes():
        weight = weights[name]
        if name.startswith("layers."):
            _, index, part = name.split(".", 2)
            target = f"blk.{index}.{LAYER[part]}.weight"
            if part in heads:
                weight = interleaved(weight, heads[part])
        else:
            target = OUTER[name]
        if target in drop:
            continue
        data = weight.float().numpy()
        if quantised is not None and data.ndim == 2:
            writer.add_tensor(target, quantize(data, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(target, data)
    if more is not None:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
