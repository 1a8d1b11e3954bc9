"""What every reader of files needs: one error class, and a source (path, bytes, file object) checked and opened.

A source is looked at before any decoder sees it, so that a missing file, a folder, a pipe, an empty file or a text file
gets its own plain message. Decoders are given an open file, never a name, so they have no need to open anything.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_HEAD = 4096  # bytes looked at to tell text from media
# Bytes that text never holds: control characters other than tab, line feed, form feed, carriage return and escape.
_NOT_TEXT = bytes(sorted(set(range(32)) - {9, 10, 12, 13, 27}))


class MediaError(ValueError):
    """A file that cannot be read: one line that names the file, the reason and what to do.

    Attributes: `name` (the file as the caller named it) and `reason` (the message without the name).
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Source:
    """A checked source: its name for messages, and the path of a regular file or a seekable binary file object."""

    name: str
    path: str | None = None
    file: BinaryIO | None = None

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The content from its beginning. A path is opened and closed, a caller's file object only rewound."""
        if self.file is None:
            with open(self.path, "rb") as file:
                yield file
        else:
            self.file.seek(0)
            yield self.file


def open_source(source: str | os.PathLike | bytes | BinaryIO) -> Source:
    """Check a path, bytes or a binary file object, and name it.

    File objects are read from their beginning and stay open; one that cannot seek is read into memory.

    MediaError: missing file, folder, pipe or device, no permission, nothing in it, or plain text.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        checked = Source(f"<{len(source)} bytes>", file=io.BytesIO(source))
    elif isinstance(source, (str, os.PathLike)):
        checked = _open_path(os.fspath(source))
    elif hasattr(source, "read"):
        checked = _open_file(source)
    else:
        raise TypeError(f"source must be a path, bytes or a binary file object, got {type(source).__name__}")
    try:
        with checked.opened() as file:
            head = file.read(_HEAD)
    except OSError as e:
        raise MediaError(checked.name, f"cannot be read ({e.strerror or e}); check its permissions") from None
    if not head:
        raise MediaError(checked.name, "is empty (0 bytes); download or copy it again")
    if head.translate(None, _NOT_TEXT) == head:
        raise MediaError(checked.name, "is a text file, not a picture or video; pass the media file itself")
    return checked


def _open_path(path: str) -> Source:
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        advice = "download it first: only local files are read" if "://" in str(path) else "check the path"
        raise MediaError(str(path), f"cannot be opened ({e.strerror or e}); {advice}") from None
    except ValueError as e:  # an embedded null character
        raise MediaError(repr(path), f"is not a path ({e})") from None
    if stat.S_ISDIR(mode):
        raise MediaError(str(path), "is a folder; pass one of the files in it")
    if not stat.S_ISREG(mode):
        raise MediaError(str(path), "is not a regular file; pass a file, or its content as bytes")
    return Source(str(path), path=str(Path(path).absolute()))


def _open_file(file: BinaryIO) -> Source:
    name = getattr(file, "name", None)
    name = name if isinstance(name, str) else f"<{type(file).__name__}>"
    try:
        content = None if file.seekable() else file.read()
        sample = file.read(0) if content is None else content
    except (OSError, ValueError) as e:  # ValueError: the file is closed
        raise MediaError(name, f"cannot be read ({e}); pass an open binary file") from None
    if not isinstance(sample, (bytes, bytearray)):
        raise MediaError(name, "is open in text mode; open it with mode 'rb'")
    return Source(name, file=file if content is None else io.BytesIO(content))
