import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeprune.errors import InputError
from edgeprune.model.checkpoint import torch_file
from edgeprune.model.checkpoint.torch_file import KEPT_BYTES, TorchFiles, tensors_of, torch_header
from edgeprune.model.load import load_model
from tests.support import ROOT
from tests.support.checkpoints import save_llama
from tests.support.families import CASES, save_family

BIN = "pytorch_model.bin"


class Mkdir:
    """What a harmful checkpoint holds: a call that is made on unpickling."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _shard(folder, count, suffix):
    """The tensors of model.safetensors, dealt out one by one: neighbours stand in different files."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    kind = "model.safetensors" if suffix == "safetensors" else BIN
    weight_map = {}
    for number in range(count):
        file = f"{kind.split('.')[0]}-{number + 1:05}-of-{count:05}.{suffix}"
        part = {name: weights[name] for name in list(weights)[number::count]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_shards_and_pickles_of_every_family_hold_its_weights(tmp_path, case):
    save_family(tmp_path, case)
    model = load_model(str(tmp_path))
    expected, prints = dict(model.weights), [model.fingerprint]
    assert {name: tuple(weight.shape) for name, weight in expected.items()} == model.decoder.shapes()
    whole = (tmp_path / "model.safetensors").read_bytes()
    for kind in ("one .bin", "shards of .bin", "shards"):  # safetensors come first where both are there
        if kind == "one .bin":
            torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / BIN)
            (tmp_path / "model.safetensors").unlink()
        else:
            (tmp_path / BIN).unlink(missing_ok=True)
            (tmp_path / "model.safetensors").write_bytes(whole)
            _shard(tmp_path, 3, "bin" if kind == "shards of .bin" else "safetensors")
        other = load_model(str(tmp_path))
        assert other.weights.keys() == expected.keys()
        assert all(torch.equal(other.weights[name], weight) for name, weight in expected.items())
        assert all(weight.dtype == other.weights[name].dtype for name, weight in expected.items())
        prints.append(other.fingerprint)
    assert len(set(prints)) == 4


@pytest.mark.parametrize("case", ["gpt2", "opt"])
def test_old_checkpoints_of_a_base_model_load(tmp_path, case):
    """Without the base model's name before each key, with mask buffers, with the tied head and with parameters."""
    save_family(tmp_path, case)
    expected = dict(load_model(str(tmp_path)).weights)
    stored = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    old = {name.partition(".")[2]: torch.nn.Parameter(weight) for name, weight in stored.items()}
    mask = torch.tril(torch.ones(1, 1, 8, 8, dtype=torch.bool))
    old |= {"h.0.attn.bias": mask} if case == "gpt2" else {"decoder.version": torch.ones(1)}
    ends = ("wte.weight", "embed_tokens.weight")
    old["lm_head.weight"] = next(weight for name, weight in stored.items() if name.endswith(ends))
    torch.save(old, tmp_path / BIN)
    model = load_model(str(tmp_path))
    assert all(torch.equal(model.weights[name], weight) for name, weight in expected.items())
    assert not any(weight.requires_grad for weight in model.weights.values())
    torch.save(old | {"lm_head.weight": old["lm_head.weight"] + 1}, tmp_path / BIN)
    with pytest.raises(InputError, match="lm_head.weight is stored and differs"):
        load_model(str(tmp_path))


def test_names_types_and_shapes(tmp_path):
    content = {
        "half": torch.ones(2, 3, dtype=torch.float16),
        "brain": torch.ones(4, dtype=torch.bfloat16),
        "single": torch.ones(()),
        "mask": torch.ones(2, dtype=torch.bool),
        "sparse": torch.eye(2).to_sparse(),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "step": 3,
        "names": ["a"],
    }
    torch.save(content, tmp_path / "x.bin")
    assert torch_header(tmp_path / "x.bin") == {
        "half": ("F16", (2, 3)),
        "brain": ("BF16", (4,)),
        "single": ("F32", ()),
        "mask": ("bool", (2,)),
        "sparse": ("sparse_coo", (2, 2)),
        "transposed": ("F32", (3, 2)),
    }
    assert torch.equal(TorchFiles().read(tmp_path / "x.bin", "transposed"), content["transposed"])


def test_a_file_is_mapped_again_when_much_of_it_was_read(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(4), "b": torch.zeros(4)}, tmp_path / "x.bin")
    torch.save({"c": torch.ones(4)}, tmp_path / "y.bin")
    opened = []
    monkeypatch.setattr(torch_file, "KEPT_BYTES", 24)
    monkeypatch.setattr(torch_file, "tensors_of", lambda file: opened.append(file.name) or tensors_of(file))
    files = TorchFiles()
    for file, key in (("x", "a"), ("x", "b"), ("x", "a"), ("y", "c"), ("x", "b")):
        assert files.read(tmp_path / f"{file}.bin", key).sum() == 4 * (key != "b")
    assert opened == ["x.bin", "x.bin", "y.bin", "x.bin"]
    torch.save({"d": torch.ones(4)}, tmp_path / "y.bin")
    with pytest.raises(InputError, match="no longer has the tensor c"):
        files.read(tmp_path / "y.bin", "c")


def _harmful(path, done):
    torch.save({"model.norm.weight": torch.ones(4), "other": Mkdir(done)}, path)


def _harmful_pickle(path, done):
    path.write_bytes(pickle.dumps({"model.norm.weight": Mkdir(done)}))


def _harmful_old(path, done):
    torch.save({"other": Mkdir(done)}, path, _use_new_zipfile_serialization=False)


def _old(path, done):
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)


def _cut(path, done):
    torch.save({"a": torch.ones(4000)}, path)
    path.write_bytes(path.read_bytes()[:-1000])


def _module(path, done):
    torch.save(torch.nn.Linear(2, 2), path)


def _script(path, done):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def _compressed(path, done):
    torch.save({"a": torch.ones(4000)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _other_archive(path, done):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


BAD = {
    "a call in its pickle": (_harmful, r"asks for \w+.mkdir, and nothing of it was executed"),
    "a plain pickle with a call": (_harmful_pickle, "is not a PyTorch checkpoint"),
    "an old file with a call": (_harmful_old, "before PyTorch 1.6"),
    "an old file": (_old, "before PyTorch 1.6"),
    "truncated": (_cut, "truncated"),
    "a whole module": (_module, "asks for torch.nn.modules.linear.Linear, and nothing of it was executed"),
    "a script": (_script, "TorchScript"),
    "compressed": (_compressed, "is compressed"),
    "another archive": (_other_archive, "is not a PyTorch checkpoint"),
    "empty": (lambda path, done: path.write_bytes(b""), "is not a PyTorch checkpoint"),
    "a pointer": (lambda path, done: path.write_text("version https://git-lfs.github.com"), "not a PyTorch checkpoint"),
    "a list": (lambda path, done: torch.save([torch.ones(2)], path), "holds no tensors by name"),
    "a folder": (lambda path, done: path.mkdir(), "cannot read"),
}


@pytest.mark.parametrize(("write", "reason"), BAD.values(), ids=BAD)
def test_what_is_no_plain_state_dict_is_refused_and_not_executed(tmp_path, write, reason):
    write(tmp_path / BIN, tmp_path / "done")
    with pytest.raises(InputError, match=reason) as caught:
        torch_header(tmp_path / BIN)
    assert caught.value.remedy
    assert "\n" not in caught.value.message
    assert not (tmp_path / "done").exists()


def test_the_harmful_file_would_have_done_it(tmp_path):
    _harmful(tmp_path / BIN, tmp_path / "done")
    torch.load(tmp_path / BIN, weights_only=False)
    assert (tmp_path / "done").exists()


@pytest.mark.slow
def test_the_command_line_refuses_a_harmful_checkpoint(tmp_path):
    save_llama(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    _harmful(tmp_path / "model" / BIN, tmp_path / "done")
    result = subprocess.run(
        [sys.executable, "-m", "edgeprune.cli.app", "fit", "model", "--device", "jetson-orin"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )
    assert result.returncode == 2, result.stderr
    assert "nothing of it was executed" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "done").exists()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_reading_holds_a_layer_not_the_file(tmp_path, suffix):
    """Eight fused layers of 46 MB, each weight read by itself, in a process whose peak is its own."""
    config = {
        "model_type": "phi3",
        "hidden_size": 1024,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 64,
        "num_hidden_layers": 8,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    code = (
        "import torch\n"
        "from edgeprune.ondevice.machine import peak_bytes\n"
        "from edgeprune.model import load\n"
        "model = load.load_model('.')\n"
        "start = peak_bytes()\n"
        "for index in range(8):\n"
        "    held = [model.weights[name] for name in model.decoder.layer_shapes(index)]\n"
        "    read = [weight.view(torch.int16).max() for weight in held]\n"
        "    del held\n"
        "print(peak_bytes() - start)"
    )
    from edgeprune.model.checkpoint.configuration import checkpoint_tensors, decoder_of

    tensors = checkpoint_tensors(decoder_of(config))
    weights = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in tensors.items()}
    if suffix == "bin":
        torch.save(weights, tmp_path / BIN)
    else:
        save_file(weights, tmp_path / "model.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert int(result.stdout) < 2 * 46e6 + (KEPT_BYTES if suffix == "bin" else 0)
