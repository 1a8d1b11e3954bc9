"""What a caption of moving clothes gets right: item, color, motion, and direction along each axis of motion."""

from __future__ import annotations

from collections.abc import Sequence

from mplug2.data.clothes.scripts import MOTIONS, REVERSED, axis_of, parse_caption


def caption_accuracy(captions: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """Shares in 0..1 over pairs of captions.

    "item", "color", "motion", "all": named right. "axis": the motion or its reversal. For each pair of motions that are
    each other's reversal, "moves left / moves right" and so on: the right one of the two, among clips that do either.
    """
    named = [(parse_caption(c), parse_caption(t)) for c, t in zip(captions, truths, strict=True)]
    result = {name: _share(a[i] == t[i] for a, t in named) for i, name in enumerate(("item", "color", "motion"))}
    result["all"] = _share(a == t for a, t in named)
    result["axis"] = _share(axis_of(a[2]) == axis_of(t[2]) for a, t in named)
    for index, motion in enumerate(MOTIONS):
        if REVERSED[index] > index:
            pair = motion, MOTIONS[REVERSED[index]]
            right = [a[2] == t[2] for a, t in named if t[2] in pair]
            if right:
                result[" / ".join(pair)] = _share(right)
    return result


def _share(right) -> float:
    right = list(right)
    return sum(right) / len(right)
