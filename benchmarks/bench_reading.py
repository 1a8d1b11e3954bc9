"""Reading 16 frames of 10 seconds of 720p h264 at 224 px: CPU milliseconds of `read_clip` and of decoding every frame.

    python benchmarks/bench_reading.py [VIDEO ...]

Clips with a keyframe every 12, 30 and 250 frames are drawn first; videos named on the command line are read too.
"""

import io
import platform
import statistics
import sys
import time
from collections.abc import Callable

import av
import numpy as np
import torch

from mplug2.data import Transform, read_clip

REPEATS = 5


def draw_clip(keyframes: int, num_frames: int = 250) -> bytes:
    """A camera that moves over a mosaic with fine noise."""
    rng = np.random.default_rng(0)
    mosaic = np.kron(rng.integers(0, 128, (60, 100, 3)), np.ones((16, 16, 1), np.int64))
    scene = (mosaic + rng.integers(20, 60, mosaic.shape)).astype(np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        stream.codec_context.gop_size = keyframes
        for i in range(num_frames):
            y, x = int(100 + 90 * np.sin(i / 20)), int(120 + 100 * np.cos(i / 33))
            frame = np.ascontiguousarray(scene[y : y + 720, x : x + 1280])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


def decode_all(source: str | bytes) -> None:
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else source) as container:
        container.streams.video[0].thread_type = "NONE"
        for _ in container.decode(video=0):
            pass


def cpu_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        begun = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - begun))
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, PyAV {av.__version__}, torch {torch.__version__}, one thread")
    print(f"{'clip':32}{'decode all, ms':>16}{'read_clip, ms':>16}")
    sources = {f"drawn, a keyframe every {k}": draw_clip(k) for k in (12, 30, 250)}
    transform = Transform(224)
    for name, source in {**sources, **{path: path for path in sys.argv[1:]}}.items():
        everything = cpu_ms(lambda source=source: decode_all(source))
        clip = cpu_ms(lambda source=source: read_clip(source, num_frames=16, transform=transform))
        print(f"{name[-31:]:32}{everything:16.0f}{clip:16.0f}")
    print(f"repeat: python {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
