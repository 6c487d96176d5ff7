"""The image model that is trained here is one that edgeprune reads from a stranger's files."""

import pytest
import torch

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.llamagen import Hints
from edgeprune.model.codec.codec import check_codec, load_codec
from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.model.load import load_model
from edgeprune.progress import Silent
from tests.support.image_model import CODEC, FEW, GPT, RECIPE, idx, some_images
from tools import train_image_model as tool
from tools.fashion_images import MIRRORED, mirrored, read_images
from tools.image_networks import Gpt

pytestmark = pytest.mark.slow

PARTS = ("codec.pt", "gpt.pt", "classifier.safetensors")


def gpt_of(folder):
    gpt = Gpt(GPT)
    with torch.serialization.safe_globals([tool.argparse.Namespace]):
        gpt.load_state_dict(torch.load(folder / "gpt.pt", weights_only=True)["model"])
    return gpt.eval()


def test_edgeprune_computes_what_was_trained(trained):
    model = load_model(str(trained / "gpt.pt"), Hints(num_heads=GPT.n_head))
    picture = model.decoder.picture
    assert (picture.side, picture.num_classes, picture.has_null) == (7, 10, True)
    codes = torch.randint(16, (3, 49), generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([2, 9, 10])
    found = token_logits(model.decoder, weight_stream(model), torch.cat([16 + classes[:, None], codes], dim=1))
    with torch.no_grad():
        expected = gpt_of(trained)(classes, codes[:, :-1])
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_edgeprune_reads_the_codec(trained):
    codec, own = load_codec(trained / "codec.pt"), tool.load_codec(trained / "codec.pt", CODEC)
    check_codec(codec, load_model(str(trained / "gpt.pt"), Hints(num_heads=4)).decoder)
    assert codec.has_encoder
    pixels = some_images(3).pixels
    with torch.no_grad():
        directions = own.directions(pixels)
        codes = own.nearest(directions).flatten(1)
        assert torch.equal(codec.encode(pixels), codes)
        expected = tool.decode(own, codes, Silent())
    assert (codec.decode(codes) - expected).abs().max() < 1e-4


def test_what_is_finished_stays_and_what_hangs_on_it_is_made_again(trained, tmp_path):
    folder = tmp_path / "again"
    folder.mkdir()
    for name in (*PARTS, "training.jsonl"):
        (folder / name).write_bytes((trained / name).read_bytes())
    before = {name: (folder / name).stat().st_mtime_ns for name in PARTS}
    tool.train_all(some_images(), folder, RECIPE, Silent(), held_out=4)
    assert before == {name: (folder / name).stat().st_mtime_ns for name in PARTS}
    weights = {name: (folder / name).read_bytes() for name in PARTS}
    (folder / "codec.pt").unlink()
    tool.train_all(some_images(), folder, RECIPE, Silent(), held_out=4)
    assert all((folder / name).stat().st_mtime_ns > before[name] for name in ("codec.pt", "gpt.pt"))
    assert (folder / "classifier.safetensors").stat().st_mtime_ns == before["classifier.safetensors"]
    assert weights == {name: (folder / name).read_bytes() for name in PARTS}  # of equal seeds


def test_other_settings_are_refused(trained):
    other = tool.Recipe(CODEC, GPT, codec=FEW, gpt=tool.Settings(4, 2, 1e-3), classifier=FEW)
    with pytest.raises(InputError, match=r"gpt\.pt was trained with"):
        tool.train_all(some_images(), trained, other, Silent(), held_out=4)


def test_the_learned_mirror_no_shoes():
    images = some_images(10)
    more = mirrored(images)
    assert more.classes[10:].tolist() == list(MIRRORED)
    assert torch.equal(more.pixels[10], images.pixels[0].flip(-1))


def test_images_are_read_from_their_files(tmp_path):
    idx(tmp_path, "train", bytes(784) + bytes([255]) * 784, bytes([3, 7]))
    images = read_images(tmp_path, "train")
    assert images.pixels.shape == (2, 3, 28, 28)
    assert (images.pixels[0].unique().item(), images.pixels[1].unique().item()) == (-1, 1)
    assert images.classes.tolist() == [3, 7]


def test_files_that_are_missing_or_damaged_are_said(tmp_path):
    with pytest.raises(InputError) as missing:
        read_images(tmp_path, "train")
    assert "apt-get install dataset-fashion-mnist" in missing.value.remedy
    idx(tmp_path, "train", bytes(784), bytes([3, 7]))
    with pytest.raises(InputError, match="784 pixels for 2 classes"):
        read_images(tmp_path, "train")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="cannot be read"):
        read_images(tmp_path, "train")
