"""Options and fixtures of all tests. Test files stand alone: each one passes when run by itself."""

import os
from pathlib import Path

# Before torch is imported anywhere: the workers share the cores, also through the programs that tests start.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // _WORKERS)))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-dir",
        type=Path,
        default=Path(__file__).parent / "data" / "parity",
        help="folder of golden numbers to compare with (default: %(default)s)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def parity_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of golden numbers that --parity-dir names."""
    folder = request.config.getoption("--parity-dir").resolve()
    if not folder.is_dir():
        raise pytest.UsageError(f"--parity-dir: {folder} is not a folder")
    return folder
