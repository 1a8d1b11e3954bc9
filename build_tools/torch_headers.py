"""Finds the folder that holds torch's stable-ABI headers, the only part of torch the build needs.

Looked at in this order: $MPLUG2_TORCH_INCLUDE, the torch that this interpreter would import, and the site-packages of
the environment being installed into, which stays on disk (though not importable) under pip's build isolation.
`python build_tools/torch_headers.py` prints the folder, or nothing.
"""

import importlib.util
import os
import site
import sysconfig
from pathlib import Path

STABLE_HEADER = Path("torch", "csrc", "stable", "library.h")


def torch_include() -> str | None:
    """Return the include folder of the first torch found, or None where there is none."""
    candidates = []
    if chosen := os.environ.get("MPLUG2_TORCH_INCLUDE"):
        candidates.append(Path(chosen))
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        candidates.append(Path(spec.origin).parent / "include")
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    candidates += [Path(folder, "torch", "include") for folder in packages]
    return next((str(folder) for folder in candidates if (folder / STABLE_HEADER).is_file()), None)


if __name__ == "__main__":
    print(torch_include() or "")
