"""The loop of a run over many files: items not yet done -> frames -> the model -> one line each, in no order."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from mplug2.inference.features import FeaturesFile
from mplug2.inference.reading import Reader
from mplug2.inference.results import ResultsFile
from mplug2.inference.sources import Item
from mplug2.model import Model
from mplug2.tasks import captioning, question_answering

Clip = tuple[Item, Tensor]  # frames uint8 (T, size, size, 3)
Row = tuple[Item, str | None, dict]  # an item, the question asked about it, and what was found, or {"error"}
NOT_FINITE = {"error": "the model's numbers are not finite; float16 may overflow where float32 and bfloat16 do not"}


class Work(Protocol):
    """What a model does with clips, taken as they are needed: rows as they are ready, in any order.

    asks: whether it reads an item's questions; else an item has one row, whatever it is asked.
    """

    asks: ClassVar[bool]

    def __call__(self, model: Model, clips: Iterable[Clip], batch_size: int) -> Iterator[Row]: ...


@dataclass(frozen=True)
class Captioning:
    """{"caption", "score"} of every file; {"captions", "scores"}, best first, where num_captions > 1.

    options: see `tasks.captioning.stream`.
    """

    asks = False
    num_captions: int = 1
    options: dict = field(default_factory=dict)

    def __call__(self, model: Model, clips: Iterable[Clip], batch_size: int) -> Iterator[Row]:
        arrived = _Arrived()
        visuals = arrived.watch(_encoded(model, clips, batch_size))
        options = {"num_captions": self.num_captions, "task": model.first_task(captioning.TASKS), **self.options}
        for number, found in captioning.stream(model.parts, model.tokenizer, visuals, batch_size=batch_size, **options):
            texts, scores = ([*column] for column in zip(*found, strict=True))
            several = {"captions": texts, "scores": scores}
            row = several if len(found) > 1 else {"caption": texts[0], "score": scores[0]}
            yield arrived.pop(number), None, row if all(map(math.isfinite, scores)) else NOT_FINITE


@dataclass(frozen=True)
class Answering:
    """{"question", "answer", "score"} of every question of every file; options: `tasks.question_answering.stream`."""

    asks = True
    options: dict = field(default_factory=dict)

    def __call__(self, model: Model, clips: Iterable[Clip], batch_size: int) -> Iterator[Row]:
        arrived = _Arrived()
        encoded = _encoded(model, clips, batch_size)
        asked = (((item, question), (visual, question)) for item, visual in encoded for question in item.questions)
        for number, (answer, score) in question_answering.stream(
            model.parts, model.tokenizer, arrived.watch(asked), batch_size=batch_size,
            task=model.first_task(question_answering.TASKS), **self.options,
        ):  # fmt: skip
            item, question = arrived.pop(number)
            yield item, question, {"answer": answer, "score": score} if math.isfinite(score) else NOT_FINITE


@dataclass(frozen=True)
class Embedding:
    """{"row"} of every file: where its pooled features are in `features`. normalize: to unit length."""

    asks = False
    features: FeaturesFile
    normalize: bool = False

    def __call__(self, model: Model, clips: Iterable[Clip], batch_size: int) -> Iterator[Row]:
        for item, visual in _encoded(model, clips, batch_size):
            pooled = torch.nn.functional.normalize(visual[0], dim=-1) if self.normalize else visual[0]
            row = pooled.float().cpu().numpy()
            yield item, None, {"row": self.features.append(row)} if np.isfinite(row).all() else NOT_FINITE


@dataclass(frozen=True)
class Summary:
    """What a run's file holds at its end, and what this run did in `seconds`: lines it added, and of them errors."""

    num_good: int
    num_bad: int
    num_added: int
    seconds: float

    def __str__(self) -> str:
        earlier = self.num_good + self.num_bad - self.num_added
        before = f", {earlier} of them from before" if earlier else ""
        rate = self.num_added / self.seconds
        return (
            f"{self.num_good} done, {self.num_bad} bad{before}; {self.num_added} in {self.seconds:.1f} s, {rate:.1f}/s"
        )


def run(
    model: Model,
    items: Iterable[Item],
    work: Work,
    results: ResultsFile,
    *,
    num_workers: int | None = None,
    batch_size: int = 8,
    timeout: float = 120.0,
    on_line: Callable[[ResultsFile], None] | None = None,
) -> Summary:
    """Do `work` for every item (and question) that `results` does not hold; one line each, errors among them.

    Reading overlaps with the model's work; what is held at a time is bounded by num_workers and batch_size.

    Args:
        num_workers: decoding processes. Default: one for each core this process may use.
        timeout: seconds after which reading a file counts as hung.
        on_line: called after every line.

    Raises:
        ValueError, OSError: a source, an option or the results' file does not fit. What is written stays.
    """
    started = time.monotonic()
    num_workers = num_workers or len(os.sched_getaffinity(0))
    report = on_line or (lambda _: None)
    asked = items if work.asks else (replace(item, questions=()) for item in items)
    reader = Reader(
        _unclaimed(asked, results), model.transform, num_frames=model.config.vision.num_frames,
        num_workers=num_workers, ahead=2 * batch_size, timeout=timeout,
    )  # fmt: skip

    def readable() -> Iterator[Clip]:
        for item, frames in reader:
            if isinstance(frames, Tensor):
                yield item, frames
                continue
            for question in item.questions or (None,):
                results.write(item.name, question, error=frames)
                report(results)

    with reader:
        for item, question, found in work(model, readable(), batch_size):
            if "error" in found:
                found = {"error": f"{item.name}: {found['error']}"}
            results.write(item.name, question, **found)
            report(results)
    num_added = results.num_good + results.num_bad - results.num_before
    return Summary(results.num_good, results.num_bad, num_added, time.monotonic() - started)


def _unclaimed(items: Iterable[Item], results: ResultsFile) -> Iterator[Item]:
    for item in items:
        if not item.questions and results.claim(item.name):
            yield item
        elif item.questions and (left := tuple(q for q in item.questions if results.claim(item.name, q))):
            yield replace(item, questions=left)


def _encoded(model: Model, clips: Iterable[Clip], batch_size: int) -> Iterator[tuple[Item, Tensor]]:
    arrived = _Arrived()
    for number, visual in model.encode_each(arrived.watch(clips), batch_size):
        yield arrived.pop(number), visual


class _Arrived:
    """Whose the things are that go into a stream: its results name them by their number alone."""

    def __init__(self) -> None:
        self._owners: dict[int, object] = {}
        self._count = 0

    def watch(self, pairs: Iterable[tuple]) -> Iterator:
        """The second of every (owner, thing)."""
        for owner, thing in pairs:
            self._owners[self._count] = owner
            self._count += 1
            yield thing

    def pop(self, number: int):
        return self._owners.pop(number)
