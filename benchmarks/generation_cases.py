"""Models, inputs, ways to write captions, checks and peak memory of the benchmarks of generation and ranking."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import baselines
import bench
import numpy as np
import torch
from torch import Tensor

from mplug2 import create_model
from mplug2.data.clothes.batches import clips
from mplug2.data.clothes.pictures import BUNDLED, read_pictures
from mplug2.generation import BeamSearch, Hypothesis, decode_stream
from mplug2.model import Model

END_SHIFT = 4.1  # bias of the random presets' end token in standard deviations of a logit: captions of 5 to 20 tokens
TOLERANCES = {"bfloat16": 3e-2, "float16": 1e-2, "float32": 1e-4}  # of states and scores, relative


def make_model(preset: str, dtype: str, device: str) -> Model:
    """nano with its weights; others at random from seed 0, the end token's bias raised (END_SHIFT).

    dtype "int8": linear layers of 8 bits, the rest bfloat16.
    """
    torch.manual_seed(0)
    is_random, quantize = preset != "nano", "int8" if dtype == "int8" else None
    kind = torch.bfloat16 if quantize else bench.DTYPES[dtype]
    model = create_model(
        preset, task="video-captioning", random_weights=is_random, dtype=kind, device=device, quantize=quantize
    )
    if is_random:
        decoder = model.parts.decoder
        # A logit is the product of a normalised state with a row drawn from N(0, 0.02).
        decoder.head.bias.data[decoder.end_id] = END_SHIFT * 0.02 * model.config.text.width**0.5
    return model


def is_slow(args) -> bool:
    """Do runs take so long that none is spared for warming up, and baselines run once?"""
    return args.preset != "nano" and args.device == "cpu"


def warming(args) -> dict[str, int]:
    """Of `bench.samples`: the check before it has run everything once."""
    return {"warm_ups": 0} if is_slow(args) else {}


def make_video(model: Model, count: int) -> Tensor:
    """(B, 3, T, H, W): drawn clips for nano, else noise from seed 0."""
    config, p = model.config.vision, next(model.parts.parameters())
    if model.config.name == "nano":
        video = clips(read_pictures(BUNDLED, "test"), count, config, np.random.default_rng(0)).video
    else:
        generator = torch.Generator().manual_seed(0)
        video = torch.randn(count, 3, config.num_frames, config.image_size, config.image_size, generator=generator)
    return video.to(p.device, p.dtype)


def make_tokens(model: Model, count: int) -> Tensor:
    """(B, K, D) visual tokens: of drawn clips for nano; else noise round a mean of the item's own, from seed 0."""
    if model.config.name == "nano":
        with torch.no_grad():
            return model.parts.encode_vision(make_video(model, count))
    vision, p = model.config.vision, next(model.parts.parameters())
    generator = torch.Generator().manual_seed(0)
    length, width = 1 + vision.num_frames * vision.grid_size**2, model.config.text.width
    tokens = torch.empty(count, length, width, device=p.device, dtype=p.dtype)
    for item in tokens:  # one at a time: float32 noise for all would be the largest tensor of the benchmark
        item.copy_(torch.randn(1, width, generator=generator) + torch.randn(length, width, generator=generator))
    return tokens


class Way:
    """One way to write captions: `encode` keeps the visual tokens, `decode` what is written."""

    def __init__(self, encode: Callable[[Tensor], Tensor], search: Callable[..., list[list[Hypothesis]]]):
        self._encode, self._search = encode, search
        self.tokens: Tensor | None = None
        self.found: list[list[Hypothesis]] = []

    def encode(self, video: Tensor) -> None:
        self.tokens = self._encode(video)

    def decode(self, lengths: tuple[int, int], tokens: Tensor | None = None) -> None:
        tokens = self.tokens if tokens is None else tokens
        self.found = self._search(tokens, beam_size=5, min_length=lengths[0], max_length=lengths[1])


def our_way(model: Model, *, cuda_graph: bool = False) -> Way:
    decoder = model.parts.decoder

    def search(tokens: Tensor, **options) -> list[list[Hypothesis]]:
        items = ((item, None) for item in tokens)
        search = BeamSearch(decoder, **options)
        found = dict(decode_stream(decoder, items, search, num_slots=len(tokens), cuda_graph=cuda_graph))
        return [found[item] for item in range(len(tokens))]

    return Way(model.parts.encode_vision, search)


def published_way(model: Model, *, compiled: bool) -> Way:
    encoder, decoder = baselines.PublishedEncoder(model.parts), baselines.PublishedDecoder(model.parts.decoder)
    if compiled:
        baselines.compile_layers(encoder, decoder)
    return Way(encoder, lambda tokens, **options: baselines.beam_search(decoder, tokens, **options))


def check_states(found: Tensor, expected: Tensor, dtype: str, name: str) -> None:
    """Raises where states differ by more than rounding."""
    error = ((found - expected).float().norm() / expected.float().norm()).item()
    if not error <= TOLERANCES[dtype]:
        raise SystemExit(f"{name}: differs from ours by {error:.1e} of its norm, more than {TOLERANCES[dtype]:.0e}")


@torch.no_grad()
def check_score(decoder: baselines.PublishedDecoder, tokens: Tensor, hypothesis: Hypothesis, dtype: str) -> None:
    """Raises where our hypothesis for the one item of `tokens` has another score by the baseline's decoder."""
    ids = torch.tensor([hypothesis.ids], device=tokens.device)
    log_p = decoder(ids[:, :-1], tokens)
    total = log_p.gather(2, ids[:, 1:, None]).sum().item()
    expected = total / ((5 + ids.shape[1] - 1) / 6) ** 0.6
    if not abs(hypothesis.score - expected) <= TOLERANCES[dtype] * abs(expected):
        raise SystemExit(f"ours scores {hypothesis.score:.5f} what the baseline scores {expected:.5f}: not timed")


def peak_of(*options: str) -> float:
    """Megabytes at the peak of this script run afresh with these options, the last line of which is the number."""
    done = subprocess.run([sys.executable, sys.argv[0], *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(options)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_peak(run: Callable[[], object], device: str) -> None:
    """Megabytes at the peak of `run`, weights included: resident on a CPU, allocated on a GPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated()
    else:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # what was resident before is no peak
        run()
        status = Path("/proc/self/status").read_text()
        peak = 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])
    print(json.dumps(peak / 1e6))
