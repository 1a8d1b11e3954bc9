"""Makes the small videos that tests read, by PyAV: every frame says its own number, so that a wrong frame is seen."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np

BITS = 10  # of the frame number, painted as a row of black and white blocks


def numbered_frame(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 (H, W, 3): the number as BITS blocks across the upper half, most significant first; red left and blue right
    below.
    """
    frame = np.zeros((height, width, 3), np.uint8)
    edges = np.linspace(0, width, BITS + 1).astype(int)
    for bit in range(BITS):
        if number >> (BITS - 1 - bit) & 1:
            frame[: height // 2, edges[bit] : edges[bit + 1]] = 255
    frame[height // 2 :, : width // 2, 0] = 255
    frame[height // 2 :, width // 2 :, 2] = 255
    return frame


def number_of(frame) -> int:
    """The number painted on a decoded frame of any size."""
    frame = np.asarray(frame)
    edges = np.linspace(0, frame.shape[1], BITS + 1)
    centres = ((edges[:-1] + edges[1:]) / 2).astype(int)
    row = frame[frame.shape[0] // 4, centres].mean(axis=-1) > 128
    return int("".join("1" if bit else "0" for bit in row), 2)


def make_video(
    num_frames: int = 60,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    height: int = 64,
    width: int = 96,
    fps: int = 25,
    pix_fmt: str = "yuv420p",
    keyframes: int = 12,
    b_frames: int = 2,
    times: list[float] | None = None,
    rotation: int = 0,
    start_time: float = 0.0,
    options: dict[str, str] | None = None,
) -> bytes:
    """A video of numbered frames. times: seconds of each frame, for variable frame rates; rotation: what the container
    asks for.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        if codec in ("libx264", "libx265"):
            options = {"preset": "ultrafast", "crf": "12", "bf": str(b_frames)} | (options or {})
        stream.options = options or {}
        stream.codec_context.gop_size = keyframes
        unit = Fraction(1, 1000) if times is not None or start_time else Fraction(1, fps)
        stream.time_base = stream.codec_context.time_base = unit
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, height, width), format="rgb24")
            frame.time_base = unit
            seconds = number / fps if times is None else times[number]
            frame.pts = round((seconds + start_time) / unit)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def make_audio(seconds: float = 1.0) -> bytes:
    """A file that holds sound and no pictures."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000, layout="mono")
        samples = np.zeros((1, int(8000 * seconds)), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def damage(content: bytes, *, share: float = 0.02, seed: int = 0, keep: int = 4096) -> bytes:
    """Overwrite a share of the bytes by noise, in runs of 64, sparing the first and the last `keep` bytes (the
    headers).
    """
    rng = np.random.default_rng(seed)
    noisy = np.frombuffer(content, np.uint8).copy()
    for at in rng.integers(keep, max(keep + 1, len(content) - keep - 64), int(share * len(content) / 64) + 1):
        noisy[at : at + 64] = rng.integers(0, 256, len(noisy[at : at + 64]), dtype=np.uint8)
    return noisy.tobytes()
