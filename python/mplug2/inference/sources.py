"""Where the files of a long run come from: folders, lists and tar shards, found one by one and never listed whole."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

# What folders and shards are searched for. A file that is named, by itself or in a list, may be called anything.
SUFFIXES = frozenset(
    {
        *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts"),
        *(".webm", ".wmv", ".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    }
)
_LIST, _SHARD = (".txt", ".jsonl"), (".tar", ".tar.gz", ".tgz")
_NAMES = ("file", "video", "video_id")  # of the file, in a line of a JSON list
_BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")
_SECONDS = 60  # that a web server may be silent


@dataclass(frozen=True)
class Item:
    """One file to read: its name in the results, and its path, its content, or why there is neither."""

    name: str
    source: str | bytes
    questions: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Share:
    """Part `index` (from 0) of `count` parts. A name always falls into the same part, whatever else there is."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"--shard: {self.index}/{self.count} must be i/n with 0 <= i < n")

    @classmethod
    def parse(cls, text: str) -> Share:
        """The share "i/n"."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ValueError(f"--shard: expected i/n, such as 0/4, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def split(self, index: int, count: int) -> Share:
        """Part `index` of `count` parts of this share."""
        return Share(self.index + self.count * index, self.count * count)

    def holds(self, name: str) -> bool:
        return self.count == 1 or digest(name) % self.count == self.index


def digest(name: str) -> int:
    """64 bits that stand for a name: among 10 million names two agree with probability 3e-6."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def is_list(source: str) -> bool:
    return source == "-" or source.endswith(_LIST)


def is_shards(source: str) -> bool:
    return source.startswith("pipe:") or re.sub(r"[?#].*", "", source).endswith(_SHARD)


def is_many(source: str) -> bool:
    """Whether a source is a folder, a list or shards rather than one file."""
    return is_list(source) or is_shards(source) or os.path.isdir(source)


def find_items(
    sources: Iterable[str], *, questions: Sequence[str] = (), root: str = "", share: Share | None = None
) -> Iterator[Item]:
    """The items of `sources` in order, found as they are asked for.

    A source is one of:
        a file          its name in the results is its path
        a folder        its media files and those of its folders, by name; hidden ones and linked folders are left out
        a list          *.txt, *.jsonl or "-" (standard input): a path a line, or a JSON object with "file" (or "video",
                        "video_id") and perhaps "question"; names are as written, paths relative to `root`
        shards          *.tar, *.tar.gz, *.tgz, by path or http(s) address, or "pipe:command"; {000..099} and {a,b} name
                        several. Read as a stream; a media file's name is shard/member
    questions: asked about every file; lines that hold a question ask their own.
    share: the part to give; a shard belongs to one part as a whole.

    ValueError: a line of a list is not as above. OSError: a list or folder cannot be read; a shard gives an item with
    `error`.
    """
    share, questions = share or Share(), tuple(questions)
    for source in sources:
        if is_shards(source):
            for shard in expand_braces(source):
                if share.holds(shard):
                    yield from _shard(shard, questions)
        elif is_list(source):
            yield from (item for item in _list(source, questions, root) if share.holds(item.name))
        else:
            paths = _folder(source) if os.path.isdir(source) else [source]
            yield from (Item(path, path, questions) for path in paths if share.holds(path))


def expand_braces(pattern: str) -> Iterator[str]:
    """ "a{08..10}.tar" -> a08.tar, a09.tar, a10.tar; {x,y} likewise; one after the other."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    if ".." in match[1] and "," not in match[1]:
        first, last = match[1].split("..")
        width = len(first) if first.startswith("0") else 0
        pieces = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    else:
        pieces = iter(match[1].split(","))
    for piece in pieces:
        yield from expand_braces(pattern[: match.start()] + piece + pattern[match.end() :])


def _is_media(name: str) -> bool:
    base = os.path.basename(name)
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in SUFFIXES


def _folder(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:  # of this folder alone are the names held, to sort them
        found = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in entries if not e.name.startswith("."))
    for name, is_folder in found:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _folder(path)
        elif _is_media(name):
            yield path


def _list(name: str, questions: tuple[str, ...], root: str) -> Iterator[Item]:
    group: list[str] = []  # questions of consecutive lines about one file, which is then read once
    asked_about = None
    with _opened_list(name) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            file, question = _parse(line.rstrip("\r\n"), f"{name}:{number}")
            if group and file != asked_about:
                yield Item(asked_about, os.path.join(root, asked_about), tuple(group))
                group = []
            if question is None:
                yield Item(file, os.path.join(root, file), questions)
            else:
                group, asked_about = [*group, question], file
        if group:
            yield Item(asked_about, os.path.join(root, asked_about), tuple(group))


def _parse(line: str, place: str) -> tuple[str, str | None]:
    if not line.startswith("{"):
        return line, None
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(f"{place}: not valid JSON: {e}") from None
    file = next((fields[name] for name in _NAMES if name in fields), None)
    question = fields.get("question")
    if not isinstance(file, str) or not isinstance(question, (str, type(None))):
        raise ValueError(f'{place}: expected an object with the string "file" and perhaps "question", got {line}')
    return file, question


@contextmanager
def _opened_list(name: str) -> Iterator[Iterable[str]]:
    if name == "-":
        if isinstance(sys.stdin, io.TextIOWrapper):  # names as the file system has them, as below
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield sys.stdin
    else:
        with open(name, encoding="utf-8", errors="surrogateescape") as file:
            yield file


def _shard(shard: str, questions: tuple[str, ...]) -> Iterator[Item]:
    try:
        with _opened_shard(shard) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                if member.isfile() and _is_media(member.name):
                    yield Item(f"{shard}/{member.name}", tar.extractfile(member).read(), questions)
                tar.members = []  # tarfile keeps every member it has passed
    except (tarfile.TarError, OSError, EOFError, http.client.HTTPException, zlib.error, lzma.LZMAError) as e:
        yield Item(shard, b"", error=f"{shard}: cannot be read to its end ({e}); fetch it again")


@contextmanager
def _opened_shard(shard: str) -> Iterator[BinaryIO]:
    if shard.startswith("pipe:"):
        with subprocess.Popen(shard.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE) as process:
            yield process.stdout
            while process.stdout.read(1 << 16):  # what follows the archive's end: the command must not break over it
                pass
        if process.returncode:
            raise OSError(f"the command ended with status {process.returncode}")
    elif "://" in shard:
        with urllib.request.urlopen(shard, timeout=_SECONDS) as stream:
            yield stream
    else:
        with open(shard, "rb") as stream:
            yield stream
