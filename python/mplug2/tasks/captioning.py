"""Video and image captioning: what the decoder learns to write, and how captions are generated."""

from __future__ import annotations

import torch
from torch import Tensor

from mplug2.composition import Output, Parts
from mplug2.data.text import Tokenizer, clean_generated, training_string
from mplug2.generation import Hypothesis, beam_search, sample

TASKS = ("video-captioning", "image-captioning")


def loss(parts: Parts, tokenizer: Tokenizer, video: Tensor, captions: list[str], *, task: str | None = None) -> Output:
    """Mean cross-entropy of captions given video (B, 3, T, H, W).

    As the released weights were trained: the prompt is glued to the caption; its pieces but the last are no targets.
    """
    prompt = parts.config.prompt
    labels = tokenizer([training_string(c, prompt) for c in captions], max_length=parts.config.text.max_positions).ids
    prompt_length = len(tokenizer.encode(prompt)) - 1
    return parts(video=video, labels=labels.to(video.device), prompt_length=prompt_length, task=task)


def predict(
    parts: Parts,
    tokenizer: Tokenizer,
    video: Tensor,
    *,
    instruction: str | None = None,
    prompt: str = "",
    num_captions: int = 1,
    beam_size: int = 5,
    min_length: int = 4,
    max_length: int = 20,
    decoding: str = "released",
    sampling: dict | None = None,
    task: str | None = None,
) -> list[list[tuple[str, float]]]:
    """Captions and scores of every item of video (B, 3, T, H, W), best first.

    Args:
        instruction: text for parts composed with instruction=True.
        prompt: words every caption starts with; they are not part of the result.
        min_length, max_length: generated pieces, the end token included.
        decoding: "released", "standard" (see `beam_search`) or "sample".
        sampling: options of `generation.sample` for decoding "sample".
    """
    inputs = {}
    if instruction is not None:
        ids, mask = tokenizer([instruction] * len(video))
        inputs = {"text": ids.to(video.device), "text_mask": mask.to(video.device)}
    with torch.no_grad():
        context = parts.context(video=video, task=task, **inputs)
    lengths = {"min_length": min_length, "max_length": max_length}
    if decoding == "sample":
        found = sample(parts.decoder, context, num_samples=num_captions, **lengths, **(sampling or {}))
    else:
        prefix = torch.tensor([tokenizer.encode(prompt)] * len(video), device=video.device) if prompt else None
        lengths |= {"beam_size": max(beam_size, num_captions), "num_return": num_captions}
        found = beam_search(parts.decoder, context, prefix=prefix, decoding=decoding, **lengths)
    written = prompt or parts.config.prompt
    return [[(text_of(h, tokenizer, written), h.score) for h in hypotheses] for hypotheses in found]


def text_of(hypothesis: Hypothesis, tokenizer: Tokenizer, prompt: str = "") -> str:
    """The words of a hypothesis, without special tokens and without the prompt in front."""
    return clean_generated(tokenizer.decode(hypothesis.ids), prompt)
