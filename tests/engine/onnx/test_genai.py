"""onnxruntime-genai loads a written folder and continues as transformers and `edgeprune run` do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.engine.onnx.genai import CONFIG, write_genai
from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, GraphVariant, write_graphs
from edgeprune.errors import InputError
from edgeprune.generate.text import prompt_ids, stream_text
from edgeprune.model.decoder import Decoder
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.tokens.generation import end_ids
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.onnxruntime import BY_CHANNEL_BLOCKS, GRAPH_FILE, GraphRunner
from edgeprune.ondevice.sampling import generate
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.prune import prune
from tests.support import DATA
from tests.support.bundles import fitted
from tests.support.families import CONTINUED, random_model, save_family
from tests.support.graph_pictures import imagegpt
from tests.support.roundings import rounded

og = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")

OURS, OPSET = GraphVariant("onnxruntime", "all"), GraphVariant("opset23", "all")
IDS = [5, 17, 42, 9, 133, 60, 2, 88, 201]
CORPUS = DATA / "corpus.txt"
NEAR = 0.05  # of the two best logits: nearer than this, either may come first
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Count from one to ten.",
    "Why is the sky blue?",
    "Give me a recipe with eggs.",
)


def written(model: Model, decoder: Decoder, folder: Path, *variants: GraphVariant, context: int | None = None) -> Path:
    write_graphs(decoder, model.weights, folder, "fp32", variants, context)
    write_genai(decoder, variants, folder, model.directory, context)
    return folder


def continued(folder: Path, prompts: list[list[int]], count: int, length: int = 64) -> list[list[int]]:
    """New tokens (prompts, up to count) of onnxruntime-genai; it pads the shorter prompts on the right."""
    model = og.Model(str(folder))
    pad = json.loads((folder / CONFIG).read_text())["model"]["pad_token_id"]
    longest = max(map(len, prompts))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, batch_size=len(prompts))
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([p + [pad] * (longest - len(p)) for p in prompts], np.int32))
    steps: list[list[int]] = []
    while len(steps) < count and not generator.is_done():
        generator.generate_next_token()
        steps.append(np.array(generator.get_next_tokens()).tolist())
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("form", ["int8", "int4-32"])
def test_weights_of_few_bits_are_continued_as_we_do(form: str, tmp_path: Path) -> None:
    """Products of int8 codes run in blocks as wide as their inputs allow there too."""
    save_family(tmp_path / "model", "llama")
    model = load_model(str(tmp_path / "model"))
    decoder = model.decoder.with_format(WEIGHT_FORMATS[form], WEIGHT_FORMATS["int4-32"])
    variants = (OURS, ONNXRUNTIME_GRAPH)
    write_graphs(decoder, rounded(decoder, model.weights), tmp_path / "graphs", "fp32", variants)
    write_genai(decoder, variants, tmp_path / "graphs", model.directory)
    options = json.loads((tmp_path / "graphs" / CONFIG).read_text())["model"]["decoder"]["session_options"]
    name, value = BY_CHANNEL_BLOCKS
    assert options.get(name) == (value if form == "int8" else None)
    loaded = og.Model(str(tmp_path / "graphs"))
    parameters = og.GeneratorParams(loaded)
    parameters.set_search_options(max_length=64, batch_size=1)
    generator = og.Generator(loaded, parameters)
    generator.append_tokens(np.array([IDS], np.int32))
    wanted = GraphRunner(tmp_path / "graphs" / GRAPH_FILE, 1, 64).run(np.array([IDS]))
    np.testing.assert_allclose(np.array(generator.get_logits()).reshape(-1), wanted[0], rtol=1e-5, atol=1e-5)


def ours(graph: Path, prompt: list[int], count: int, length: int = 64, ends: set[int] = frozenset()) -> list[int]:
    return [int(tokens[0]) for tokens in generate(GraphRunner(graph, 1, length), [prompt], count, end_ids=ends)]


@torch.inference_mode()
def transformers_own(reference: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, reference(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("variant", [OURS, OPSET], ids=["shared buffer", "concatenated"])
@pytest.mark.parametrize("case", CONTINUED)
def test_families_continue_as_in_transformers(tmp_path: Path, case: str, variant: GraphVariant) -> None:
    reference = save_family(tmp_path / "model", case)
    model = load_model(str(tmp_path / "model"))
    folder = written(model, model.decoder, tmp_path / "onnx", variant)
    found = continued(folder, [IDS], 32)[0]
    assert found == transformers_own(reference, IDS, len(found))
    assert len(found) == 32 or found[-1] == 0  # the end
    config = json.loads((folder / CONFIG).read_text())
    assert config["search"]["past_present_share_buffer"] == (variant == OURS)
    assert config["model"]["eos_token_id"] == [0]
    assert config["model"]["context_length"] == model.decoder.max_position_embeddings


@pytest.mark.parametrize("variant", [OURS, OPSET], ids=["shared buffer", "concatenated"])
def test_heads_that_onnx_runtime_fills_up(tmp_path: Path, variant: GraphVariant) -> None:
    save_family(tmp_path / "model", "qwen3")
    reference = random_model("qwen3", head_dim=20)
    reference.save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    folder = written(model, model.decoder, tmp_path / "onnx", variant)
    found = continued(folder, [IDS], 32)[0]
    assert found == transformers_own(reference, IDS, len(found))
    size = json.loads((folder / CONFIG).read_text())["model"]["decoder"]["head_size"]
    assert size == (24 if variant == OURS else 20)


PLAIN = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
NAMED = [{"name": name, "template": PLAIN} for name in ("default", "tool_use")]
TOKENIZERS = {
    "named templates": ({"chat_template": NAMED}, PLAIN),
    "no default": ({"chat_template": NAMED[1:]}, None),
    "a template in a file of its own": ({}, PLAIN),
    "nulls": ({"chat_template": None, "model_max_length": None, "clean_up_tokenization_spaces": None}, None),
    "no limit": ({"model_max_length": 10**30}, None),
}


@pytest.mark.parametrize(("changes", "template"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_tokenizers_configuration_is_one_that_it_reads(tmp_path: Path, changes: dict, template: str | None) -> None:
    save_family(tmp_path / "model", "llama")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if not changes:
        (tmp_path / "model" / "chat_template.jinja").write_text(PLAIN)
    model = load_model(str(tmp_path / "model"))
    folder = written(model, model.decoder, tmp_path / "onnx", OURS)
    tokenizer, theirs = og.Tokenizer(og.Model(str(folder))), load_tokenizer(folder)
    assert tokenizer.encode("river stone").tolist() == theirs("river stone")["input_ids"]
    assert json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template") == template
    if template:
        assert (
            tokenizer.apply_chat_template('[{"role": "user", "content": "hi"}]', add_generation_prompt=True) == "<hi>"
        )


def test_image_generators_are_left_to_others(tmp_path: Path) -> None:
    write_genai(imagegpt(), [OURS], tmp_path, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("variant", [OURS, OPSET], ids=["shared buffer", "concatenated"])
@pytest.mark.parametrize(
    "widths", [[(0, 1, 96), (2, 3, 96), (1, 2, 0)], [(2, 1, 32), (0, 1, 64), (1, 3, 96)]], ids=["first", "middle"]
)
def test_layers_may_lack_attention_and_differ_in_their_heads(
    tmp_path: Path, widths: list, variant: GraphVariant
) -> None:
    save_family(tmp_path / "model", "qwen3")
    model = load_model(str(tmp_path / "model"))
    target = model.decoder.with_layer_widths(widths)
    weights = dict(prune(model, target, torch.tensor([IDS]), METHODS["magnitude"], 0))
    small = Model("small", model.directory, target, weights, "small")
    folder = written(small, target, tmp_path / "onnx", variant, ONNXRUNTIME_GRAPH)
    found = continued(folder, [IDS], 32)[0]
    assert found == ours(folder / GRAPH_FILE, IDS, len(found))


@pytest.mark.parametrize("variant", [OURS, OPSET], ids=["shared buffer", "concatenated"])
def test_a_batch_of_different_lengths_continues_as_each_alone(tmp_path: Path, variant: GraphVariant) -> None:
    """Prompts without the end token, which also stands for padding."""
    save_family(tmp_path / "model", "qwen3")
    model = load_model(str(tmp_path / "model"))
    folder = written(model, model.decoder, tmp_path / "onnx", variant)
    prompts = [IDS, IDS[4:7]]
    assert continued(folder, prompts, 8) == [continued(folder, [prompt], 8)[0] for prompt in prompts]


def test_the_shared_buffer_comes_first_and_the_context_ends_with_the_tables(tmp_path: Path) -> None:
    save_family(tmp_path / "model", "qwen3")
    model = load_model(str(tmp_path / "model"))
    folder = written(model, model.decoder, tmp_path / "onnx", OPSET, OURS, ONNXRUNTIME_GRAPH, context=40)
    config = json.loads((folder / CONFIG).read_text())
    assert config["model"]["decoder"]["filename"] == OURS.filename
    assert config["search"]["max_length"] == config["model"]["context_length"] == 40
    assert len(continued(folder, [IDS], 99, 40)[0]) == 40 - len(IDS)
    with pytest.raises(InputError, match="logits of all positions"):
        write_genai(model.decoder, [ONNXRUNTIME_GRAPH], folder, model.directory)


@pytest.mark.slow
def test_a_bundle_is_loaded_as_it_is_and_says_what_edgeprune_run_says(tmp_path_factory) -> None:
    bundle = fitted(tmp_path_factory)
    loaded = og.Tokenizer(og.Model(str(bundle / "onnx")))
    found = continued(bundle / "onnx", [loaded.encode("over the lazy dog").tolist()], 24)[0]
    expected = "".join(stream_text(bundle, "over the lazy dog", 24, 0.0, 0, 1.0, 0, lambda note: None))
    assert load_tokenizer(bundle / "tokenizer").decode(found, skip_special_tokens=True).startswith(expected)
    assert expected


@pytest.mark.slow
@pytest.mark.demo
def test_the_pruned_demo_answers_as_edgeprune_run(tmp_path: Path) -> None:
    """32 greedy tokens of five questions; also the tokenizer and its chat template are the same."""
    model = load_model("demo")
    target = model.decoder.with_widths(3, 3, 1408)
    tokenizer = load_tokenizer(model.directory)
    sample = torch.tensor([tokenizer(CORPUS.read_text(encoding="utf-8")[:1200])["input_ids"]])
    weights = dict(prune(model, target, sample, METHODS["wanda"], 0))
    small = Model("small", model.directory, target, weights, "small")
    folder = written(small, target, tmp_path, OURS, ONNXRUNTIME_GRAPH, context=256)
    ends = end_ids(tokenizer, model.directory)
    loaded = og.Tokenizer(og.Model(str(folder)))
    for question in QUESTIONS:
        chat = json.dumps([{"role": "user", "content": question}])
        ids = prompt_ids(tokenizer, question, model.decoder.vocab_size)
        assert loaded.encode(loaded.apply_chat_template(chat, add_generation_prompt=True)).tolist() == ids
        found = continued(folder, [ids], 32, 256)[0]
        expected = ours(folder / GRAPH_FILE, ids, 32, 256, ends)
        if found != expected:
            place = next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
            logits = GraphRunner(folder / GRAPH_FILE, 1, 256).run(np.array([ids + expected[:place]]))[0]
            assert np.ptp(np.sort(logits)[-2:]) < NEAR
        assert loaded.decode(np.array(found, np.int32)) == tokenizer.decode(found, skip_special_tokens=True)
