"""Batches to train on, drawn when they are needed: normalised video and the scripts it was drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mplug2.config import VisionConfig
from mplug2.data.clothes.drawing import draw
from mplug2.data.clothes.folder import draw_file
from mplug2.data.clothes.pictures import Pictures
from mplug2.data.clothes.scripts import CANVAS, Scripts, write_scripts
from mplug2.data.sampling import middle_indices
from mplug2.data.transform import CLIP_MEAN, CLIP_STD, Transform
from mplug2.data.video import read_video


@dataclass(frozen=True)
class Batch:
    """video: float32 (B, 3, T, H, W), normalised as a `Transform` does."""

    video: Tensor
    scripts: Scripts


def clips(
    pictures: Pictures, count: int, config: VisionConfig, rng: np.random.Generator, *, codec_share: float = 0.0
) -> Batch:
    """Whole clips as the model reads them: `middle` frames, resized to config.image_size.

    The first codec_share of them are written as h264 files in memory and read back; the others are drawn at once at the
    size that is needed, which skips the artefacts of compression and is faster.
    """
    scripts = write_scripts(pictures, count, rng)
    num_coded = round(codec_share * count)
    transform = Transform(config.image_size, "area")
    video = torch.empty(count, 3, config.num_frames, config.image_size, config.image_size)
    for i in range(num_coded):
        file = draw_file(scripts[i : i + 1], pictures)
        video[i] = transform.normalize(read_video(file, num_frames=config.num_frames, transform=transform))
    at = [np.array(middle_indices(0, n, config.num_frames)) / (n - 1) for n in scripts.num_frames[num_coded:]]
    if at:
        video[num_coded:] = normalize(draw(scripts[num_coded:], pictures, np.stack(at), size=config.image_size))
    return Batch(video, scripts)


def stills(pictures: Pictures, count: int, config: VisionConfig, rng: np.random.Generator) -> Batch:
    """Single frames (T = 1) of clips."""
    scripts = write_scripts(pictures, count, rng)
    return Batch(normalize(draw(scripts, pictures, rng.random((count, 1)), size=config.image_size)), scripts)


def crops(pictures: Pictures, count: int, config: VisionConfig, rng: np.random.Generator) -> Batch:
    """First or last frames of clips, cut out round the item: half a frame, and what its outer patches reach beyond."""
    scripts = write_scripts(pictures, count, rng)
    at = rng.integers(0, 2, (count, 1))
    state = np.where(at == 0, scripts.path[:, 0], scripts.path[:, 1])
    stride = config.patch_stride or config.patch_size
    size = config.image_size // 2 + config.patch_size - stride
    side = size * CANVAS / config.image_size
    corner = state[:, :2] - side / 2 + rng.uniform(-1, 1, (count, 2)) * CANVAS / 16
    window = np.concatenate((corner, np.full((count, 1), side)), 1)
    return Batch(normalize(draw(scripts, pictures, at.astype(float), size=size, window=window)), scripts)


def normalize(video: Tensor) -> Tensor:
    """Float RGB in 0..1, channels in dimension 1, with CLIP's mean and deviation taken out, in place."""
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return video.sub_(mean).div_(std)
