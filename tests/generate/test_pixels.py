"""Pixels through a codec's graph, grids, and folders of images as a user has them."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeprune.engine.onnx.codec import write_codec
from edgeprune.errors import EngineError, InputError
from edgeprune.generate import pixels as pictures
from edgeprune.generate.pixels import CodecRunner, grid, png, read_pixels, to_images, to_pixels
from edgeprune.model.codec.codec import load_codec
from tests.support.vq import small_vq


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_the_runner_gives_the_codecs_pixels_in_pieces(tmp_path, monkeypatch):
    model = small_vq(multipliers=(1, 1))
    torch.save(model.state_dict(), tmp_path / "vq.pt")
    write_codec(load_codec(tmp_path / "vq.pt"), 4, tmp_path / "codec.onnx")
    codes = np.random.default_rng(0).integers(0, 64, (5, 16), dtype=np.int32)
    whole = CodecRunner(tmp_path / "codec.onnx").pixels(codes)
    expected = (127.5 * model.decode(torch.from_numpy(codes).long()) + 128).clamp(0, 255).to(torch.uint8)
    assert np.abs(whole.astype(int) - expected.permute(0, 2, 3, 1).numpy()).max() <= 1  # ties of the rounding
    assert (whole == expected.permute(0, 2, 3, 1).numpy()).mean() > 0.999
    monkeypatch.setattr(pictures, "PIXELS_AT_ONCE", 2 * 8 * 8)
    runner = CodecRunner(tmp_path / "codec.onnx", threads=1)
    assert np.array_equal(runner.pixels(codes), whole)
    with pytest.raises(EngineError, match="failed to decode"):
        runner.pixels(codes + 64)
    (tmp_path / "codec.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="cannot load"):
        CodecRunner(tmp_path / "codec.onnx")


def test_every_value_of_a_pixel_returns_and_values_beyond_are_cut():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_pixels(to_images(pixels)), pixels)
    assert to_images(pixels).shape == (1, 3, 16, 16)
    assert (to_images(pixels).min(), to_images(pixels).max()) == (-1, 1)
    images = np.array([-5, -1, 0, 0.9999, 5], np.float32)[:, None, None, None].repeat(3, axis=1)
    assert to_pixels(images)[:, 0, 0, 1].tolist() == [0, 0, 128, 255, 255]


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 12), height=st.integers(1, 4), width=st.integers(1, 4), columns=st.none() | st.integers(1, 15)
)
def test_a_grid_holds_every_image_row_by_row(count, height, width, columns):
    pixels = noise(count, height, width, 3) // 2
    sheet = np.asarray(grid(pixels, columns))
    across = sheet.shape[1] // width
    assert across == min(columns or int(np.ceil(np.sqrt(count))), count)
    for place in range(-(-count // across) * across):
        row, column = divmod(place, across)
        part = sheet[row * height :][:height, column * width :][:, :width]
        assert np.array_equal(part, pixels[place]) if place < count else (part == 255).all()


def test_a_png_is_the_image():
    image = grid(noise(3, 5, 4, 3))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(image)))), np.asarray(image))


def test_folders_named_by_numbers_are_classes(tmp_path):
    for place, name in enumerate(["7/a.png", "7/deeper/b.PNG", "007/c.webp", "cats/d.png", "12x/e.png", "f.png"]):
        save(tmp_path / "5" / name, noise(6, 6, 3, seed=place) // 8 * 8, **({"lossless": True} if "c." in name else {}))
    (tmp_path / "5" / "notes.txt").write_text("no image")
    found = read_pixels(tmp_path / "5", 6)
    by_image = {pixels.tobytes(): label for label, pixels in zip(found.classes, found.pixels, strict=True)}
    expected = [7, 7, 7, "cats", "12x", None]
    assert (found.of, found.others) == (6, {".txt": 1})
    assert by_image == {(noise(6, 6, 3, seed=place) // 8 * 8).tobytes(): label for place, label in enumerate(expected)}


def test_some_images_are_drawn_by_seed(tmp_path):
    for label in range(20):
        save(tmp_path / str(label) / "image.png", np.full((4, 4, 3), label, np.uint8))
    drawn = {}
    for seed in (0, 0, 1):
        classes, pixels, of, _ = read_pixels(tmp_path, 4, most=6, seed=seed)
        assert of == 20
        assert pixels[:, 0, 0, 0].tolist() == classes
        assert len(set(classes)) == 6
        assert drawn.setdefault(seed, classes) == classes
    assert drawn[0] != drawn[1]
    assert sorted(read_pixels(tmp_path, 4, most=100)[0]) == list(range(20))


def test_the_middle_square_is_taken_turned_as_the_camera_says_and_made_rgb(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = noise(8, 8, 3)
    save(tmp_path / "wide.png", wide)
    (pixels,) = read_pixels(tmp_path, 8)[1]
    assert np.array_equal(pixels, wide[:, 8:16])
    smaller = Image.fromarray(wide).resize((4, 4), Image.Resampling.BICUBIC, box=(8, 0, 16, 8))
    assert np.array_equal(read_pixels(tmp_path, 4)[1][0], np.asarray(smaller))
    (tmp_path / "wide.png").unlink()
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    save(tmp_path / "grey.png", noise(8, 8), exif=turned)
    (pixels,) = read_pixels(tmp_path, 8)[1]
    assert np.array_equal(pixels, noise(8, 8)[::-1, ::-1, None].repeat(3, axis=2))


def test_folders_and_files_that_are_none_are_one_message(tmp_path):
    def refused(folder, match):
        with pytest.raises(InputError, match=match) as raised:
            read_pixels(folder, 8)
        assert "\n" not in raised.value.message
        assert raised.value.remedy

    refused(tmp_path / "none", "is not a folder")
    refused(tmp_path, "holds no images")
    (tmp_path / "broken.png").write_bytes(b"no image")
    refused(tmp_path, "cannot read the image .*broken.png")
    save(tmp_path / "broken.png", noise(64, 64, 3))
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:6000])
    refused(tmp_path, "cannot read the image .*broken.png")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_not_cut(tmp_path, suffix):
    grey = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    save(tmp_path / "grey" / f"a.{suffix}", grey, exif=upside_down)
    (pixels,) = read_pixels(tmp_path / "grey", 8).pixels
    expected = (grey / 257).round()[::-1, ::-1, None].repeat(3, axis=2)
    assert np.array_equal(pixels, expected)


def test_values_without_a_range_are_refused(tmp_path):
    save(tmp_path / "depth.tif", np.ones((8, 8), np.float32))
    with pytest.raises(InputError, match=r"depth\.tif: its values are of 32 bits"):
        read_pixels(tmp_path, 8)


def test_what_is_transparent_is_white_and_other_colours_are_right(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 40, 20])
    pictures = {
        "palette.png": (palette, (255, 255, 255), {"transparency": 1}),
        "opaque.png": (palette, (200, 40, 20), {"transparency": 0}),
        "grey.png": (Image.new("LA", (8, 8), (40, 255)), (40, 40, 40), {}),
        "half.png": (Image.new("LA", (8, 8), (0, 51)), (204, 204, 204), {}),
        "hidden.png": (Image.new("RGBA", (8, 8), (9, 9, 9, 0)), (255, 255, 255), {}),
        "print.tif": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0), {}),
        "bits.bmp": (Image.new("1", (8, 8), 1), (255, 255, 255), {}),
    }
    for name, (image, colour, options) in pictures.items():
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        image.save(folder / name, **options)
        (pixels,) = read_pixels(folder, 4).pixels
        assert np.array_equal(pixels, np.full((4, 4, 3), colour, np.uint8)), name


def test_what_systems_put_beside_pictures_is_passed_over(tmp_path):
    save(tmp_path / "0" / "a.PNG", noise(8, 8, 3))
    for name in ("0/._a.png", "__MACOSX/0/a.png", ".cache/a.png", ".DS_Store", "0/Thumbs.db", "desktop.ini"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"Mac OS X")
    assert read_pixels(tmp_path, 8)[0] == [0]
    assert read_pixels(tmp_path, 8).others == {}


def test_pictures_whose_content_was_not_fetched_are_named_as_such(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "annex" / "a.png")
    with pytest.raises(InputError, match="holds no images, only 1 of broken links"):
        read_pixels(tmp_path, 8)
    save(tmp_path / "b.png", noise(8, 8, 3))
    assert read_pixels(tmp_path, 8).others == {"broken links": 1}
    (tmp_path / "b.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match=r"b\.png is a pointer of Git LFS"):
        read_pixels(tmp_path, 8)


def test_no_program_is_started_whatever_a_file_holds(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("subprocess.check_call", lambda *given, **options: pytest.fail("a program was started"))
    monkeypatch.setattr("subprocess.Popen", lambda *given, **options: pytest.fail("a program was started"))
    with pytest.raises(InputError, match=r"cannot read the image .*a\.png"):
        read_pixels(tmp_path, 8)


def test_a_picture_of_endless_size_is_one_message(tmp_path, monkeypatch, recwarn):
    save(tmp_path / "a.png", noise(30, 30, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # a warning beyond it, an error beyond its double
    assert read_pixels(tmp_path, 8).of == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(InputError, match=r"a\.png: Image size \(900 pixels\) exceeds limit of 800"):
        read_pixels(tmp_path, 8)
    assert not recwarn.list


def test_other_formats_alone_are_named(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds no images, only 1 of \.heic"):
        read_pixels(tmp_path, 8)


def test_pictures_need_no_torch():
    code = "import sys, edgeprune.generate.pixels; sys.exit(bool({'torch', 'onnxruntime', 'PIL'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
