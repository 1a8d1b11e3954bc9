"""Digests of the CUDA kernels: what a proof on a GPU (mplug2 doctor) is valid for.

A unit is a translation unit that launches kernels, csrc/<op>/<unit>_cuda.cu. Its digest is the SHA-256 of its text, of
that of the instantiations in csrc/<op>/inst/ and of every file of csrc/ that they include, without comments, layout and
the emulator's halves; of the CUTLASS version; and of the compiler flags that change what a kernel computes. Paths,
compilers and the list of architectures are not part of it.

    python build_tools/digests.py                print them
    python build_tools/digests.py --write FILE   the C++ file that the build compiles into the library
    python build_tools/digests.py --voided       records of proven.json that these sources no longer have
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

import cutlass_headers

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PROVEN = ROOT / "python" / "mplug2" / "proven.json"

# Flags of nvcc that change what a kernel computes; CMakeLists.txt takes them from here.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr")

TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|\w+|\S', re.DOTALL)
INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')


def ops() -> list[str]:
    """Folders of csrc/ with CUDA kernels; core/, which all share, is none."""
    return sorted({path.parent.name for path in CSRC.glob("*/*_cuda.cu")} - {"core"})


def units() -> dict[str, Path]:
    """Translation units that launch kernels, by their name in MPLUG2_DIGEST(name)."""
    return {path.name.removesuffix("_cuda.cu"): path for op in ops() for path in sorted((CSRC / op).glob("*_cuda.cu"))}


def sources(*roots: Path) -> dict[Path, str]:
    """`roots` and every file of csrc/ that they include, with its text as nvcc sees it."""
    found: dict[Path, str] = {}
    left = list(roots)
    while left:
        path = left.pop()
        if path in found:
            continue
        found[path] = device_half(path.read_text(encoding="utf-8"))
        for name in filter(None, map(INCLUDE.match, found[path].splitlines())):
            candidates = (path.parent / name[1], CSRC / name[1])
            left += [candidate.resolve() for candidate in candidates if candidate.is_file()][:1]
    return found


def device_half(text: str) -> str:
    """`text` without what stands between the #else and the #endif of an `#if defined(__CUDACC__)`."""
    kept, is_open, is_emulated = [], [], []
    for line in text.splitlines():
        directive = re.match(r"\s*#\s*(if|el|endif)", line)
        if directive and directive[1] == "if":
            is_open.append(bool(re.match(r"\s*#\s*if\s+defined\(__CUDACC__\)\s*$", line)))
            is_emulated.append(False)
        elif directive and directive[1] == "el" and is_open[-1]:
            is_emulated[-1] = True
        if not any(is_emulated):
            kept.append(line)
        if directive and directive[1] == "endif":
            is_open.pop()
            is_emulated.pop()
    return "\n".join(kept)


def bare(text: str) -> str:
    """The tokens of `text` between single spaces: neither comments nor layout."""
    return " ".join(token for token in TOKEN.findall(text) if not token.startswith(("//", "/*")))


def digest(unit: str, extra_flags: str = "") -> str:
    """`extra_flags`: what the builder added to nvcc's command line."""
    path = units()[unit]
    return digest_of_files(path, *path.parent.glob("inst/*.cu"), extra_flags=extra_flags)


def digest_of_files(*roots: Path, extra_flags: str = "") -> str:
    text = [f"cutlass {cutlass_headers.VERSION}", " ".join([*FLAGS, *extra_flags.split()])]
    # Sorted by their text: a file's name says nothing about what it computes.
    text += sorted(bare(source) for source in sources(*roots).values())
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def cpp(extra_flags: str) -> str:
    cases = "".join(f'  if (name == "{unit}") return "{digest(unit, extra_flags)}";\n' for unit in units())
    return (
        "// Written by build_tools/digests.py.\n#include <string_view>\n\n"
        "namespace mplug2 {\n\nconst char* digest_of(const char* unit) {\n  const std::string_view name = unit;\n"
        f'{cases}  return "none";\n}}\n\n}}  // namespace mplug2\n'
    )


def voided() -> list[str]:
    """One line per record of proven.json whose digest is that of no unit of its op now."""
    now = {(path.parent.name, digest(unit)) for unit, path in units().items()}
    records = json.loads(PROVEN.read_text(encoding="utf-8"))["records"]
    return [
        f"voided: {record['instance']} on {record['capability']} ({record.get('device', 'device unknown')}, "
        f"{record.get('date', 'date unknown')}): the sources of {record['op']} have changed since"
        for record in records
        if (record["op"], record["digest"]) not in now
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flags", action="store_true", help="print nvcc's flags")
    parser.add_argument("--extra-flags", default="", help="what the builder added to nvcc's command line")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--voided", action="store_true")
    options = parser.parse_args()
    if options.flags:
        print(";".join(FLAGS))
    elif options.write:
        text = cpp(options.extra_flags)
        if not options.write.is_file() or options.write.read_text(encoding="utf-8") != text:
            options.write.write_text(text, encoding="utf-8")
    elif options.voided:
        lines = voided()
        print("\n".join(lines) if lines else "every record of proven.json is of these sources")
    else:
        for unit in units():
            print(f"{digest(unit, options.extra_flags)}  {unit}")


if __name__ == "__main__":
    main()
