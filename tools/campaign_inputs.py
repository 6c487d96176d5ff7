"""Small files of every format that edgeprune reads, for tools/campaign.py to damage."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from edgeprune.pipeline.run_file import toml_of
from edgeprune.profiles import load_profile, profile_toml
from tests.support import gguf_files
from tests.support.checkpoints import save_llama
from tests.support.file_events import watch
from tests.support.llamagen import random_llamagen
from tests.support.vq import small_vq
from tools.campaign_home import BUDGET, SMALL, Home

UNFINISHED = ("fit", "model", "--device", "jetson-orin", *BUDGET["jetson-orin"], *SMALL, "--output", "out")
TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"


def make_inputs(home: Home) -> Path:
    """Returns a folder with them: what a try needs is copied from there."""
    folder = home.folder / "inputs"
    folder.mkdir()
    _checkpoints(folder)
    _pictures(folder)
    shutil.copyfile(home.notes, folder / "notes.txt")
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "for the lazy dog runs away " * 20}]
    lines = [
        json.dumps({"messages": turns} if number % 2 else {"text": f"{number} foxes " * 60}) for number in range(8)
    ]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "profile.toml").write_text(profile_toml(load_profile("jetson-orin")), encoding="utf-8")
    options = {"model": "model", "calibration": "notes.txt", "samples": 4, "length": 24, "prompt": 8, "context": 32}
    text = toml_of(options | {"device": "jetson-orin", "method": "magnitude"})
    (folder / "run.toml").write_text(text, encoding="utf-8")
    for name, bundle in {"bundle": home.bundle, "ladder": home.ladder}.items():
        shutil.copytree(bundle, folder / name, symlinks=True)
    _caches(home, folder)
    _unfinished(home, folder)
    return folder


def _checkpoints(folder: Path) -> None:
    """Writes a language model as every kind of checkpoint."""
    model = save_llama(folder / "small")
    configuration = folder / "small" / "tokenizer_config.json"
    configuration.write_text(json.dumps(json.loads(configuration.read_text()) | {"chat_template": TEMPLATE}))
    save_llama(folder / "sharded", max_shard_size="200KB")
    shutil.copytree(folder / "small", folder / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), folder / "pickled" / "pytorch_model.bin")
    gguf_files.write(folder / "small.gguf", model)


def _pictures(folder: Path) -> None:
    """Writes an image generator, its codec, and pictures in folders of their classes."""
    gpt = random_llamagen(dim=256, heads=8, channels=768, layers=2, vocabulary=64, classes=11, side=4)
    settings = {"num_classes": 10, "image_size": 16, "downsample_size": 4, "vocab_size": 64, "cls_token_num": 1}
    torch.save({"model": gpt.state_dict(), "args": argparse.Namespace(**settings)}, folder / "gpt.pt")
    torch.save({"model": small_vq().state_dict()}, folder / "vq.pt")
    noise = np.random.default_rng(0)
    for label in (0, 3):
        (folder / "pictures" / str(label)).mkdir(parents=True)
        for name in ("0.png", "1.png", "2.jpg"):
            pixels = noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / str(label) / name)


def _caches(home: Home, folder: Path) -> None:
    """Fills a cache with all that runs look up."""
    cache = shutil.copytree(home.warm_cache, folder / "cache")
    shutil.copytree(home.estimated.with_name("of-jetson.cache"), cache, dirs_exist_ok=True)
    place = home.begin()
    home.run(("plan", folder / "small.gguf", "--device", "cpu"), place, cache=cache)
    home.run(("fit", folder / "small.gguf", "--device", "jetson-orin", "--memory", "1KB", *SMALL), place, cache=cache)
    home.end(place, False)


def _unfinished(home: Home, folder: Path) -> None:
    """Leaves the work folder of a run that was killed when all its stages were done."""
    place = home.begin()
    staging = str(place / "out.work" / "bundle")

    def before() -> None:
        watch(place, lambda kind, path: os.kill(os.getpid(), signal.SIGKILL) if path.startswith(staging) else None)

    home.run(UNFINISHED, place, before=before)
    (place / "out.work").rename(folder / "out.work")
    home.end(place, False)


def copied(inputs: Path, place: Path, names: tuple[str, ...]) -> None:
    """Copies inputs into the folder of a try."""
    for name in names:
        source, target = inputs / name, place / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copyfile(source, target)


def files_like(place: Path, pattern: str, random: Random) -> Path:
    """Returns one of the files of a try that a pattern names."""
    return random.choice(sorted(path for path in place.glob(pattern) if path.is_file() and not path.is_symlink()))
