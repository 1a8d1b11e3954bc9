"""Accuracies: of answers, and of what a caption of moving clothes says about item, color and motion."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SPACED_HYPHEN = re.compile(r"\s*-\s*")


def normalize_answer(text: str) -> str:
    """Lower case, single spaces, none round hyphens: word pieces leave "t - shirt" behind."""
    return _SPACED_HYPHEN.sub("-", " ".join(text.lower().split()))


def answer_accuracy(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Share of answers that equal their truth after `normalize_answer`."""
    pairs = zip(answers, truths, strict=True)
    return sum(normalize_answer(a) == normalize_answer(t) for a, t in pairs) / len(truths)
