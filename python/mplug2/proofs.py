"""Records of kernels that passed `mplug2 doctor`: the project's own, shipped, and the user's, of this machine.

A kernel instance serves on a GPU where a record names it with its digest (the text of its sources) and the GPU's
compute capability. The rest of a record says where it comes from.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SHIPPED = Path(__file__).with_name("proven.json")

# Instances made for some GPUs alone: how their names begin, and how the capability does.
MADE_FOR = {"linear_fwd_product": "8."}


@dataclass(frozen=True)
class Record:
    """What was proven (the first four), and with what."""

    op: str
    instance: str
    digest: str
    capability: str  # "8.0"
    device: str
    compiler: str
    driver: str
    torch: str
    date: str

    def __post_init__(self):
        if not re.fullmatch(r"\d+\.\d", self.capability) or not re.fullmatch(
            r"\w+ \w+", f"{self.instance} {self.digest}"
        ):
            raise ValueError(f"no record: {self}")

    @property
    def key(self) -> tuple[str, str, str]:
        return self.instance, self.digest, self.capability


@dataclass(frozen=True)
class Instance:
    """A kernel instance of the loaded library and what is known of it."""

    op: str
    name: str
    digest: str
    proven: tuple[str, ...]  # capabilities
    slower: tuple[str, ...]  # capabilities where the static rule prefers the reference
    served: int  # times it was chosen in this process

    def is_made_for(self, capability: str) -> bool:
        """Whether it can be chosen at all on GPUs of that capability ("8.0")."""
        return all(capability.startswith(made) for name, made in MADE_FOR.items() if self.name.startswith(name))


def user_cache() -> Path:
    """Where `mplug2 doctor` writes: mplug2/proven.json in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mplug2", "proven.json")


def read(path: Path) -> list[Record]:
    """The records of a file, none where there is no file.

    Raises:
        ValueError: the file is something else; the message says what to do.
    """
    try:
        return [Record(**record) for record in json.loads(path.read_text(encoding="utf-8"))["records"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a file of records ({error}): remove it and run `mplug2 doctor`") from None


def write(path: Path, records: list[Record], withdrawn: Sequence[Record] = ()) -> None:
    """Add records to a file, in place of those of the same instance, digest and capability, and take out what is
    withdrawn. Nothing half-written stays: a file of another name takes the place of the old one at once."""
    kept = {record.key: record for record in [*read(path), *records]}
    for record in withdrawn:
        kept.pop(record.key, None)
    lines = ",\n    ".join(json.dumps(asdict(kept[key])) for key in sorted(kept))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(f'{{\n  "records": [\n    {lines}\n  ]\n}}\n' if lines else '{"records": []}\n')
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def as_text(records: list[Record]) -> str:
    """Records as the compiled library takes them: instance, digest, capability (80 for "8.0"), a line each."""
    return "".join(f"{record.instance} {record.digest} {record.capability.replace('.', '')}\n" for record in records)


def instances(library) -> list[Instance]:
    """Every kernel instance of a library (`torch.ops.mplug2_cuda`)."""

    def capabilities(text: str) -> tuple[str, ...]:
        return tuple(f"{number[:-1]}.{number[-1]}" for number in sorted(set(text.split(","))) if number)

    rows = [line.split("\t") for line in library.instances().splitlines()]
    return [
        Instance(op, name, digest, capabilities(proven), capabilities(slower), int(served))
        for op, name, digest, proven, slower, served in rows
    ]
