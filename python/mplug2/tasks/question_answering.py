"""Video and visual question answering: open answers by the decoder, or the likeliest of a closed list."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mplug2.composition import Output, Parts
from mplug2.data.text import END, Tokenizer, clean_generated, pre_question
from mplug2.generation import AnswerList, BeamSearch, decode_stream, rank_answers

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


def stream(
    parts: Parts,
    tokenizer: Tokenizer,
    pairs: Iterable[tuple[Tensor, str]],
    *,
    batch_size: int = 8,
    answers: Sequence[str] | None = None,
    ranking: str = "released",
    num_shortlisted: int = 128,
    beam_size: int = 5,
    min_length: int = 1,
    max_length: int = 10,
    decoding: str = "released",
    keep_after_end: bool = False,
    absorb: bool = False,
    task: str | None = None,
) -> Iterator[tuple[int, tuple[str, float]]]:
    """(number of a pair, (answer, score)), as the pairs finish, whatever their order.

    Args:
        pairs: tokens (K, D) of `Parts.encode_vision` and a question about them, taken when there is room. Questions are
            cut to 50 words and to the model's positions.
        batch_size: pairs worked on side by side.
        answers: a closed list to choose from; the score is then the probability among those compared. Default: any
            words.
        ranking: of a closed list, which answers are compared whole: "released", those of likely first piece; "exact",
            all (see `rank_answers`).
        num_shortlisted: of "released", how many.
        min_length, max_length: no end token among the first min_length pieces; pieces at most, end token included.
        keep_after_end: as the released evaluation, keep words that follow an end token.
        absorb: never make the keys and values of the context: less memory, more work a step. Not with `answers`.
    """
    contexts = _contexts(parts, tokenizer, pairs, batch_size, task)
    if answers is not None:
        if not answers:
            raise ValueError("question answering: the closed list of answers is empty; leave it out to allow any words")
        listed = AnswerList(tokenizer([answer + END for answer in answers]).ids)
        count = min(num_shortlisted, len(answers))
        return _ranked(parts, contexts, answers, listed, {"method": ranking, "num_return": count})
    search = BeamSearch(
        parts.decoder, beam_size=beam_size, min_length=min_length, max_length=max_length, decoding=decoding
    )
    items = (row for tokens, mask in contexts for row in zip(tokens, mask, strict=True))
    stream = decode_stream(parts.decoder, items, search, num_slots=batch_size, absorb=absorb)
    return (
        (item, (clean_generated(tokenizer.decode(best.ids), keep_after_end=keep_after_end), best.score))
        for item, (best, *_) in stream
    )


def predict(
    parts: Parts, tokenizer: Tokenizer, visual: Tensor, questions: Sequence[str], **options
) -> list[tuple[str, float]]:
    """An answer and its score for every row of visual (B, K, D) and its question; options: see `stream`."""
    pairs = zip(visual, questions, strict=True)
    found = dict(stream(parts, tokenizer, pairs, batch_size=max(1, len(visual)), **options))
    return [found[item] for item in range(len(visual))]


@torch.no_grad()
def _contexts(
    parts: Parts, tokenizer: Tokenizer, pairs: Iterable[tuple[Tensor, str]], batch_size: int, task: str | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Context tokens (B, K, D) and masks (B, K) of up to batch_size pairs; such of one shape share a batch."""

    def encoded(batch: list[tuple[Tensor, str]]) -> tuple[Tensor, Tensor]:
        visual = torch.stack([v for v, _ in batch])
        questions = [pre_question(q) for _, q in batch]
        ids, mask = tokenizer(questions, max_length=parts.config.text.max_positions)
        return parts.context_tokens(
            visual=visual, text=ids.to(visual.device), text_mask=mask.to(visual.device), task=task
        )

    batch: list[tuple[Tensor, str]] = []
    for visual, question in pairs:
        if batch and (len(batch) == batch_size or visual.shape != batch[0][0].shape):
            yield encoded(batch)
            batch = []
        batch.append((visual, question))
    if batch:
        yield encoded(batch)


@torch.no_grad()
def _ranked(
    parts: Parts,
    contexts: Iterable[tuple[Tensor, Tensor]],
    answers: Sequence[str],
    listed: AnswerList,
    options: dict,
) -> Iterator[tuple[int, tuple[str, float]]]:
    numbers = itertools.count()
    for tokens, mask in contexts:
        index, probs = rank_answers(parts.decoder, parts.decoder.project(tokens, mask), listed, **options)
        for best, prob in zip(index[:, 0].tolist(), probs[:, 0].tolist(), strict=True):
            yield next(numbers), (answers[best], prob)
