"""Pictures by Pillow, as one frame of uint8 RGB."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mplug2.data.source import MediaError, Source, open_source

# Formats with a signature and a decoder of their own. EPS and WMF are left out: they run other programs.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
# What Pillow raises on damaged files, beside its own UnidentifiedImageError (an OSError).
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, IndexError, struct.error)
_DAMAGE += (Image.DecompressionBombError,)


def read_image(source: str | os.PathLike | bytes | BinaryIO) -> Tensor:
    """Read a picture: uint8 (1, H, W, 3), the first frame of an animation.

    Turned upright by its EXIF orientation; transparency over white; 16-bit greys scaled to 8 bits; CMYK, palettes and
    greys to RGB.

    MediaError where it is not a picture, is damaged, is of a kind not known, or claims absurd sizes.
    """
    source = open_source(source)
    try:
        with _opened(source) as picture:
            rgb = _to_rgb(ImageOps.exif_transpose(picture))
            return torch.from_numpy(np.array(rgb)).unsqueeze(0)
    except Image.UnidentifiedImageError:
        raise MediaError(source.name, f"is not a picture; expected one of {', '.join(FORMATS)}") from None
    except _DAMAGE as e:
        raise MediaError(source.name, f"cannot be decoded ({e}); save it again or leave it out") from None


def is_still(source: Source) -> bool:
    """Whether a source is a picture, by its content. An animated GIF is not: it is read as a video."""
    try:
        with _opened(source) as picture:
            return picture.format != "GIF" or not picture.is_animated
    except Image.UnidentifiedImageError:
        return False
    except _DAMAGE:  # begins as a picture does: read_image says what is wrong with it
        return True


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        # Broken metadata and large pictures are read all the same; absurd sizes are errors without this.
        warnings.simplefilter("ignore")
        with source.opened() as file, Image.open(file, formats=FORMATS) as picture:
            yield picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits, which Pillow holds in I;16 or in 32-bit I
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its values leave 0..65535; convert it to 8 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its values are floating-point; convert it to 8 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")
