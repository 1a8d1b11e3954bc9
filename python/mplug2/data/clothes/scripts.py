"""What happens in a clip: an item of one color does one of eight things over a still background.

A script holds everything a clip is drawn from. Its path runs from a start to an end state; swapping the two is the
clip's time reversal, and both directions are drawn equally often, so a model blind to the order of frames can name the
axis of a motion but not its direction. One tenth of the (item, color, motion) triples, closed under reversal, is kept
out of training.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace

import numpy as np

from mplug2.data.clothes.pictures import ITEMS, Pictures

CANVAS = 128  # pixels, square
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
MOTIONS = (
    "moves left", "moves right", "moves up", "moves down", "grows", "shrinks", "spins", "stays still",
)  # fmt: skip
REVERSED = (1, 0, 3, 2, 5, 4, 6, 7)  # of each motion, the motion of the reversed clip
QUESTIONS = ("what is it?", "what color is it?", "what does it do?")

_AXES = (0, 0, 1, 1, 2, 2, 3, 4)  # of each motion: it shares an axis with its reversal only
_TRIPLES = np.array(list(itertools.product(range(len(ITEMS)), range(len(COLORS)), range(len(MOTIONS)))))
_UNTRAINED = (_TRIPLES[:, 0] + 3 * _TRIPLES[:, 1] + 7 * np.take(_AXES, _TRIPLES[:, 2])) % len(ITEMS) == 0
TRIPLES = {"all": _TRIPLES, "trained": _TRIPLES[~_UNTRAINED], "untrained": _TRIPLES[_UNTRAINED]}

_SMALL, _LARGE = 40.0, 64.0  # side of an item in pixels
_HUES = (0.0, 120.0, 225.0, 55.0, 285.0, 0.0)  # degrees, of each color
_SATURATIONS = (0.85, 0.8, 0.85, 0.85, 0.75, 0.0)
_GROUND = 8  # a background is _GROUND x _GROUND colors, interpolated


@dataclass(frozen=True)
class Scripts:
    """B clips. Field shapes start with B."""

    picture: np.ndarray  # index into Pictures
    mirrored: np.ndarray
    item: np.ndarray
    color: np.ndarray
    motion: np.ndarray
    num_frames: np.ndarray  # 16..48
    fps: np.ndarray  # 8..30
    crf: np.ndarray  # x264's constant rate factor, 18 (fine) .. 33 (coarse)
    path: np.ndarray  # (B, 2, 4): start and end of x, y, side (pixels) and angle (radians)
    tint: np.ndarray  # (B, 3) RGB in 0..1
    ground: np.ndarray  # (B, 3, 8, 8) RGB in 0..1

    def __len__(self) -> int:
        return len(self.picture)

    def __getitem__(self, index) -> Scripts:
        """Some of the clips, by slice, mask or array of indices."""
        return Scripts(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def reversed(self) -> Scripts:
        """The same clips played backwards."""
        return replace(self, motion=np.take(REVERSED, self.motion), path=self.path[:, ::-1])

    def _triples(self) -> list[tuple[int, int, int]]:
        return list(zip(self.item.tolist(), self.color.tolist(), self.motion.tolist(), strict=True))

    def captions(self) -> list[str]:
        return [f"a {COLORS[c]} {ITEMS[i]} {MOTIONS[m]}" for i, c, m in self._triples()]

    def still_captions(self) -> list[str]:
        """Captions of single frames: a picture does not move."""
        return [f"a {COLORS[c]} {ITEMS[i]}" for i, c, _ in self._triples()]

    def answers(self) -> list[tuple[str, str, str]]:
        """Of each clip, the answers to QUESTIONS."""
        return [(ITEMS[i], COLORS[c], MOTIONS[m]) for i, c, m in self._triples()]


def write_scripts(pictures: Pictures, count: int, rng: np.random.Generator, triples: str = "trained") -> Scripts:
    """Draw `count` scripts: a triple of TRIPLES[triples], then a picture of the item, a path, colors, a background."""
    item, color, motion = TRIPLES[triples][rng.integers(len(TRIPLES[triples]), size=count)].T
    by_item = np.argsort(pictures.items, kind="stable")
    counts = np.bincount(pictures.items, minlength=len(ITEMS))
    if not counts.all():
        raise ValueError(f"pictures: none of item {ITEMS[int(counts.argmin())]!r}; every item needs at least one")
    nth = np.floor(rng.random(count) * counts[item]).astype(np.int64)
    scripts = Scripts(
        picture=by_item[(np.cumsum(counts) - counts)[item] + nth],
        mirrored=rng.random(count) < 0.5,
        item=item,
        color=color,
        motion=np.minimum(motion, np.take(REVERSED, motion)),
        num_frames=rng.integers(16, 49, count),
        fps=rng.integers(8, 31, count),
        crf=rng.integers(18, 34, count),
        path=_paths(motion, rng),
        tint=_tints(color, rng),
        ground=_grounds(color, rng),
    )
    # Every path is drawn in one direction. The triple says which way it is played; a coin where both are one motion.
    backwards = np.where(np.take(REVERSED, motion) == motion, rng.random(count) < 0.5, scripts.motion != motion)
    path = np.where(backwards[:, None, None], scripts.path[:, ::-1], scripts.path)
    return replace(scripts, motion=motion, path=path)


def _paths(motion: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paths (B, 2, 4) of the first motion of each axis: leftwards, upwards, growing, spinning, resting."""
    axis, count = np.take(_AXES, motion), len(motion)
    side = rng.uniform(_SMALL, _LARGE, count)
    path = np.zeros((count, 2, 4))
    path[:, :, 2] = side[:, None]
    path[axis == 2, :, 2] = _SMALL, _LARGE
    room = CANVAS - path[:, :, 2].max(1)
    path[:, :, :2] = (path[:, :, 2].max(1) / 2 + rng.random((2, count)) * room).T[:, None]
    distance = rng.uniform(CANVAS / 3, room)
    low = (CANVAS - room) / 2 + rng.random(count) * (room - distance)
    for along in (0, 1):
        moves = axis == along
        path[moves, 0, along] = (low + distance)[moves]
        path[moves, 1, along] = low[moves]
    turn = rng.uniform(np.pi, 2 * np.pi, count) * rng.choice((-1, 1), count)
    path[:, 1, 3] = np.where(axis == 3, turn, 0.0)
    return path


def _tints(color: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    hue = np.take(_HUES, color) + rng.uniform(-8, 8, len(color))
    saturation = np.take(_SATURATIONS, color) * rng.uniform(0.9, 1.1, len(color))
    return _rgb(hue, saturation, rng.uniform(0.85, 1.0, len(color)))


def _grounds(color: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Backgrounds (B, 3, 8, 8): plain, a gradient or blurred noise, at least 50 degrees of hue away from the item."""
    count = len(color)
    shape = (count, _GROUND, _GROUND)
    at = np.linspace(-0.5, 0.5, _GROUND)
    slope = rng.uniform(-1, 1, (2, count, 1, 1))
    gradient = slope[0] * at + slope[1] * at[:, None]
    noise = rng.uniform(-0.5, 0.5, shape)
    kind = rng.integers(3, size=(count, 1, 1))
    shade = np.where(kind == 0, 0.0, np.where(kind == 1, gradient, noise))
    hue = np.take(_HUES, color) + rng.uniform(90, 270, count)
    saturation = rng.uniform(0.1, 0.6, count)
    value = rng.uniform(0.2, 0.6, count)
    each = np.broadcast_arrays(
        hue[:, None, None] + 80 * shade, saturation[:, None, None], value[:, None, None] * (1 + 0.6 * shade)
    )
    return np.moveaxis(_rgb(*each), -1, 1)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """RGB in 0..1, channels last, of hue in degrees, saturation and value in 0..1."""
    k = (np.array((5.0, 3.0, 1.0)) + hue[..., None] / 60) % 6
    saturation, value = np.clip(saturation, 0, 1)[..., None], value[..., None]
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def parse_caption(caption: str) -> tuple[str | None, str | None, str | None]:
    """Item, color and motion that a caption names, as `Scripts.captions` has them; None for what it does not name."""
    words = caption.lower().replace(" - ", "-").split()
    item = next((w for w in words if w in ITEMS), None)
    color = next((w for w in words if w in COLORS), None)
    motion = next((m for m in MOTIONS if " ".join(words).endswith(f" {m}")), None)
    return item, color, motion


def axis_of(motion: str | None) -> int | None:
    """Number of the axis that a motion shares with its reversal."""
    return _AXES[MOTIONS.index(motion)] if motion in MOTIONS else None
