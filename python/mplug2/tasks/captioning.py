"""Video and image captioning: what the decoder learns to write, and how captions are generated."""

from __future__ import annotations

import torch
from torch import Tensor

from mplug2.composition import Output, Parts
from mplug2.data.text import Tokenizer, clean_generated, training_string
from mplug2.generation import beam_search, sample

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


@torch.no_grad()
def predict(
    parts: Parts,
    tokenizer: Tokenizer,
    visual: Tensor,
    *,
    instruction: str | None = None,
    prompt: str = "",
    num_captions: int = 1,
    beam_size: int = 5,
    min_length: int = 4,
    max_length: int = 20,
    decoding: str = "released",
    sampling: dict | None = None,
    keep_after_end: bool = False,
    task: str | None = None,
) -> list[list[tuple[str, float]]]:
    """Captions and scores of every item, best first.

    Args:
        visual: tokens (B, K, D) of `Parts.encode_vision`.
        instruction: text for parts composed with instruction=True; cut to the model's positions.
        prompt: words every caption starts with; they are not part of the result.
        min_length, max_length: generated pieces, the end token included.
        decoding: "released", "standard" (see `beam_search`) or "sample".
        sampling: options of `generation.sample`, for decoding "sample" alone.
        keep_after_end: as the released evaluation, keep words that follow an end token.
    """
    if sampling and decoding != "sample":
        raise ValueError(f"captioning: sampling options go with decoding='sample', got decoding={decoding!r}")
    device, inputs = visual.device, {}
    if instruction is not None:
        ids, mask = tokenizer([instruction] * len(visual), max_length=parts.config.text.max_positions)
        inputs = {"text": ids.to(device), "text_mask": mask.to(device)}
    context = parts.context(visual=visual, task=task, **inputs)
    prefix = torch.tensor([tokenizer.encode(prompt)] * len(visual), device=device) if prompt else None
    options = {"min_length": min_length, "max_length": max_length, "prefix": prefix}
    if decoding == "sample":
        found = sample(parts.decoder, context, num_samples=num_captions, **options, **(sampling or {}))
    else:
        options |= {"beam_size": max(beam_size, num_captions), "num_return": num_captions}
        found = beam_search(parts.decoder, context, decoding=decoding, **options)
    forced = prefix.shape[1] if prompt else 0

    def text(ids: list[int]) -> str:
        written = tokenizer.decode(ids[forced:]).removeprefix("##")  # glued to the prompt that is left out
        return clean_generated(written, parts.config.prompt, keep_after_end=keep_after_end)

    return [[(text(h.ids), h.score) for h in hypotheses] for hypotheses in found]
