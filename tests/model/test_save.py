import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, MistralForCausalLM

from edgeprune.errors import NumericalError
from edgeprune.model.checkpoint.adapt import changed
from edgeprune.model.checkpoint.safetensors_file import Packing
from edgeprune.model.decoder import Rotary
from edgeprune.model.forward import token_logits, token_losses, weight_stream
from edgeprune.model.gguf.tokenizer_read import write_tokenizer
from edgeprune.model.load import load_model
from edgeprune.model.save import save_checkpoint
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.model.tokens.vocabulary import Vocabulary, needed, padded, read_vocabulary
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.prune import prune
from tests.support.checkpoints import save_llama
from tests.support.families import TEXTS, save_family
from tests.support.quantised import (
    ASYMMETRIC,
    INT4,
    INT8,
    WITHOUT,
    assert_stored,
    in_transformers,
    logits_of,
    packable,
    random_weights,
    save_both,
)
from tests.support.reference import weights_of
from tests.support.rounded_models import rounded as rounded_model
from tests.support.roundings import rounded
from tests.support.sentencepiece import sentencepiece
from tests.support.vocabularies import CORPUS, ids_of, ignore_merges


def ids() -> torch.Tensor:
    return torch.randint(0, 257, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("key_value_heads", "widths"), [(2, (2, 2, 40)), (2, (1, 3, 64)), (1, (1, 5, 32))])
def test_a_pruned_checkpoint_loads_with_equal_weights_and_logits(tmp_path, tied, key_value_heads, widths):
    """1 group of 5 heads does not divide the hidden size: the trap of the Llama configuration."""
    save_llama(tmp_path / "dense", tie_word_embeddings=tied, num_key_value_heads=key_value_heads)
    dense = load_model(str(tmp_path / "dense"))
    target = dense.decoder.with_widths(*widths)
    weights = dict(prune(dense, target, ids(), METHODS["default"], 0))
    save_checkpoint(target, weights.items(), dense, tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", local_files_only=True)
    assert all(torch.equal(weights_of(loaded)[name], weight) for name, weight in weights.items())
    own = load_model(str(tmp_path / "small"))
    assert own.decoder.layers == target.layers
    assert all(torch.equal(own.weights[name], weight) for name, weight in weights.items())
    losses = torch.nn.functional.cross_entropy(
        loaded(ids()).logits[:, :-1].transpose(1, 2), ids()[:, 1:], reduction="none"
    )
    ours = token_losses(own.decoder, weight_stream(own), ids())
    assert (ours - losses).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small", local_files_only=True)
    assert tokenizer.decode(tokenizer("like the dense one")["input_ids"]) == "like the dense one"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_source_is_kept(tmp_path, dtype):
    save_llama(tmp_path / "dense", dtype)
    dense = load_model(str(tmp_path / "dense"))
    tensors = [(name, dense.weights[name].float()) for name in dense.decoder.shapes()]
    save_checkpoint(dense.decoder, tensors, dense, tmp_path / "same")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "same", local_files_only=True)
    assert loaded.dtype == dtype
    assert all(torch.equal(weights_of(loaded)[name], dense.weights[name]) for name in dense.weights)


def test_scaled_rope_and_fewer_layers_give_the_same_logits(tmp_path):
    """The swap to mistral keeps the rope scaling; half the layers may go."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    save_llama(tmp_path / "dense", num_key_value_heads=1, rope_parameters=rope)
    dense = load_model(str(tmp_path / "dense"))
    target = dense.decoder.with_widths(1, 5, 32)
    target = replace(target, layers=target.layers[:1])
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) * 0.2 for name, shape in target.shapes().items()}
    save_checkpoint(target, weights.items(), dense, tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", local_files_only=True)
    assert type(loaded) is MistralForCausalLM
    losses = torch.nn.functional.cross_entropy(
        loaded(ids()).logits[:, :-1].transpose(1, 2), ids()[:, 1:], reduction="none"
    )
    own = load_model(str(tmp_path / "small"))
    ours = token_losses(own.decoder, weight_stream(own), ids())
    assert (ours - losses).abs().max() < 1e-4
    plain = Rotary(tuple(10000.0 ** (-2 * m / 16) for m in range(8)))
    unscaled = changed(own.decoder, {"rotary": plain})
    assert (token_losses(unscaled, weight_stream(own), ids()) - losses).abs().max() > 1e-2


@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer", None])
def test_the_tokenizer_of_a_llama_that_became_a_mistral_is_the_same(tmp_path, declared):
    """transformers chooses tokenizer classes by model_type too."""
    save_llama(tmp_path / "dense", num_key_value_heads=1)
    (tmp_path / "dense" / "tokenizer.json").unlink()
    write_tokenizer(sentencepiece(), 256, tmp_path / "dense")
    path = tmp_path / "dense" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": declared}))
    dense = load_model(str(tmp_path / "dense"))
    target = dense.decoder.with_widths(1, 5, 32)
    save_checkpoint(target, ((n, torch.zeros(s)) for n, s in target.shapes().items()), dense, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["model_type"] == "mistral"
    texts = ["abc ab", " a  b.", "é日\nab", "<s>ab</s> c"]
    expected, found = (load_tokenizer(tmp_path / name)(texts)["input_ids"] for name in ("dense", "small"))
    assert found == expected


def save_with_padded_rows(folder, **changes):
    """A checkpoint whose embedding has more rows than its tokenizer has tokens."""
    (folder / "tokenizer").mkdir(parents=True)
    ignore_merges(folder / "tokenizer")
    tokens = len(load_tokenizer(folder / "tokenizer"))
    save_llama(folder, vocab_size=tokens + 30, eos_token_id=tokens - 2, bos_token_id=tokens - 1, **changes)
    (folder / "tokenizer.json").unlink()
    for path in (folder / "tokenizer").iterdir():
        path.rename(folder / path.name)


def test_codes_are_packed_and_their_tables_reduced_with_the_vocabulary(tmp_path):
    """A packing that stores values: what is loaded then are the values of the codes, of the rows that were kept."""
    save_llama(tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"))
    model = rounded_model(dense, dense.decoder.with_format(None, WEIGHT_FORMATS["int8"]), tmp_path / "rounded")
    vocabulary = padded(dense.directory, needed(dense.directory, ids_of(load_tokenizer(dense.directory), CORPUS)))
    packing = Packing({"quant_method": "values"}, lambda weight: {"weight": weight.dequantised()})
    stream = ((name, model.stored[name]) for name in model.decoder.shapes())
    save_checkpoint(
        model.decoder.with_vocabulary(vocabulary.size),
        stream,
        model,
        tmp_path / "small",
        vocabulary,
        torch.float32,
        packing,
    )
    assert json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"] == packing.config
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    assert torch.equal(
        tensors["model.embed_tokens.weight"], model.quantised["embedding"].dequantised()[vocabulary.kept]
    )


def save_reduced(dense, folder, vocabulary, target=None, stream=None):
    target = (target or dense.decoder).with_vocabulary(vocabulary.size)
    stream = stream or [(name, dense.weights[name]) for name in target.shapes()]
    save_checkpoint(target, stream, dense, folder, vocabulary)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reduced_vocabulary_gives_the_logits_of_the_kept_tokens(tmp_path, tied):
    save_with_padded_rows(tmp_path / "dense", tie_word_embeddings=tied)
    dense = load_model(str(tmp_path / "dense"))
    full = load_tokenizer(tmp_path / "dense")
    vocabulary = padded(tmp_path / "dense", needed(tmp_path / "dense", ids_of(full, CORPUS)))
    assert vocabulary.size % 64 == 0
    assert vocabulary.size < len(full) < dense.decoder.vocab_size
    save_reduced(dense, tmp_path / "small", vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small", local_files_only=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", local_files_only=True)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", local_files_only=True)
    for line in CORPUS[:3]:
        old, new = (t(line, return_tensors="pt")["input_ids"] for t in (full, tokenizer))
        assert (vocabulary.restore(new.numpy()) == old.numpy()).all()
        with torch.no_grad():
            expected, found = reference(old).logits[..., vocabulary.kept], loaded(new).logits
        assert (found - expected).abs().max() < 1e-5
    own = load_model(str(tmp_path / "small"))
    assert own.decoder == dense.decoder.with_vocabulary(vocabulary.size)
    assert own.weights.keys() == dense.weights.keys()
    for name, weight in dense.weights.items():
        assert torch.equal(own.weights[name], weight[vocabulary.kept] if name in ("embedding", "head") else weight)
    assert (read_vocabulary(tmp_path / "small").kept == vocabulary.kept).all()
    assert loaded.config.bos_token_id == tokenizer.bos_token_id == tokenizer(CORPUS[0])["input_ids"][0]
    assert loaded.config.eos_token_id == tokenizer.eos_token_id


def test_generation_ends_at_the_configured_tokens_of_a_reduced_checkpoint(tmp_path):
    save_with_padded_rows(tmp_path / "dense", tie_word_embeddings=False)
    dense = load_model(str(tmp_path / "dense"))
    full = load_tokenizer(tmp_path / "dense")
    vocabulary = needed(tmp_path / "dense", ids_of(full, CORPUS))

    def drawn(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        ids = load_tokenizer(folder)(CORPUS[0], return_tensors="pt")["input_ids"]
        found = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)
        return found[0, ids.shape[1] :].tolist()

    save_reduced(dense, tmp_path / "free", vocabulary)
    free = drawn(tmp_path / "free")
    end = free[4]
    eos = [full.eos_token_id, int(vocabulary.kept[end])]
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    save_reduced(dense, tmp_path / "small", vocabulary)
    assert drawn(tmp_path / "small") == free[: free.index(end) + 1] != free


@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "LlamaTokenizer", None])
@pytest.mark.parametrize("widths", [(1, 5, 32), (1, 6, 64)])
def test_the_reduced_tokenizer_is_that_which_transformers_loads(tmp_path, declared, widths):
    """A llama's, whether it becomes a mistral or not: LlamaTokenizer overrides parts of the file."""
    save_llama(tmp_path / "dense", num_key_value_heads=1, vocab_size=285)
    (tmp_path / "dense" / "tokenizer.json").unlink()
    write_tokenizer(sentencepiece(), 256, tmp_path / "dense")
    path = tmp_path / "dense" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": declared}))
    dense = load_model(str(tmp_path / "dense"))
    full = load_tokenizer(tmp_path / "dense")
    texts = ["abc ab", " a  b.", "é日\nab", "<s>ab</s> c"]
    vocabulary = needed(tmp_path / "dense", ids_of(full, texts))
    assert vocabulary.size < len(full)
    target = dense.decoder.with_widths(*widths)
    stream = [(name, torch.zeros(shape)) for name, shape in target.shapes().items()]
    save_reduced(dense, tmp_path / "small", vocabulary, target, stream)
    family = json.loads((tmp_path / "small" / "config.json").read_text())["model_type"]
    assert family == ("mistral" if widths == (1, 5, 32) else "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small", local_files_only=True)
    assert tokenizer.padding_side == full.padding_side
    for text in texts:
        assert vocabulary.restore(np.array(tokenizer(text)["input_ids"])).tolist() == full(text)["input_ids"]
    assert tokenizer.decode(tokenizer("caab日")["input_ids"]) == full.decode(full("caab日")["input_ids"])


def test_a_reduced_stream_is_checked_as_any_other(tmp_path):
    save_llama(tmp_path / "dense", torch.float16)
    dense = load_model(str(tmp_path / "dense"))
    vocabulary = Vocabulary(np.arange(257, dtype=np.int64))
    wrong = Vocabulary(np.arange(1, 258, dtype=np.int64))
    for decoder, kept in [(dense.decoder.with_vocabulary(256), vocabulary), (dense.decoder, wrong)]:
        with pytest.raises(ValueError, match="not that of the decoder, or not of the source"):
            save_checkpoint(decoder, [], dense, tmp_path / "small", kept)
    assert not (tmp_path / "small").exists()
    stream = {name: dense.weights[name].float() for name in dense.decoder.shapes()}
    with pytest.raises(ValueError, match="expected model.embed_tokens"):
        save_reduced(dense, tmp_path / "short", vocabulary, stream=[("embedding", stream["embedding"][1:])])
    stream["embedding"][3, 0] = 7e4
    with pytest.raises(NumericalError, match="embed_tokens.weight reaches"):
        save_reduced(dense, tmp_path / "large", vocabulary, stream=stream.items())


def test_an_imagegpt_keeps_its_colours_and_needs_no_tokenizer(tmp_path):
    save_family(tmp_path / "dense", "imagegpt")
    colours = json.dumps({"clusters": [[0.0, 0.5, -0.5]], "size": {"height": 8, "width": 8}})
    (tmp_path / "dense" / "preprocessor_config.json").write_text(colours)
    dense = load_model(str(tmp_path / "dense"))
    save_checkpoint(dense.decoder, weight_stream(dense), dense, tmp_path / "small")
    assert (tmp_path / "small" / "preprocessor_config.json").read_text() == colours
    assert not list((tmp_path / "small").glob("*token*"))
    assert load_model(str(tmp_path / "small")).decoder == dense.decoder


def in_few_bits(tmp_path, case, **options):
    """A family's model in mixed formats, as transformers loads it; the logits of its values as floats; our own."""
    save_family(tmp_path / "dense", case)
    dense = load_model(str(tmp_path / "dense"))
    decoder = packable(dense.decoder, **options)
    weights = rounded(decoder, {name: dense.weights[name] for name in decoder.shapes()})
    codes, floats = save_both(decoder, weights, dense, tmp_path)
    return in_transformers(codes), logits_of(in_transformers(floats), ids()), load_model(str(codes))


PACKED_TEXTS = [case for case in TEXTS if case != "gpt2"]


@pytest.mark.slow
@pytest.mark.parametrize("case", PACKED_TEXTS)
def test_transformers_computes_the_same_from_codes_as_from_their_values(tmp_path, case):
    """Bit by bit: code times scale has 15 bits at most, so fp32 has no error, whoever multiplies.

    Granite's floats are divided by a factor, which codes are not: its sums differ by 2 ** -24 of a weight.
    """
    loaded, expected, own = in_few_bits(tmp_path, case)
    found = logits_of(loaded, ids())
    if not case.startswith("granite"):
        assert torch.equal(found, expected)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    # Our own walk sums in another order.
    ours = token_logits(own.decoder, ((name, own.stored[name]) for name in own.decoder.shapes()), ids())
    assert (ours - found[:, :-1]).abs().max() < 1e-4 * found.abs().max()


def test_asymmetric_codes_are_those_that_transformers_decompresses(tmp_path):
    """With `dequantize`, which takes one format for all layers: without it, compressed-tensors 0.18 to 0.20 expects the
    zeros in another shape than its own writer and vLLM give them.
    """
    pytest.importorskip("compressed_tensors", reason=WITHOUT)
    save_llama(tmp_path / "dense", tie_word_embeddings=False)
    dense = load_model(str(tmp_path / "dense"))
    decoder = dense.decoder.with_format(ASYMMETRIC)
    weights = rounded(decoder, dense.weights)
    codes, floats = save_both(decoder, weights, dense, tmp_path)
    loaded = in_transformers(codes, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits_of(loaded, ids()), logits_of(in_transformers(floats), ids()))


@pytest.mark.parametrize("widths", [(1, 2, 64), (1, 5, 32), (2, 2, 64)])
def test_a_pruned_model_of_few_bits_loads_in_transformers(tmp_path, widths):
    """As a mistral where the heads do not divide the hidden size, and of a narrow floating type."""
    save_llama(tmp_path / "dense", torch.float16, tie_word_embeddings=False)
    dense = load_model(str(tmp_path / "dense"))
    decoder = dense.decoder.with_widths(*widths).with_format(INT8, INT8)
    weights = rounded(decoder, {name: weight.half() for name, weight in random_weights(decoder).items()})
    save_checkpoint(decoder, weights.items(), dense, tmp_path / "small")
    codes, floats = save_both(decoder, weights, dense, tmp_path)
    expected = logits_of(in_transformers(floats), ids())
    assert torch.equal(logits_of(in_transformers(codes), ids()), expected)
    assert torch.equal(logits_of(in_transformers(tmp_path / "small"), ids()), expected)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("case", ["opt", "gpt_neox"])
def test_heads_of_zeros_in_few_bits_change_nothing(tmp_path, case):
    save_family(tmp_path / "dense", case)
    dense = load_model(str(tmp_path / "dense"))
    groups, heads, channels = dense.decoder.layer_widths[0]
    decoder = dense.decoder.with_widths(groups // 2, heads, channels).with_format(INT4)
    weights = rounded(decoder, random_weights(decoder))
    save_checkpoint(decoder, weights.items(), dense, tmp_path / "small")
    found = logits_of(in_transformers(tmp_path / "small"), ids())
    assert load_model(str(tmp_path / "small")).decoder == decoder
    ours = token_logits(decoder, weights.items(), ids())
    assert (ours - found[:, :-1]).abs().max() < 1e-4 * found.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_a_reduced_vocabulary_keeps_the_codes_of_its_tokens(tmp_path, tied):
    save_with_padded_rows(tmp_path / "dense", tie_word_embeddings=tied)
    dense = load_model(str(tmp_path / "dense"))
    full = load_tokenizer(tmp_path / "dense")
    vocabulary = needed(tmp_path / "dense", ids_of(full, CORPUS))
    decoder = dense.decoder.with_format(INT8, INT4)
    weights = rounded(decoder, {name: dense.weights[name] for name in decoder.shapes()})
    save_reduced(dense, tmp_path / "small", vocabulary, decoder, weights.items())
    kept = torch.from_numpy(vocabulary.kept)
    reduced = {name: weight.rows(kept) if name in ("embedding", "head") else weight for name, weight in weights.items()}
    small = decoder.with_vocabulary(vocabulary.size)
    assert_stored(load_model(str(tmp_path / "small")), small, reduced)
    new = AutoTokenizer.from_pretrained(tmp_path / "small", local_files_only=True)(CORPUS[0], return_tensors="pt")
    found = logits_of(in_transformers(tmp_path / "small"), new["input_ids"])
    ours = token_logits(small, reduced.items(), new["input_ids"])
    assert (ours - found[:, :-1]).abs().max() < 1e-4 * found.abs().max()
