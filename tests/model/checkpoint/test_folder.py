"""The folder of a checkpoint, and what is said of a folder that is something else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgeprune.errors import InputError
from edgeprune.model.load import load_model, load_shape
from tests.support.checkpoints import save_llama


def test_folders_of_another_kind_are_named(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "0a1b"
    save_llama(snapshot)
    for read in (load_model, load_shape):
        with pytest.raises(InputError, match="is a PEFT adapter of someone/base") as caught:
            read(str(tmp_path / "adapter"))
        assert "merge_and_unload()" in caught.value.remedy
        with pytest.raises(InputError, match="a model's folder in the hub's cache") as caught:
            read(str(snapshot.parent.parent))
        assert caught.value.remedy == f"Give the snapshot: {snapshot}"
        with pytest.raises(InputError, match="is the hub's cache, not a model") as caught:
            read(str(tmp_path))
        assert caught.value.remedy.endswith("such as someone/tiny.")
    save_llama(tmp_path / "adapter")  # with the base's configuration, and without its weights
    (tmp_path / "adapter" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="is a PEFT adapter of someone/base"):
        load_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("held", "said", "remedy"),
    [
        (("README.md", "model-Q4_0.gguf"), "no config.json; it holds model-Q4_0.gguf", "Give the file: .*Q4_0.gguf"),
        (("model.onnx",), "it holds model.onnx", "the checkpoint that it was made of"),
        (("rank0.engine", "tokenizer.json"), "it holds rank0.engine", "the checkpoint that it was made of"),
        (("tf_model.h5",), "it holds tf_model.h5", "save_pretrained"),
        (("notes.txt",), "has no config.json$", "transformers can load"),
        ((), "has no config.json: it is empty", "transformers can load"),
    ],
)
def test_what_a_folder_holds_instead_of_a_checkpoint_is_named(tmp_path: Path, held, said, remedy):
    for name in held:
        (tmp_path / name).touch()
    for read in (load_model, load_shape):
        with pytest.raises(InputError, match=said) as caught:
            read(str(tmp_path))
        assert re.search(remedy, caught.value.remedy)


def test_the_folder_within_is_named(tmp_path: Path):
    """A bundle's checkpoint, or the last of a training's."""
    for step in (100, 200):
        save_llama(tmp_path / f"checkpoint-{step}")
    for read in (load_model, load_shape):
        with pytest.raises(InputError, match="its folder checkpoint-200 has one") as caught:
            read(str(tmp_path))
        assert caught.value.remedy == f"Give {tmp_path / 'checkpoint-200'}."


def test_other_weights_beside_a_configuration_are_named(tmp_path: Path):
    save_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.ckpt")
    with pytest.raises(InputError, match="pytorch_model.bin; it holds model.ckpt"):
        load_model(str(tmp_path))
