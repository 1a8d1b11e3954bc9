"""The demo: clips of clothes that nano has never seen are drawn, written as mp4, captioned and asked about.

`python -m mplug2.demo` prints every caption and answer beside the truth, the tally, and how long it took. The exit
status is 1 when fewer than 95 % of the motions or colors, or 75 % of the items, are named right.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mplug2 import create_model
from mplug2.data.clothes.folder import draw_file
from mplug2.data.clothes.pictures import BUNDLED, read_pictures
from mplug2.data.clothes.scripts import QUESTIONS, write_scripts
from mplug2.evaluation.accuracy import answer_accuracy, normalize_answer
from mplug2.evaluation.clothes import caption_accuracy
from mplug2.model import PACKAGED
from mplug2.weights.folder import WEIGHTS

NUM_CLIPS, SEED = 40, 2023
REQUIRED = {"motion": 0.95, "color": 0.95, "item": 0.75}


def main() -> int:
    """Run the demo; returns the exit status."""
    console = Console()
    is_trained = (PACKAGED / "nano" / WEIGHTS).is_file()
    started = time.monotonic()
    pictures = read_pictures(BUNDLED, "test")
    scripts = write_scripts(pictures, NUM_CLIPS, np.random.default_rng(SEED), "all")
    files = [draw_file(scripts[i : i + 1], pictures) for i in range(NUM_CLIPS)]
    drawn = time.monotonic()
    model = create_model("nano", random_weights=not is_trained)
    videos = torch.stack([model.read(file) for file in files])
    captions = model.caption(videos)
    answers = [model.answer(videos, question) for question in QUESTIONS]
    finished = time.monotonic()

    truths, expected = scripts.captions(), list(zip(*scripts.answers(), strict=True))
    table = Table("truth", "caption", *QUESTIONS, title=f"{NUM_CLIPS} mp4 clips of pictures kept out of training")
    for i, truth in enumerate(truths):
        row = [_mark(answers[q][i], expected[q][i]) for q in range(len(QUESTIONS))]
        table.add_row(truth, _mark(captions[i], truth), *row)
    console.print(table)

    shares = caption_accuracy(captions, truths)
    tally = Table("named right", "item", "color", "motion", title=f"of {NUM_CLIPS} clips")
    tally.add_row("by the caption", *(f"{shares[name].value:.1%}" for name in ("item", "color", "motion")))
    right = [answer_accuracy(*pair) for pair in zip(answers, expected, strict=True)]
    tally.add_row("by the answer", *(f"{share.value:.1%}" for share in right))
    console.print(tally)
    console.print(
        f"{drawn - started:.1f} s to draw and encode the clips, {finished - drawn:.1f} s to load the model, read the "
        f"clips, caption them and answer {len(QUESTIONS) * NUM_CLIPS} questions"
    )
    if not is_trained:
        console.print("The nano weights are not in this package: these captions come from random, untrained weights.")
        return 0
    named = {name: shares[name].value for name in REQUIRED}
    missed = [f"{name} {named[name]:.1%} < {least:.0%}" for name, least in REQUIRED.items() if named[name] < least]
    if missed:
        console.print(f"failed: {', '.join(missed)}")
    return 1 if missed else 0


def _mark(text: str, truth: str) -> Text:
    """The text, green where it equals the truth; elsewhere red, with a cross for those who see no colors."""
    text = normalize_answer(text)
    return Text(text, "green") if text == truth else Text(f"{text} ✗", "red")


if __name__ == "__main__":
    sys.exit(main())
