"""Training of a small image generator on Fashion-MNIST, as a stranger's files: LlamaGen, its codec, a classifier.

    apt-get install dataset-fashion-mnist
    python tools/train_image_model.py

About half an hour on two cores. --output (by default the folder fashion-mnist in edgeprune's cache) then holds

    gpt.pt, codec.pt         LlamaGen's names and containers: 28 x 28 pixels, 7 x 7 tokens, 10 classes
    classifier.safetensors   judges whether a class can be recognised
    training.jsonl           settings, held-out figures and seconds of each

Parts that are finished stay: started again, it goes on with the missing ones. The test images are not read;
the last 5000 training images are held out to be watched.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeprune.cache import cache_folder
from edgeprune.errors import EdgepruneError, InputError
from edgeprune.progress import Progress, rich_progress
from tools.fashion_images import DATASET, SIDE, Images, mirrored, read_images
from tools.image_networks import Classifier, Codec, CodecShape, Gpt, GptShape

HELD_OUT = 5000
NULL_SHARE = 0.1  # of the images whose class is hidden in training


@dataclass(frozen=True)
class Settings:
    """The training of one part: steps of a batch, at a peak learning rate, after which it falls as a cosine."""

    steps: int
    batch: int
    rate: float
    seed: int = 0


CODEC, GPT, CLASSIFIER = Settings(900, 96, 2e-3), Settings(800, 256, 2e-3), Settings(1200, 128, 3e-3)


def batches(count: int, settings: Settings) -> Iterator[Tensor]:
    """Returns the row numbers of every step, (batch,) each: every row comes once before any comes again."""
    generator = torch.Generator().manual_seed(settings.seed)
    rows = torch.empty(0, dtype=torch.int64)
    for _ in range(settings.steps):
        while len(rows) < settings.batch:
            rows = torch.cat([rows, torch.randperm(count, generator=generator)])
        yield rows[: settings.batch]
        rows = rows[settings.batch :]


def half_precision() -> torch.autocast:
    """Returns a context that computes matrices in bf16, which recent CPUs multiply several times faster."""
    return torch.autocast("cpu", torch.bfloat16)


def fast(work: Callable[..., Tensor], calls: int) -> Callable[..., Tensor]:
    """Returns the function, compiled where that pays: two to three times faster, after half a minute."""
    return torch.compile(work) if calls >= 100 and shutil.which("g++") else work


def train(
    name: str,
    model: nn.Module,
    settings: Settings,
    count: int,
    loss_of: Callable[[Tensor, int], Tensor],
    progress: Progress,
    decay: float = 0.0,
) -> None:
    """Trains a network. loss_of: returns the loss of rows and the step's number; decay: of the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=decay)
    warm = max(1, settings.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / settings.steps)) + 0.01)
    )
    advance, shown, start = progress.stage(name, settings.steps), [], time.monotonic()
    model.train()
    for step, rows in enumerate(batches(count, settings)):
        loss = loss_of(rows, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        advance()
        shown.append(loss.item())
        if (step + 1) % max(1, settings.steps // 20) == 0:
            seconds = time.monotonic() - start
            progress.note(f"{name}: step {step + 1}/{settings.steps}, loss {np.mean(shown):.4f}, {seconds:.0f} s")
            shown.clear()
    model.eval()


def train_codec(images: Images, held_out: Images, shape: CodecShape, settings: Settings, progress: Progress) -> Part:
    """Trains the codec and returns it with its held-out figures.

    It begins without the codebook, which then starts from the encoder's directions of real images; a code that
    nothing chose for a while starts again in the same way, so that none is wasted.
    """
    torch.manual_seed(settings.seed)
    codec = Codec(shape).to(memory_format=torch.channels_last)
    directions_of, pictures_of = (fast(part, settings.steps) for part in (codec.directions, codec.pictures))
    begin = settings.steps // 10
    restart = max(1, settings.steps // 30)
    last_restart = settings.steps * 7 // 10
    used = torch.zeros(shape.vocab_size)

    def loss_of(rows: Tensor, step: int) -> Tensor:
        pixels = images.pixels[rows].contiguous(memory_format=torch.channels_last)
        with half_precision():
            directions = directions_of(pixels)
        if step < begin:
            with half_precision():
                pictures = pictures_of(directions)
            return reconstruction(pictures.float(), pixels)
        if step == begin or ((step - begin) % restart == 0 and step < last_restart):
            start_codes(codec, directions.detach(), used if step > begin else torch.zeros_like(used))
            used.zero_()
        codes = codec.nearest(directions)
        used.index_add_(0, codes.flatten(), torch.ones(codes.numel()))
        chosen = codec.look_up(codes)
        with half_precision():
            pictures = pictures_of(directions + (chosen - directions).detach())
        pull = (chosen - directions.detach()).square().mean() + 0.25 * (chosen.detach() - directions).square().mean()
        return reconstruction(pictures.float(), pixels) + pull

    train("codec", codec, settings, len(images), loss_of, progress)
    codes = encode(codec, held_out.pixels, progress)
    pictures = decode(codec, codes, progress)
    share = codes.flatten().bincount(minlength=shape.vocab_size) / codes.numel()
    figures = {
        "held_out_psnr": 10 * math.log10(4 / (pictures - held_out.pixels).square().mean().item()),
        "codes_used": int((share > 0).sum()),
        "code_perplexity": math.exp(-(share[share > 0] * share[share > 0].log()).sum().item()),
    }
    return Part(codec, figures)


def reconstruction(pictures: Tensor, pixels: Tensor) -> Tensor:
    """Returns the loss of decoded pictures."""
    return F.l1_loss(pictures, pixels) + F.mse_loss(pictures, pixels)


@torch.no_grad()
def start_codes(codec: Codec, directions: Tensor, used: Tensor) -> None:
    """Replaces codes that nothing used by directions of random places of this batch.

    directions: (b, code_size, side, side); used: (vocab_size,).
    """
    idle = (used == 0).nonzero().flatten()
    places = directions.permute(0, 2, 3, 1).flatten(0, 2)  # (b * side * side, code_size)
    codec.quantize.embedding.weight[idle] = places[torch.randperm(len(places))[: len(idle)]]


@torch.no_grad()
def encode(codec: Codec, pixels: Tensor, progress: Progress, batch: int = 250) -> Tensor:
    """Returns the codes (n, tokens) int64 of pixels (n, 3, height, width)."""
    advance = progress.stage("images to codes", -(-len(pixels) // batch))
    codes, directions_of = [], fast(codec.directions, len(pixels) // batch)
    for piece in pixels.split(batch):
        with half_precision():
            directions = directions_of(piece.contiguous(memory_format=torch.channels_last))
        codes.append(codec.nearest(directions).flatten(1))
        advance()
    return torch.cat(codes)


@torch.no_grad()
def decode(codec: Codec, codes: Tensor, progress: Progress, batch: int = 250) -> Tensor:
    """Returns the pictures (n, 3, height, width) fp32 of codes (n, tokens)."""
    advance = progress.stage("codes to images", -(-len(codes) // batch))
    pictures = []
    for piece in codes.split(batch):
        pictures.append(codec.pictures(codec.look_up(piece.unflatten(1, (math.isqrt(codes.shape[1]), -1)))))
        advance()
    return torch.cat(pictures)


@dataclass(frozen=True)
class Codes:
    """Codes of images with their classes. codes: (n, tokens) int64, classes: (n) int64; held out the same."""

    codes: Tensor
    classes: Tensor
    held_out: Tensor
    held_out_classes: Tensor


def train_gpt(data: Codes, shape: GptShape, settings: Settings, progress: Progress) -> Part:
    """Trains the GPT and returns it with its held-out figures."""
    torch.manual_seed(settings.seed)
    gpt = Gpt(shape)
    logits_of = fast(gpt, settings.steps)

    def loss_of(rows: Tensor, step: int) -> Tensor:
        hidden = torch.rand(len(rows)) < NULL_SHARE
        return code_loss(logits_of, data.codes[rows], data.classes[rows].masked_fill(hidden, shape.num_classes))

    train("gpt", gpt, settings, len(data.codes), loss_of, progress, decay=0.05)
    pieces = zip(data.held_out.split(250), data.held_out_classes.split(250), strict=True)
    with torch.no_grad():
        loss = np.mean([code_loss(gpt, codes, classes).item() for codes, classes in pieces])
    return Part(gpt, {"held_out_nats_per_code": float(loss)})


def code_loss(gpt: Callable[[Tensor, Tensor], Tensor], codes: Tensor, classes: Tensor) -> Tensor:
    """Returns the mean cross-entropy per code in nats. codes: (b, tokens), classes: (b,)."""
    with half_precision():
        logits = gpt(classes, codes[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())


def train_classifier(images: Images, held_out: Images, settings: Settings, progress: Progress) -> Part:
    """Trains the classifier and returns it with its held-out figures."""
    torch.manual_seed(settings.seed)
    classifier = Classifier()

    def loss_of(rows: Tensor, step: int) -> Tensor:
        return F.cross_entropy(classifier(images.pixels[rows]), images.classes[rows], label_smoothing=0.05)

    train("classifier", classifier, settings, len(images), loss_of, progress, decay=0.01)
    with torch.no_grad():
        right = torch.cat([classifier(piece).argmax(-1) for piece in held_out.pixels.split(500)]) == held_out.classes
    return Part(classifier, {"held_out_accuracy": right.float().mean().item()})


@dataclass(frozen=True)
class Part:
    """A trained network and its held-out figures."""

    network: nn.Module
    figures: dict[str, float]


@dataclass
class Folder:
    """The folder of finished parts, and the journal of their settings."""

    path: Path

    @property
    def journal(self) -> Path:
        return self.path / "training.jsonl"

    def finished(self, name: str, file: str, settings: dict[str, Any]) -> bool:
        """Returns whether a part is finished. Raises InputError where it was made with other settings."""
        if not self.journal.is_file() or not (self.path / file).is_file():
            return False
        lines = [json.loads(line) for line in self.journal.read_text(encoding="utf-8").splitlines()]
        before = [line["settings"] for line in lines if line["part"] == name]
        if before and before[-1] != json.loads(json.dumps(settings)):
            raise InputError(
                f"{self.path / file} was trained with {before[-1]}, not with {settings}",
                "Give another --output, or remove the folder to train again.",
            )
        return bool(before)

    def keep(self, name: str, file: str, part: Part, settings: dict[str, Any], seconds: float, cpu: float) -> None:
        """Writes a part, whole or not at all, then its line in the journal."""
        weights = {key: tensor.detach().contiguous() for key, tensor in part.network.state_dict().items()}
        temporary = self.path / f".{file}.{os.getpid()}"
        if file.endswith(".safetensors"):
            from safetensors.torch import save_file

            save_file(weights, temporary)
        else:
            torch.save({"model": weights, "args": argparse.Namespace(**arguments_of(part.network))}, temporary)
        if name == "codec":
            (self.path / "gpt.pt").unlink(missing_ok=True)  # it draws another codec's codes
        temporary.replace(self.path / file)
        line = {"part": name, "settings": settings, **part.figures, "seconds": seconds, "cpu_seconds": cpu}
        with self.journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")


def arguments_of(network: nn.Module) -> dict[str, Any]:
    """Returns the arguments that LlamaGen's training scripts keep beside the weights."""
    shape = network.shape
    if isinstance(shape, CodecShape):
        return {"codebook_size": shape.vocab_size, "codebook_embed_dim": shape.code_size}
    downsample = SIDE // shape.side
    return {
        "num_classes": shape.num_classes,
        "image_size": SIDE,
        "downsample_size": downsample,
        "vocab_size": shape.vocab_size,
        "cls_token_num": 1,
        "gpt_type": "c2i",
        "dim": shape.dim,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
    }


def load_codec(path: Path, shape: CodecShape) -> Codec:
    """Returns the codec of a file."""
    codec = Codec(shape)
    with torch.serialization.safe_globals([argparse.Namespace]):
        codec.load_state_dict(torch.load(path, weights_only=True)["model"])
    return codec.eval().to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Recipe:
    """Shapes and settings of the three parts."""

    codec_shape: CodecShape = CodecShape()
    gpt_shape: GptShape = GptShape()
    codec: Settings = CODEC
    gpt: Settings = GPT
    classifier: Settings = CLASSIFIER


def train_all(images: Images, output: Path, recipe: Recipe, progress: Progress, held_out: int = HELD_OUT) -> None:
    """Trains the parts that are missing. Raises InputError where a finished part was made with other settings."""
    output.mkdir(parents=True, exist_ok=True)
    folder = Folder(output)
    seen, watched = images[: len(images) - held_out], images[len(images) - held_out :]

    def make(name: str, file: str, shape: Any, settings: Settings, work: Callable[[], Part]) -> None:
        described = {**asdict(settings), **({"shape": asdict(shape)} if shape else {})}
        if folder.finished(name, file, described):
            progress.note(f"{output / file}: finished before")
            return
        start, cpu = time.monotonic(), time.process_time()
        part = work()
        folder.keep(name, file, part, described, time.monotonic() - start, time.process_time() - cpu)
        progress.note(f"{output / file}: {', '.join(f'{key} {value:.4g}' for key, value in part.figures.items())}")

    def codes_work() -> Part:
        codec, more = load_codec(output / "codec.pt", recipe.codec_shape), mirrored(seen)
        data = Codes(
            encode(codec, more.pixels, progress), more.classes, encode(codec, watched.pixels, progress), watched.classes
        )
        return train_gpt(data, recipe.gpt_shape, recipe.gpt, progress)

    make(
        "classifier",
        "classifier.safetensors",
        None,
        recipe.classifier,
        lambda: train_classifier(seen, watched, recipe.classifier, progress),
    )
    make(
        "codec",
        "codec.pt",
        recipe.codec_shape,
        recipe.codec,
        lambda: train_codec(mirrored(seen), watched, recipe.codec_shape, recipe.codec, progress),
    )
    make("gpt", "gpt.pt", recipe.gpt_shape, recipe.gpt, codes_work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=DATASET)
    parser.add_argument("--output", type=Path, default=cache_folder() / "fashion-mnist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=float, default=1.0, help="share of the usual number of steps")
    options = parser.parse_args()
    settings = {
        name: replace(usual, seed=options.seed, steps=max(10, round(usual.steps * options.steps)))
        for name, usual in (("codec", CODEC), ("gpt", GPT), ("classifier", CLASSIFIER))
    }
    try:
        with rich_progress() as progress:
            train_all(read_images(options.dataset, "train"), options.output, Recipe(**settings), progress)
    except EdgepruneError as error:
        sys.exit(f"{error.message}\n{error.remedy}")


if __name__ == "__main__":
    main()
