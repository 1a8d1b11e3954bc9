"""Accuracies: of answers, and of what a caption of moving clothes says about item, color and motion."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SPACED_HYPHEN = re.compile(r"\s*-\s*")


@dataclass(frozen=True)
class Share:
    """`right` of `of` things were right."""

    right: int
    of: int

    @classmethod
    def of_all(cls, hits: Iterable[bool]) -> Share:
        hits = list(hits)
        return cls(sum(hits), len(hits))

    @property
    def value(self) -> float:
        """Share in 0..1; NaN of nothing."""
        return self.right / self.of if self.of else float("nan")


def normalize_answer(text: str) -> str:
    """Lower case, single spaces, none round hyphens: word pieces leave "t - shirt" behind."""
    return _SPACED_HYPHEN.sub("-", " ".join(text.lower().split()))


def answer_accuracy(answers: Sequence[str], truths: Sequence[str]) -> Share:
    """Answers that equal their truth after `normalize_answer`."""
    pairs = zip(answers, truths, strict=True)
    return Share.of_all(normalize_answer(a) == normalize_answer(t) for a, t in pairs)
