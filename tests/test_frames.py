"""Resizing and normalising of frames: golden numbers, torch's own rounding, exact arithmetic."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mplug2 import _frames
from mplug2.data.transform import Transform, resized_crop


@pytest.fixture(scope="module")
def golden(parity_dir):
    return json.loads((parity_dir / "video_transform.json").read_text()), load_file(
        parity_dir / "video_transform.safetensors"
    )


def frames_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_evaluation_transform_equals_golden(golden):
    case, tensors = golden
    for i, clip in enumerate(case["clips"]):
        transform = Transform(clip["res"], mean=case["mean"], std=case["std"])
        frames = tensors[f"input.clip{i}"]
        assert torch.equal(transform.resize(frames), tensors[f"out.resized{i}"])
        assert torch.equal(transform(frames), tensors[f"out.eval{i}"])


def test_crops_equal_golden(golden):
    case, tensors = golden
    for i, crop in enumerate(case["crops"]):
        box = (crop["top"], crop["left"], crop["height"], crop["width"])
        result = resized_crop(tensors["input.clip0"], box, crop["size"])
        assert torch.equal(result, tensors[f"out.crop{i}"].long())
        assert (result.min(), result.max()) == (crop["min"], crop["max"])


def test_nearest_rounds_as_torch_does_at_every_size():
    for size_in in (*range(1, 70), 97, 240, 641, 1080, 1920):
        row = (torch.arange(size_in) % 251).to(torch.uint8).view(1, 1, -1, 1).expand(1, 1, -1, 3)
        for size_out in (1, 7, 24, 63, 64, 224):
            expected = F.interpolate(row[..., 0].float(), size=size_out, mode="nearest").byte()
            result = Transform(size_out).resize(row)
            assert torch.equal(result[0, :, :, 0], expected[0].expand(size_out, -1)), (size_in, size_out)


@pytest.mark.parametrize("shape", [(7, 5), (12, 30), (3, 4), (1, 1), (9, 27)])
@pytest.mark.parametrize("size", [1, 4, 6, 9])
def test_area_is_the_exact_mean_of_what_a_pixel_covers(shape, size):
    frame = frames_of(1, *shape)
    result = Transform(size, "area").resize(frame)[0]

    def shares(length: int, i: int) -> list[Fraction]:
        begin, end = Fraction(i * length, size), Fraction((i + 1) * length, size)
        return [max(Fraction(0), min(end, Fraction(j + 1)) - max(begin, Fraction(j))) for j in range(length)]

    for y in range(size):
        for x in range(size):
            weights = np.outer(shares(shape[0], y), shares(shape[1], x))
            mean = (weights[..., None] * frame[0].numpy().astype(object)).sum((0, 1)) / weights.sum()
            assert result[y, x].tolist() == [int(m + Fraction(1, 2)) for m in mean]


def test_area_of_whole_blocks_is_their_mean():
    frames = frames_of(2, 128, 128)
    blocks = F.avg_pool2d(frames.permute(0, 3, 1, 2).double(), 2).permute(0, 2, 3, 1)
    assert torch.equal(Transform(64, "area").resize(frames), (blocks + 0.5).floor().byte())


@pytest.mark.parametrize("resize", ["nearest", "area"])
def test_resizing_twice_changes_nothing_and_views_are_read_as_they_are(resize):
    frames = frames_of(3, 40, 60)
    transform = Transform(24, resize)
    once = transform.resize(frames)
    assert torch.equal(transform.resize(once), once)
    assert torch.equal(transform(once), transform(frames))
    wide = frames_of(3, 40, 90)
    wide[:, :, 10:70] = frames
    assert torch.equal(transform.resize(wide[:, :, 10:70]), once)
    assert torch.equal(transform.resize(frames.numpy()), once)


def test_module_reads_rows_with_gaps_and_refuses_what_it_cannot_fill():
    wide = frames_of(40, 90).numpy()
    out = np.zeros((24, 24, 3), np.uint8)
    _frames.resize(wide[:, 10:70], out, "nearest")
    assert np.array_equal(out, Transform(24).resize(wide[None, :, 10:70])[0].numpy())
    for picture, target, mode in (
        (wide[..., ::-1], out, "nearest"),
        (wide[:0], out, "nearest"),
        (wide, out[:, ::2], "nearest"),
        (wide, out[:, :12], "area"),
        (wide, out, "cubic"),
    ):
        with pytest.raises(ValueError, match=r"^resize: "):
            _frames.resize(picture, target, mode)
    with pytest.raises(TypeError):
        _frames.resize(wide.astype(np.float32), out, "nearest")


def test_transform_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\], got torch.float32 \[1, 4, 4, 3\]"):
        Transform(4)(torch.zeros(1, 4, 4, 3))
    with pytest.raises(ValueError, match=r"got torch.uint8 \[3, 1, 4, 4\]"):
        Transform(4)(torch.zeros(3, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="nearest, area, got 'cubic'"):
        Transform(4, "cubic")
    with pytest.raises(ValueError, match="at least one pixel"):
        Transform(4).resize(torch.zeros(1, 0, 4, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="leaves frames of 10 x 12"):
        resized_crop(frames_of(1, 10, 12), (2, 0, 9, 12), 4)


def test_no_frames_stay_no_frames():
    assert Transform(8)(torch.zeros(0, 4, 4, 3, dtype=torch.uint8)).shape == (3, 0, 8, 8)
