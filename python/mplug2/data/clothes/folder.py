"""Clips as mp4 files, and a folder of them with captions, questions and answers: what `mplug2 evaluate` reads."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np

from mplug2.data.clothes.drawing import draw
from mplug2.data.clothes.pictures import Pictures, read_pictures
from mplug2.data.clothes.scripts import QUESTIONS, TRIPLES, Scripts, write_scripts

CAPTIONS, ANSWERS = "captions.jsonl", "answers.jsonl"


def draw_file(script: Scripts, pictures: Pictures) -> bytes:
    """One clip, drawn whole and encoded: an h264 mp4 file of the script's frames, rate and quality."""
    if len(script) != 1:
        raise ValueError(f"draw_file: expected the script of one clip, got {len(script)}")
    at = np.linspace(0, 1, int(script.num_frames[0]))[None]
    frames = draw(script, pictures, at)[0].permute(1, 2, 3, 0)
    return encode(frames.mul(255).round().byte().numpy(), fps=int(script.fps[0]), crf=int(script.crf[0]))


def encode(frames: np.ndarray, *, fps: int, crf: int) -> bytes:
    """Frames (T, H, W, 3) uint8 with even H and W -> an h264 mp4 file, the same bytes each time."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=fps, options={"crf": str(crf), "preset": "veryfast", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_folder(
    out: str | Path, pictures: str | Path, *, split: str = "test", triples: str = "all", num_clips: int, seed: int = 0
) -> None:
    """Write num_clips clips of one split of `pictures` (a folder of idx files) into the new folder `out`.

    0000.mp4, ...; captions.jsonl with one {"video", "caption"} a clip; answers.jsonl with three {"video", "question",
    "answer"} a clip. triples: "all", "trained" or "untrained".
    """
    out = Path(out)
    if triples not in TRIPLES:
        raise ValueError(f"triples must be one of {', '.join(TRIPLES)}, got {triples!r}")
    drawn_from = read_pictures(pictures, split)
    scripts = write_scripts(drawn_from, num_clips, np.random.default_rng(seed), triples)
    out.mkdir(parents=True)
    captions, answers = [], []
    for i, (caption, truths) in enumerate(zip(scripts.captions(), scripts.answers(), strict=True)):
        name = f"{i:04d}.mp4"
        (out / name).write_bytes(draw_file(scripts[i : i + 1], drawn_from))
        captions.append({"video": name, "caption": caption})
        answers += [{"video": name, "question": q, "answer": a} for q, a in zip(QUESTIONS, truths, strict=True)]
    for file, lines in ((CAPTIONS, captions), (ANSWERS, answers)):
        (out / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
