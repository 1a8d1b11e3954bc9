"""Pictures: orientation, transparency, depth, colour spaces, and files that are none."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from mplug2.data import MediaError, Transform, load, read_image
from mplug2.data.images import FORMATS

_Y, _X = np.mgrid[:16, :24]
GRADIENT = np.stack((10 * _X, 10 * _Y, np.full_like(_X, 99)), -1).astype(np.uint8)


def saved(picture: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "TIFF", "QOI"])
def test_lossless_formats_give_their_pixels(format):
    frames = read_image(saved(Image.fromarray(GRADIENT), format))
    assert frames.dtype == torch.uint8
    assert torch.equal(frames, torch.from_numpy(GRADIENT)[None])


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF", "JPEG2000"])
def test_lossy_formats_come_close(format):
    frames = read_image(saved(Image.fromarray(GRADIENT), format, quality=95))
    assert (frames[0].int() - torch.from_numpy(GRADIENT).int()).abs().float().mean() < 4


@pytest.mark.parametrize(
    ("orientation", "turns", "mirrored"), [(1, 0, 0), (3, 2, 0), (6, 3, 0), (8, 1, 0), (2, 0, 1), (5, 3, 1)]
)
def test_exif_orientation_is_applied(orientation, turns, mirrored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    frames = read_image(saved(Image.fromarray(GRADIENT), "PNG", exif=exif))
    expected = np.rot90(GRADIENT, turns)
    assert np.array_equal(frames[0], expected[:, ::-1] if mirrored else expected)


def test_broken_metadata_does_not_matter():
    orientation = struct.pack("<HHII", 0x0112, 3, 1000, 100_000)  # its value would lie behind the end of the file
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + orientation + bytes(4)
    assert read_image(saved(Image.fromarray(GRADIENT), "JPEG", exif=exif)).shape == (1, 16, 24, 3)


def test_transparency_is_over_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = 10, 20, 30, 255
    pixels[0, 1] = 10, 20, 30, 0
    pixels[1] = 0, 0, 0, 51
    frame = read_image(saved(Image.fromarray(pixels), "PNG"))[0]
    assert frame[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert frame[1].tolist() == [[204, 204, 204]] * 2
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 200, 200])
    palette.putpixel((1, 0), 1)
    assert read_image(saved(palette, "PNG", transparency=1))[0].tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_grey_of_16_bits_is_scaled():
    values = np.array([[0, 128, 129, 257, 65535]], np.uint16)
    for format in ("PNG", "TIFF"):
        assert read_image(saved(Image.fromarray(values), format))[0, 0, :, 0].tolist() == [0, 0, 1, 1, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "YCbCr", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    frames = read_image(
        saved(Image.new("RGB", (5, 4), "white").convert(mode), "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    )
    assert frames.shape == (1, 4, 5, 3)
    assert frames.min() >= 250


def test_an_animation_gives_its_first_picture_and_loads_as_video():
    red, blue = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    gif = saved(red, "GIF", save_all=True, append_images=[blue, blue, blue], duration=100)
    assert read_image(gif)[0, 0, 0].tolist() == [255, 0, 0]
    clip = load(gif, Transform(8), num_frames=4)
    assert clip.shape == (1, 3, 4, 8, 8)
    assert clip[0, 0, 0].mean() > 0 > clip[0, 0, 1].mean()
    assert load(saved(red, "GIF"), Transform(8), num_frames=4).shape == (1, 3, 1, 8, 8)


def test_load_goes_by_content_not_by_name(tmp_path):
    path = tmp_path / "picture.mp4"
    path.write_bytes(saved(Image.fromarray(GRADIENT), "PNG"))
    transform = Transform(8)
    expected = transform(read_image(path))[None]
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert torch.equal(load(source, transform, num_frames=16), expected)
    with path.open("rb") as file:
        assert torch.equal(load(file, transform, num_frames=16), expected)
        assert not file.closed


def test_load_passes_ready_tensors_and_samples_frames():
    ready = torch.zeros(2, 3, 4, 8, 8)
    assert load(ready, Transform(8), num_frames=16) is ready
    frames = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 4, 4, 3)
    transform = Transform(8)
    assert torch.equal(load(frames, transform, num_frames=4), transform(frames[[0, 2, 4, 7]])[None])
    with pytest.raises(ValueError, match=r"\[B, 3, T, H, W\], got \[3, 4, 8, 8\]"):
        load(ready[0], Transform(8), num_frames=4)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "GIF"])
def test_truncated_pictures_are_errors(format, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "cut"
    path.write_bytes(saved(Image.fromarray(noise), format)[:900])
    with pytest.raises(MediaError, match=r"cut: (cannot be decoded|is not a picture)") as caught:
        read_image(path)
    assert caught.value.name == str(path)


def test_what_is_no_picture_is_said_so(tmp_path):
    with pytest.raises(MediaError, match=r"^<64 bytes>: is not a picture; expected one of .*JPEG"):
        read_image(bytes(range(256))[:64])
    with pytest.raises(MediaError, match="floating-point"):
        read_image(saved(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))
    bomb = bytearray(saved(Image.new("1", (8, 8)), "BMP"))
    bomb[18:26] = np.array([60000, 60000], "<i4").tobytes()
    with pytest.raises(MediaError, match="cannot be decoded"):
        read_image(bytes(bomb))


def test_formats_are_those_pillow_knows():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)
