"""LlamaGen's files: every container, what they do not say, and sizes as they were published."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.configuration import checkpoint_tensors, decoder_of
from edgeprune.model.checkpoint.llamagen import Hints, config_of
from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.model.load import load_model, load_shape
from edgeprune.model.save import save_checkpoint
from tests.support.llamagen import LlamaGen, Sizes, configuration, random_llamagen
from tests.support.published import PUBLISHED

HINTS = Hints(image_size=128, num_heads=4)
SIZES = {  # layers, heads, dim, channels, parameters
    "B": (12, 12, 768, 2048, 110_888_448),
    "L": (24, 16, 1024, 2816, 342_910_976),
    "XL": (36, 20, 1280, 3584, 774_699_520),
    "XXL": (48, 24, 1536, 4096, 1_410_972_672),
    "3B": (24, 32, 3200, 8704, 3_096_659_200),
}


class Touch:
    """What a harmful checkpoint holds: a call that is made on unpickling."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def shapes_of(model: LlamaGen) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def published(name: str, side: int = 24) -> LlamaGen:
    layers, heads, dim, channels, _ = SIZES[name]
    with torch.device("meta"):
        return LlamaGen(Sizes(dim, dim // heads, ((heads, heads, channels),) * layers, 16384, 1001, side))


@pytest.mark.parametrize("name", SIZES)
def test_a_published_size(name: str) -> None:
    layers, heads, dim, _, parameters = SIZES[name]
    original = published(name)
    config = config_of(Path(f"c2i_{name}_384.pt"), shapes_of(original), {}, Hints())
    assert config == configuration(original.sizes) | {"downsample_size": 16}
    decoder = decoder_of(config)
    assert decoder.parameters == parameters == sum(weight.numel() for weight in original.parameters())
    assert (decoder.picture.side, decoder.max_position_embeddings) == (24, 577)
    stored = checkpoint_tensors(decoder)
    assert len(stored) == 7 * layers + 4
    assert {key: tensor.shape for key, tensor in stored.items()} == shapes_of(original)


@pytest.mark.parametrize(
    ("layers", "dim", "heads", "parameters"),
    [(24, 512, 8, 76_682_240), (36, 1024, 8, 455_489_536), (48, 1536, 16, 1_362_914_304)],
)
def test_a_published_imagegpt(layers: int, dim: int, heads: int, parameters: int) -> None:
    config = PUBLISHED["imagegpt-small"][0] | {"n_layer": layers, "n_embd": dim, "n_head": heads}
    with torch.device("meta"):
        original = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**config))
    decoder = decoder_of(config)
    assert decoder.parameters == parameters == sum(weight.numel() for weight in original.parameters())
    wanted = {key: tensor.shape for key, tensor in checkpoint_tensors(decoder).items()}
    assert wanted == {name: tuple(weight.shape) for name, weight in original.named_parameters()}
    assert (decoder.vocab_size, decoder.input_vocab_size, decoder.picture.side) == (512, 513, 32)


def _save(content: object, folder: Path, name: str = "weights.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


CONTAINERS = {
    "bare": lambda weights: weights,
    "a training script's": lambda weights: {
        "model": weights,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "steps": 7,
        "ema": {name: torch.zeros_like(weight) for name, weight in weights.items()},
        "args": argparse.Namespace(image_size=128, num_classes=10, vocab_size=257, cls_token_num=1, lr=1e-4, note=None),
    },
    "DeepSpeed's": lambda weights: {"module": weights, "global_steps": 7},
    "a state_dict": lambda weights: {"state_dict": weights},
    "compiled": lambda weights: {"model": {f"_orig_mod.{name}": weight for name, weight in weights.items()}},
    "compiled, with its angles": lambda weights: {
        f"_orig_mod.{name}": weight for name, weight in (weights | {"freqs_cis": torch.zeros(65, 8, 2)}).items()
    },
    "with its angles": lambda weights: weights | {"freqs_cis": torch.zeros(65, 8, 2)},
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_every_container_gives_the_original_logits(tmp_path: Path, container) -> None:
    original = random_llamagen()
    path = _save(container(original.state_dict()), tmp_path)
    model = load_model(str(path), HINTS)
    assert (model.name, model.decoder) == load_shape(str(path), HINTS)
    assert {name: tuple(weight.shape) for name, weight in model.weights.items()} == model.decoder.shapes()
    ids = torch.randint(0, 257, (3, 65), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 257 + torch.tensor([0, 7, 10])
    with torch.inference_mode():
        wanted = original(ids[:, :-1]).logits
    found = token_logits(model.decoder, weight_stream(model), ids)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_nothing_of_the_file_is_copied(tmp_path: Path) -> None:
    path = _save(random_llamagen().state_dict(), tmp_path)
    first, again = (load_model(str(path), HINTS) for _ in range(2))
    assert first.directory == again.directory
    assert first.fingerprint == again.fingerprint
    assert {file.name: file.is_symlink() for file in first.directory.iterdir()} == {
        "config.json": False,
        "pytorch_model.bin": True,
    }
    other = load_model(str(path), Hints(256, 4))
    assert other.fingerprint != first.fingerprint
    assert load_model(str(first.directory)).decoder == first.decoder  # and as any directory
    torch.save(random_llamagen(seed=1).state_dict(), path)
    assert load_model(str(path), HINTS).fingerprint != first.fingerprint


def test_what_is_saved_is_what_was_read(tmp_path: Path) -> None:
    """The order of q's and k's channels and both tables are put back."""
    original = random_llamagen(dim=80, groups=2).state_dict()
    model = load_model(str(_save(original, tmp_path)), HINTS)
    save_checkpoint(model.decoder, weight_stream(model), model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(weight, original[name]) for name, weight in saved.items())
    assert load_model(str(tmp_path / "saved")).decoder == model.decoder


def test_safetensors_and_half_precision(tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in random_llamagen().state_dict().items()}
    save_file({f"_orig_mod.{name}": weight for name, weight in weights.items()}, tmp_path / "weights.safetensors")
    ours = load_model(str(tmp_path / "weights.safetensors"), HINTS).weights
    theirs = load_model(str(_save(weights, tmp_path)), HINTS).weights
    assert all(weight.dtype == torch.bfloat16 and torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_what_is_known_needs_no_option() -> None:
    """By a published size's heads and only resolution, by the file's name, its training arguments or its angles."""

    def side(name: str, file: str, arguments=None, angles=None, **hints: int) -> int:
        shapes = shapes_of(published(name)) | ({"freqs_cis": angles} if angles else {})
        return config_of(Path(file), shapes, arguments or {}, Hints(**hints))["image_side"]

    assert [side(name, "weights.pt") for name in ("XL", "XXL", "3B")] == [24] * 3
    assert side("B", "c2i_B_256.pt") == 16
    assert side("B", "c2i_B_384.pt", image_size=384) == 24
    assert side("B", "weights.pt", {"image_size": 256}) == 16
    assert side("B", "weights.pt", {"image_size": 256, "downsample_size": 8}) == 32
    assert side("B", "weights.pt", angles=(257, 32, 2)) == 16
    assert side("XL", "weights.pt", {"image_size": 256}) == 16  # trained by somebody else


def test_heads_by_the_angles_and_grouped() -> None:
    shapes = shapes_of(random_llamagen(groups=2)) | {"freqs_cis": (65, 8, 2)}
    config = config_of(Path("weights.pt"), shapes, {}, Hints())
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "image_side")
    assert [config[name] for name in names] == [4, 2, 16, 8]


@pytest.mark.parametrize(
    ("arguments", "classes", "has_null"),
    [
        ({}, 10, True),
        ({"num_classes": 10}, 10, True),
        ({"num_classes": 11}, 11, False),
        ({"class_dropout_prob": 0.0}, 11, False),
        ({"class_dropout_prob": 0.1, "num_classes": 10}, 10, True),
    ],
)
def test_the_null_class(arguments: dict[str, object], classes: int, has_null: bool) -> None:
    config = config_of(Path("weights.pt"), shapes_of(random_llamagen()), arguments, HINTS)
    assert (config["num_classes"], config["has_null_class"]) == (classes, has_null)
    assert decoder_of(config).input_vocab_size == 257 + 11


WQKV, TABLE = "layers.1.attention.wqkv.weight", "cls_embedding.embedding_table.weight"
BAD = {
    "no size": ({}, {}, Hints(num_heads=4), "does not contain the number of tokens a side", "--image-size"),
    "no heads": ({}, {}, Hints(128), "does not contain the number of heads", "--num-heads"),
    "heads that do not divide": ({}, {}, Hints(128, 5), "5 heads do not divide the width 64", "--num-heads"),
    "no heads at all": ({}, {}, Hints(128, 0), "0 heads do not divide", "--num-heads"),
    "pixels between tokens": ({}, {}, Hints(130, 4), "130 pixels by --image-size 130 are not a multiple of 16", "384"),
    "no pixels": ({}, {}, Hints(0, 4), "0 pixels", "384"),
    "pixels beyond all": (
        {},
        {},
        Hints(16 << 20, 4),
        "does not describe a model: max_position_embeddings",
        "--image-size",
    ),
    "odd pairs of a head": (
        {},
        {},
        Hints(128, 32),
        "does not describe a model: head_dim 2 (a multiple of 4",
        "--num-heads",
    ),
    "another training": ({}, {"image_size": 256}, HINTS, "is 8 by --image-size 128, but 16 by its training", "size"),
    "other angles": ({"freqs_cis": (257, 8, 2)}, {}, HINTS, "8 by --image-size 128, but 16 by its freqs_cis", "size"),
    "angles of other heads": ({"freqs_cis": (65, 16, 2)}, {}, HINTS, "4 by --num-heads, but 2 by the head_dim 32", ""),
    "angles that are not a square": ({"freqs_cis": (64, 8, 2)}, {}, HINTS, "has 63 tokens, which are not a square", ""),
    "angles of no shape": ({"freqs_cis": (64, 8)}, {}, HINTS, "freqs_cis of weights.pt has shape (64, 8)", ""),
    "another vocabulary": ({}, {"vocab_size": 256}, HINTS, "vocab_size of weights.pt is 256, but its weights have", ""),
    "a long prefix": ({}, {"cls_token_num": 120}, HINTS, "cls_token_num of weights.pt is 120", ""),
    "other classes": (
        {},
        {"num_classes": 1000},
        HINTS,
        "has 11 rows, but its training arguments are num_classes 1000",
        "",
    ),
    "dropout without its row": (
        {},
        {"num_classes": 11, "class_dropout_prob": 0.1},
        HINTS,
        "num_classes 11, class_dropout_prob 0.1",
        "",
    ),
    "an argument in words": ({}, {"image_size": "big"}, HINTS, "image_size of weights.pt is 'big'", ""),
    "a missing tensor": ({WQKV: None}, {}, HINTS, f"has no tensor {WQKV}", "again"),
    "no classes": ({TABLE: None}, {}, HINTS, f"has no tensor {TABLE}", "again"),
    "another shape": (
        {WQKV: (190, 64)},
        {},
        HINTS,
        f"tensor {WQKV} of weights.pt has shape (190, 64), but its others",
        "",
    ),
    "no matrix": ({TABLE: (64,)}, {}, HINTS, f"tensor {TABLE} of weights.pt has shape (64,)", ""),
    "a first layer of no heads": (
        {"layers.0.attention.wqkv.weight": (64, 64)},
        {},
        HINTS,
        "does not hold queries, keys and values of 4",
        "",
    ),
    "a tensor too many": ({"layers.0.attention.bias": (64,)}, {}, HINTS, "has the tensor layers.0.attention.bias", ""),
    "a layer apart": ({"layers.7.ffn_norm.weight": (64,)}, {}, HINTS, "has no tensor layers.3.", ""),
    "a text's": (
        {TABLE: None, "cls_embedding.cap_proj.fc1.weight": (64, 2048)},
        {},
        HINTS,
        "(t2i), which is not",
        "c2i",
    ),
    "a codec": (
        {"tok_embeddings.weight": None, "quantize.embedding.weight": (257, 8)},
        {},
        HINTS,
        "is a codec",
        "--codec",
    ),
    "something else": ({"tok_embeddings.weight": None}, {}, HINTS, "not of a LlamaGen", "directory"),
}


@pytest.mark.parametrize(("changes", "arguments", "hints", "reason", "remedy"), BAD.values(), ids=BAD)
def test_what_is_no_or_another_model_is_said(changes, arguments, hints, reason, remedy) -> None:
    shapes = {name: shape for name, shape in (shapes_of(random_llamagen()) | changes).items() if shape is not None}
    with pytest.raises(InputError) as caught:
        config_of(Path("weights.pt"), shapes, arguments, hints)
    assert reason in caught.value.message
    assert remedy in caught.value.remedy


def test_a_name_and_a_published_size_contradict_the_user() -> None:
    for name, file, reason in (("B", "c2i_B_384.pt", "its name (384 pixels)"), ("XL", "x.pt", "exists for 384 pixels")):
        with pytest.raises(InputError, match="is 16 by --image-size 256, but 24 by") as caught:
            config_of(Path(file), shapes_of(published(name)), {}, Hints(256))
        assert reason in caught.value.message
    with pytest.raises(InputError, match="is 6 by --num-heads, but 12 by the size of LlamaGen-B"):
        config_of(Path("c2i_B_384.pt"), shapes_of(published("B")), {}, Hints(num_heads=6))


def _cut(path: Path, done: Path) -> None:
    torch.save(random_llamagen().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])


HARMFUL = {
    "among its arguments": (
        lambda path, done: torch.save(
            {"model": random_llamagen().state_dict(), "args": argparse.Namespace(hook=Touch(done))}, path
        ),
        r"asks for \w+.system, and nothing of it was executed",
    ),
    "among its tensors": (
        lambda path, done: torch.save(random_llamagen().state_dict() | {"x": Touch(done)}, path),
        r"asks for \w+.system, and nothing of it was executed",
    ),
    "truncated": (_cut, "truncated"),
}


@pytest.mark.parametrize(("write", "reason"), HARMFUL.values(), ids=HARMFUL)
@pytest.mark.parametrize("read", [load_model, load_shape])
def test_a_file_is_never_executed(tmp_path: Path, write, reason: str, read) -> None:
    write(tmp_path / "c2i_B_384.pt", tmp_path / "done")
    with pytest.raises(InputError, match=reason):
        read(str(tmp_path / "c2i_B_384.pt"), HINTS)
    assert not (tmp_path / "done").exists()


def test_a_hint_for_what_says_all_itself_is_checked(tmp_path: Path) -> None:
    directory = load_model(str(_save(random_llamagen().state_dict(), tmp_path)), HINTS).directory
    assert load_shape(str(directory), Hints(64, 4)) == load_shape(str(directory))
    for hints, reason in (
        (Hints(num_heads=2), "--num-heads is 2, but .* has 4 heads"),
        (Hints(100), "not a multiple of the 8"),
    ):
        with pytest.raises(InputError, match=reason):
            load_shape(str(directory), hints)
    (tmp_path / "text.json").write_text(json.dumps(PUBLISHED["qwen2.5-0.5b"][0]))
    with pytest.raises(InputError, match="--num-heads is for image generators"):
        load_shape(str(tmp_path / "text.json"), Hints(num_heads=2))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_side": 0}, "a picture of 0 x 0 tokens"),
        ({"image_side": -8}, "a picture of -8 x -8 tokens"),
        ({"num_classes": 0, "has_null_class": False}, "0 classes and no other"),
        ({"num_classes": -1}, "-1 classes"),
        ({"num_classes": 1 << 40}, "1099511627776 classes"),
        ({"image_side": None}, "senseless"),
        ({"has_null_class": None, "num_classes": "ten"}, "senseless"),
        ({"head_dim": 18}, "head_dim 18"),
    ],
)
def test_a_picture_that_makes_no_sense_is_one_message(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        decoder_of(configuration(random_llamagen().sizes) | changes)
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_positions": 1000}, "1000 positions are not a square"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ({"vocab_size": 1}, "vocab_size 0"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn true"),
    ],
)
def test_an_imagegpt_that_cannot_be_handled_is_said(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        decoder_of(PUBLISHED["imagegpt-small"][0] | changes)
    assert reason in caught.value.message
