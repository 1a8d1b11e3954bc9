"""The heap of this process."""

import ctypes


def return_free_memory() -> None:
    """Give the pages that malloc holds free back to the system, where it can."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
