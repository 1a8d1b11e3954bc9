"""Video and image captioning: what the decoder learns to write, and how captions are generated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mplug2.composition import Output, Parts
from mplug2.data.text import Tokenizer, clean_generated, training_string
from mplug2.generation import BeamSearch, Sampling, decode_stream

TASKS = ("video-captioning", "image-captioning")


def loss(
    parts: Parts,
    tokenizer: Tokenizer,
    video: Tensor,
    captions: list[str],
    *,
    glued: bool = True,
    task: str | None = None,
) -> Output:
    """Mean cross-entropy of captions given video (B, 3, T, H, W).

    glued: prompt and caption are joined without a space, as the released weights were trained. The prompt's pieces but
    the last are no targets.
    """
    prompt = parts.config.prompt
    texts = [training_string(caption, prompt, glued=glued) for caption in captions]
    labels = tokenizer(texts, max_length=parts.config.text.max_positions).ids
    prompt_length = len(tokenizer.encode(prompt)) - 1
    return parts(video=video, labels=labels.to(video.device), prompt_length=prompt_length, task=task)


def stream(
    parts: Parts,
    tokenizer: Tokenizer,
    visuals: Iterable[Tensor],
    *,
    batch_size: int = 8,
    instruction: str | None = None,
    prompt: str = "",
    num_captions: int = 1,
    beam_size: int = 5,
    min_length: int = 4,
    max_length: int = 20,
    decoding: str = "released",
    sampling: dict | None = None,
    keep_after_end: bool = False,
    absorb: bool = False,
    task: str | None = None,
) -> Iterator[tuple[int, list[tuple[str, float]]]]:
    """(number of an item, its captions and their scores, best first), as the items finish, whatever their order.

    Args:
        visuals: tokens (K, D) of `Parts.encode_vision`, an item each, taken when there is room.
        batch_size: items decoded side by side.
        instruction: text for parts composed with instruction=True; cut to the model's positions.
        prompt: words every caption starts with; they are not part of the result.
        min_length, max_length: no end token among the first min_length pieces; pieces at most, end token included.
        decoding: "released", "standard" (see `BeamSearch`) or "sample".
        sampling: options of `generation.Sampling`, for decoding "sample" alone.
        keep_after_end: as the released evaluation, keep words that follow an end token.
        absorb: never make the keys and values of the visual tokens: less memory, more work a step.
    """
    if sampling and decoding != "sample":
        raise ValueError(f"captioning: sampling options go with decoding='sample', got decoding={decoding!r}")
    inputs = {}
    if instruction is not None:
        ids, mask = tokenizer([instruction], max_length=parts.config.text.max_positions)
        inputs = {"text": ids, "text_mask": mask}
    prefix = torch.tensor(tokenizer.encode(prompt)) if prompt else None
    options = {"min_length": min_length, "max_length": max_length, "prefix": prefix}
    if decoding == "sample":
        search = Sampling(parts.decoder, num_samples=num_captions, **options, **(sampling or {}))
    else:
        beams = {"beam_size": max(beam_size, num_captions), "num_return": num_captions, "decoding": decoding}
        search = BeamSearch(parts.decoder, **beams, **options)

    def context(visual: Tensor) -> tuple[Tensor, Tensor | None]:
        here = {name: t.to(visual.device) for name, t in inputs.items()}
        tokens, mask = parts.context_tokens(visual=visual[None], task=task, **here)
        return tokens[0], None if mask is None else mask[0]

    def text(ids: list[int]) -> str:
        written = tokenizer.decode(ids[search.prefix_length :] if prompt else ids)
        written = written.removeprefix("##")  # glued to the prompt that is left out
        return clean_generated(written, parts.config.prompt, keep_after_end=keep_after_end)

    stream = decode_stream(parts.decoder, map(context, visuals), search, num_slots=batch_size, absorb=absorb)
    return ((item, [(text(h.ids), h.score) for h in found]) for item, found in stream)


def predict(parts: Parts, tokenizer: Tokenizer, visual: Tensor, **options) -> list[list[tuple[str, float]]]:
    """Captions and scores of every item of visual (B, K, D), best first; options: see `stream`."""
    found = dict(stream(parts, tokenizer, visual, batch_size=max(1, len(visual)), **options))
    return [found[item] for item in range(len(visual))]
