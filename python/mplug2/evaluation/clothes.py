"""What a caption of moving clothes gets right: item, color, motion, and direction along each axis of motion."""

from __future__ import annotations

from collections.abc import Sequence

from mplug2.data.clothes.scripts import MOTIONS, REVERSED, axis_of, parse_caption
from mplug2.evaluation.accuracy import Share


def caption_accuracy(captions: Sequence[str], truths: Sequence[str]) -> dict[str, Share]:
    """What captions name right.

    "item", "color", "motion", "all": of all clips. "axis": the motion or its reversal. For each pair of motions that
    are each other's reversal, "moves left / moves right" and so on, and for all of them as "direction": the right one
    of the two, of the clips that do either and whose caption names either; a coin would get half of them right.
    """
    named = [(parse_caption(c), parse_caption(t)) for c, t in zip(captions, truths, strict=True)]
    result = {name: Share.of_all(a[i] == t[i] for a, t in named) for i, name in enumerate(("item", "color", "motion"))}
    result["all"] = Share.of_all(a == t for a, t in named)
    result["axis"] = Share.of_all(axis_of(a[2]) == axis_of(t[2]) for a, t in named)
    pairs = [(MOTIONS[i], MOTIONS[other]) for i, other in enumerate(REVERSED) if other > i]
    for pair in pairs:
        result[" / ".join(pair)] = Share.of_all(a[2] == t[2] for a, t in named if {a[2], t[2]} <= set(pair))
    parts = [result[" / ".join(pair)] for pair in pairs]
    result["direction"] = Share(sum(part.right for part in parts), sum(part.of for part in parts))
    return result
