"""What the command line's runs over many files share: their part of the work, its file, a progress bar, a summary."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mplug2.inference.features import FeaturesFile
from mplug2.inference.results import ResultsFile
from mplug2.inference.run import Answering, Captioning, Embedding, Work, run
from mplug2.inference.sources import Item, Share, find_items, is_list, is_shards
from mplug2.model import Model


class ManyFiles:
    """One process's run over `sources` into `out`; each method does one kind of work and returns the exit status: 0,
    1 where a file was bad, 2 where something did not fit.

    Under torchrun every process takes its share of --shard, and bad files alone give 0. ValueError: --shard is not i/n,
    or the processes of torchrun would share standard input.
    """

    def __init__(
        self,
        sources: Sequence[str],
        out: Path,
        shard: str,
        num_workers: int | None,
        batch_size: int,
        root: str,
        questions: tuple[str, ...],
        console: Console,
    ) -> None:
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if world_size > 1 and "-" in sources:
            raise ValueError("-: torchrun's processes share one standard input, each would see parts of it; use a file")
        self._sources = sources
        self._share = Share.parse(shard).split(int(os.environ.get("RANK", 0)), world_size)
        self._out = part_name(out, self._share)
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._num_workers, self._batch_size = num_workers or max(1, cores), batch_size
        self._root, self._questions = root, questions
        self._console = console

    @property
    def has_list(self) -> bool:
        return any(is_list(source) for source in self._sources)

    def caption(self, model: Model, *, num_captions: int, **options) -> int:
        return self._run(model, lambda _: Captioning(num_captions, options))

    def answer(self, model: Model, **options) -> int:
        return self._run(model, lambda _: Answering(options), self._asked())

    def embed(self, model: Model, *, normalize: bool) -> int:
        with ExitStack() as opened:

            def work(results: ResultsFile) -> Work:
                features = FeaturesFile(path, num_rows=results.num_rows, width=model.config.text.width)
                return Embedding(opened.enter_context(features), normalize)

            path = self._out.with_suffix(".npy")
            if path == self._out:
                return self._fail(f"{path}: is where the features go; name a .jsonl file for the lines about them")
            return self._run(model, work)

    def _items(self) -> Iterator[Item]:
        return find_items(self._sources, questions=self._questions, root=self._root, share=self._share)

    def _asked(self) -> Iterator[Item]:
        for item in self._items():
            if not item.questions and item.error is None:
                raise ValueError(f'{item.name}: no question is asked about it; give one, or "question" in its line')
            yield item

    def _run(self, model: Model, make_work: Callable[[ResultsFile], Work], items: Iterable[Item] | None = None) -> int:
        try:
            with ResultsFile(self._out) as results, _Bar(self._console, results) as bar:
                if not any(source == "-" or is_shards(source) for source in self._sources):
                    bar.count(self._items(), asks=items is not None)
                summary = run(
                    model, self._items() if items is None else items, make_work(results), results,
                    num_workers=self._num_workers, batch_size=self._batch_size, on_line=bar.advance,
                )  # fmt: skip
        except (ValueError, OSError) as e:
            return self._fail(str(e))
        self._console.print(f"{self._out}: {summary}", markup=False, highlight=False, soft_wrap=True)
        is_part = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun ends all processes when one returns another status
        return 1 if summary.num_bad and not is_part else 0

    def _fail(self, text: str) -> int:
        self._console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        return 2


def part_name(out: Path, share: Share) -> Path:
    """captions.jsonl, or captions.2-of-8.jsonl where a process writes a part."""
    return out if share.count == 1 else out.with_name(f"{out.stem}.{share.index}-of-{share.count}{out.suffix}")


class _Bar:
    """Lines done, bad ones, lines a second and the time that remains; on a terminal alone."""

    def __init__(self, console: Console, results: ResultsFile) -> None:
        self._progress = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[bad]} bad, {task.fields[rate]:.1f}/s"),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        before = results.num_before
        self._task = self._progress.add_task("", total=None, completed=before, bad=results.num_bad, rate=0.0)
        self._started = time.monotonic()

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def count(self, items: Iterator[Item], *, asks: bool) -> None:
        """Count the lines to come, one a file or one a question, beside the work: the start does not wait for it."""
        if self._progress.disable:
            return

        def work() -> None:
            with suppress(ValueError, OSError):  # the run itself meets them and says so
                self._progress.update(self._task, total=sum((asks and len(item.questions)) or 1 for item in items))

        threading.Thread(target=work, daemon=True).start()

    def advance(self, results: ResultsFile) -> None:
        done = results.num_good + results.num_bad
        rate = (done - results.num_before) / (time.monotonic() - self._started)
        self._progress.update(self._task, completed=done, bad=results.num_bad, rate=rate)
