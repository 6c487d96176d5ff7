"""A tiny image model's sizes, and images to train it on."""

import gzip

import torch

from tools.fashion_images import SIDE, Images
from tools.image_networks import CodecShape, GptShape
from tools.train_image_model import Recipe, Settings

CODEC = CodecShape(vocab_size=16, code_size=4, latent=8)
GPT = GptShape(vocab_size=16, dim=32, n_layer=2, n_head=4)
FEW = Settings(steps=3, batch=2, rate=1e-3)
RECIPE = Recipe(CODEC, GPT, codec=FEW, gpt=FEW, classifier=FEW)


def some_images(count=24):
    generator = torch.Generator().manual_seed(0)
    grey = torch.rand(count, 1, SIDE, SIDE, generator=generator) * 2 - 1
    return Images(grey.expand(-1, 3, -1, -1), torch.arange(count) % 10)


def idx(folder, part, pixels, classes):
    """The data set's two files of a part."""
    for kind, header, data in (("images-idx3", 16, pixels), ("labels-idx1", 8, classes)):
        (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + data))
