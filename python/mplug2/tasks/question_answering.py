"""Video and visual question answering: open answers by the decoder, or the likeliest of a closed list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mplug2.composition import Output, Parts
from mplug2.data.text import Tokenizer, pre_question
from mplug2.generation import beam_search, rank_answers
from mplug2.modules.decoder import Context
from mplug2.tasks.captioning import text_of

TASKS = ("video-qa", "visual-qa")
END = "[SEP]"


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
    """sum(weight * summed cross-entropy of an answer) / B, for one or several answers to each of B questions."""
    device = video.device
    ids, mask = tokenizer([pre_question(q, 30) for q in questions])
    labels = tokenizer([answer + END for group in answers for answer in group]).ids
    flat = [1.0] * len(labels) if weights is None else [w for group in weights for w in group]
    return parts(
        video=video,
        text=ids.to(device),
        text_mask=mask.to(device),
        labels=labels.to(device),
        label_counts=torch.tensor([len(group) for group in answers], device=device),
        label_weights=torch.tensor(flat, device=device, dtype=video.dtype),
        task=task,
    )


def predict(
    parts: Parts,
    tokenizer: Tokenizer,
    video: Tensor,
    questions: Sequence[str],
    *,
    answers: Sequence[str] | None = None,
    beam_size: int = 5,
    min_length: int = 1,
    max_length: int = 10,
    decoding: str = "released",
    task: str | None = None,
) -> list[tuple[str, float]]:
    """An answer and its score for every question about video (B, 3, T, H, W).

    Args:
        answers: a closed list to choose from; the score is then the probability among them. Default: any words.
        min_length, max_length: generated pieces, the end token included.
    """
    context = read_question(parts, tokenizer, video, questions, task=task)
    if answers is not None:
        labels = tokenizer([answer + END for answer in answers]).ids.to(video.device)
        index, probs = rank_answers(parts.decoder, context, labels, num_return=len(answers))
        return [(answers[i], p) for i, p in zip(index[:, 0].tolist(), probs[:, 0].tolist(), strict=True)]
    found = beam_search(
        parts.decoder, context, beam_size=beam_size, min_length=min_length, max_length=max_length, decoding=decoding
    )
    return [(text_of(hypotheses[0], tokenizer), hypotheses[0].score) for hypotheses in found]


@torch.no_grad()
def read_question(
    parts: Parts, tokenizer: Tokenizer, video: Tensor, questions: Sequence[str], *, task: str | None = None
) -> Context:
    """The decoder's context for questions about videos: [visual tokens; fused question]."""
    if len(questions) != len(video):
        raise ValueError(f"need one question per video, got {len(questions)} questions and {len(video)} videos")
    ids, mask = tokenizer([pre_question(q) for q in questions])
    return parts.context(video=video, text=ids.to(video.device), text_mask=mask.to(video.device), task=task)
