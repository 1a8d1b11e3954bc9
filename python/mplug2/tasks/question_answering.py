"""Video and visual question answering: open answers by the decoder, or the likeliest of a closed list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mplug2.composition import Output, Parts
from mplug2.data.text import END, Tokenizer, clean_generated, pre_question
from mplug2.generation import beam_search, rank_answers

TASKS = ("video-qa", "visual-qa")


def loss(
    parts: Parts,
    tokenizer: Tokenizer,
    video: Tensor,
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    weights: Sequence[Sequence[float]] | None = None,
    task: str | None = None,
) -> Output:
    """sum(weight * summed cross-entropy of an answer) / B, for one or several answers to each of B questions.

    Questions are cut to 30 words; texts longer than the model's positions are cut there.
    """
    device, longest = video.device, parts.config.text.max_positions
    ids, mask = tokenizer([pre_question(q, 30) for q in questions], max_length=longest)
    labels = tokenizer([answer + END for group in answers for answer in group], max_length=longest).ids
    flat = [1.0] * len(labels) if weights is None else [w for group in weights for w in group]
    return parts(
        video=video,
        text=ids.to(device),
        text_mask=mask.to(device),
        labels=labels.to(device),
        label_counts=torch.tensor([len(group) for group in answers], device=device),
        label_weights=torch.tensor(flat, device=device, dtype=torch.promote_types(video.dtype, torch.float32)),
        task=task,
    )


@torch.no_grad()
def predict(
    parts: Parts,
    tokenizer: Tokenizer,
    visual: Tensor,
    questions: Sequence[str],
    *,
    answers: Sequence[str] | None = None,
    num_shortlisted: int = 128,
    beam_size: int = 5,
    min_length: int = 1,
    max_length: int = 10,
    decoding: str = "released",
    keep_after_end: bool = False,
    task: str | None = None,
) -> list[tuple[str, float]]:
    """An answer and its score for every question.

    Args:
        visual: tokens (B, K, D) of `Parts.encode_vision`, one row per question.
        questions: cut to 50 words and to the model's positions.
        answers: a closed list to choose from; the score is then the probability among those shortlisted. Default: any
            words.
        num_shortlisted: of a closed list, how many answers of likely first piece are compared whole.
        min_length, max_length: generated pieces, the end token included.
        keep_after_end: as the released evaluation, keep words that follow an end token.
    """
    ids, mask = tokenizer([pre_question(q) for q in questions], max_length=parts.config.text.max_positions)
    context = parts.context(visual=visual, text=ids.to(visual.device), text_mask=mask.to(visual.device), task=task)
    if answers is not None:
        labels = tokenizer([answer + END for answer in answers]).ids.to(visual.device)
        count = min(num_shortlisted, len(answers))
        index, probs = rank_answers(parts.decoder, context, labels, num_return=count)
        return [(answers[i], p) for i, p in zip(index[:, 0].tolist(), probs[:, 0].tolist(), strict=True)]
    found = beam_search(
        parts.decoder, context, beam_size=beam_size, min_length=min_length, max_length=max_length, decoding=decoding
    )
    return [
        (clean_generated(tokenizer.decode(best.ids), keep_after_end=keep_after_end), best.score) for best, *_ in found
    ]
