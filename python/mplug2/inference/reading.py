"""Frames of many files by decoding processes: in no order, a bounded number ahead, and no file stops another.

Decoding runs in processes rather than threads so that a decoder that crashes or hangs on a file takes nothing with it:
the file gets an error and a new process goes on. Each process has a thread here that hands it one file at a time and
waits for its frames. The processes run at a lower priority than the model, and so fill the cores that it leaves idle.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from mplug2.data.loading import load_frames
from mplug2.data.source import MediaError
from mplug2.data.transform import Transform
from mplug2.inference.sources import Item

logger = logging.getLogger(__name__)

_START_SECONDS = 300  # to import torch, on a busy machine
_NICE = 10
_END = object()


class Reader:
    """Iterates over (item, frames uint8 (T, size, size, 3)) or (item, why it cannot be read), as they are ready; the
    items have lost their `source`, which may be large.

    items: asked for one by one, from the threads of the workers. num_workers: decoding processes. ahead: files that
    may wait for the model beside the num_workers in work. timeout: seconds after which a file counts as hung.

    Raises, while iterating, what `items` raises (ValueError, OSError), and ChildProcessError where no process starts.
    """

    def __init__(
        self,
        items: Iterable[Item],
        transform: Transform,
        *,
        num_frames: int,
        num_workers: int,
        ahead: int = 16,
        timeout: float = 120.0,
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"workers must be at least 1, got {num_workers}")
        self._items, self._lock = iter(items), threading.Lock()
        self._job = (transform, num_frames)
        self._timeout = timeout
        self._results: queue.Queue = queue.Queue(ahead)
        self._stop = threading.Event()
        self._workers: list[_Worker] = []
        # Daemons: one that waits for a slow source must not keep a program from ending.
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(num_workers)]

    def __enter__(self) -> Reader:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for worker in list(self._workers):
            worker.end()

    def __iter__(self) -> Iterator[tuple[Item, Tensor | str]]:
        num_running = len(self._threads)
        while num_running:
            found = self._results.get()
            if found is _END:
                num_running -= 1
            elif isinstance(found, Exception):
                raise found
            else:
                yield found

    def _serve(self) -> None:
        """One thread's work: item after item through a process of its own."""
        last: object = RuntimeError("reading ended by the error that is printed above")
        worker = None
        try:
            while not self._stop.is_set():
                with self._lock:
                    item = next(self._items, None)
                if item is None:
                    last = _END
                    return
                if item.error is not None:
                    self._put((item, item.error))
                    continue
                if worker is None or not worker.is_alive:
                    if worker is not None:
                        self._workers.remove(worker)  # it holds file descriptors
                    worker = _Worker(*self._job)
                    self._workers.append(worker)
                found = worker.read(item, self._timeout)
                self._put((replace(item, source=""), found))
        except (ValueError, OSError) as e:
            last = e
        finally:
            self._put(last)
            if worker is not None:
                worker.end()

    def _put(self, result: object) -> None:
        while not self._stop.is_set():
            try:
                self._results.put(result, timeout=0.2)
            except queue.Full:
                continue
            return


class _Worker:
    """A decoding process, as its thread sees it."""

    def __init__(self, transform: Transform, num_frames: int) -> None:
        # Forked from a server that has imported torch and done nothing with it: this process has threads and CUDA's
        # state, which do not survive a fork, and an import for each worker takes seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_decode, args=(theirs, transform, num_frames), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the stream
        self.is_alive = True
        try:
            is_ready = self._connection.poll(_START_SECONDS) and self._connection.recv()
        except (EOFError, OSError):
            is_ready = False
        if not is_ready:
            self.end()
            raise ChildProcessError(
                "a decoding process does not start; a script that starts them must do so under "
                'if __name__ == "__main__":'
            )

    def read(self, item: Item, timeout: float) -> Tensor | str:
        try:
            self._connection.send(item.source)
            if not self._connection.poll(timeout):
                self.end()
                return f"{item.name}: was not read within {timeout:g} s and is left out; convert it or leave it out"
            frames, error, warnings = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)  # its end is seen before its status is known
            self.end()
            status = self._process.exitcode
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            return f"{item.name}: the process that read it ended ({how}); convert it or leave it out"
        for warning in warnings:
            logger.warning("%s", warning)
        return f"{item.name}: {error}" if frames is None else torch.from_numpy(frames)

    def end(self) -> None:
        self.is_alive = False
        self._process.kill()
        self._process.join()


class _Kept(logging.Handler):
    """Keeps messages for the process that shows them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def take(self) -> list[str]:
        taken, self.messages = self.messages, []
        return taken


def _decode(connection: Connection, transform: Transform, num_frames: int) -> None:
    """A decoding process: sources in, (frames, error, warnings) out, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the run's process ends this one
    os.nice(_NICE)
    torch.set_num_threads(1)
    kept = _Kept()
    logging.getLogger("mplug2").addHandler(kept)
    try:
        connection.send(True)
        while True:
            source = connection.recv()
            frames = error = None
            try:
                frames = load_frames(source, transform, num_frames=num_frames).numpy()
            except MediaError as e:
                error = e.reason
            except ValueError as e:
                error = str(e)
            connection.send((frames, error, kept.take()))
    except (EOFError, ConnectionError):
        return
