"""Errors of a source that wait until what came before them is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ErrorsLast(Generic[Item]):
    """Iterates over `items`; an error of theirs ends it, and is raised by `finish`, once the items taken are done."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._error is not None:
            raise StopIteration
        try:
            return next(self._items)
        except StopIteration:
            raise
        except Exception as e:  # noqa: BLE001 - whatever a user's source raises
            self._error = e
            raise StopIteration from None

    def finish(self) -> None:
        if self._error is not None:
            raise self._error
