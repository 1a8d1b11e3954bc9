"""JSON lines that a killed run leaves whole: what is done is known from the file itself, and nothing is done twice."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

from mplug2.inference.sources import digest

_START = b'{"file": '


class ResultsFile:
    """A file of lines {"file": name, ...}, opened to append by one process at a time.

    A line is one write, so a kill leaves whole lines or one torn last line, which is cut off when the file is opened
    again. Names are remembered by 64-bit digests, some 70 bytes each.

    num_good, num_bad: lines without and with "error", those that were there before included. num_before: lines that
    were there when it was opened. num_rows: one more than the largest "row" of a line (see `FeaturesFile`).

    ValueError: another process writes the file, or it holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.num_good = self.num_bad = self.num_rows = 0
        self._claimed: set[int] = set()
        self._lock = threading.Lock()
        # Python's files are closed in programs that it starts, so none of them keeps the lock.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(self.path, self._scan())
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{self.path}: another run is writing it; give each its own --out or --shard") from None
        except ValueError:
            self._file.close()
            raise
        self.num_before = self.num_good + self.num_bad

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def claim(self, name: str, question: str | None = None) -> bool:
        """True the first time that a name (and question) is claimed and no line holds it; from any thread."""
        key = digest(name if question is None else f"{name}\0{question}")
        with self._lock:
            if key in self._claimed:
                return False
            self._claimed.add(key)
            return True

    def write(self, name: str, question: str | None = None, **fields: object) -> None:
        """Append a line. OSError: it did not fit."""
        asked = {} if question is None else {"question": question}
        line = json.dumps({"file": name, **asked, **fields}).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: the disk is full; make room and run the same command again")
        self._count(fields)

    def _count(self, fields: dict) -> None:
        if "error" in fields:
            self.num_bad += 1
        else:
            self.num_good += 1
        self.num_rows = max(self.num_rows, fields.get("row", -1) + 1)

    def _scan(self) -> int:
        """Learn what is done; returns how many bytes are whole lines."""
        size = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    if line[: len(_START)] != _START[: len(line)]:
                        raise self._foreign(number)
                    break
                try:
                    row = json.loads(line)
                except ValueError:
                    raise self._foreign(number) from None
                if not isinstance(row, dict) or not isinstance(row.get("file"), str):
                    raise self._foreign(number)
                self.claim(row["file"], row.get("question"))
                self._count(row)
                size += len(line)
        return size

    def _foreign(self, number: int) -> ValueError:
        return ValueError(f'{self.path}:{number}: is not a line {{"file": ...}} of results; name another file')
