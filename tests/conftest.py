"""Options and fixtures of all tests. Test files stand alone: each one passes when run by itself."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Backend:
    """Kernels that the ops of mplug2 run on while a test has the `backend` fixture: tensors belong on `device`."""

    name: str  # "cpu": the compiled kernels; "emulated": the CUDA kernels on CPU tensors; "cuda"
    device: torch.device
    dtypes: tuple[torch.dtype, ...]  # that have kernels

    @property
    def most_draws(self) -> int:
        """Of one case (tolerances.draws): the emulator is slow."""
        return 3 if self.name == "emulated" else 16

    @contextmanager
    def launching(self, *kernels: str) -> Iterator[None]:
        """Fails unless each of `kernels` (how their launches' names begin) was launched inside: a test of a kernel must
        not pass on the reference. Launches are seen where they are emulated."""
        if self.name != "emulated":
            yield
            return
        import emulated

        with emulated.counts() as counts:
            yield
        names = [launch.name for launch in counts.launches]
        for kernel in kernels:
            assert any(name.startswith(kernel) for name in names), f"{kernel} was not launched, only {names}"


BACKENDS = ("cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The test runs once for each kind of kernel, through the public functions. Tests that time allows for one kind
    alone say so: @pytest.mark.parametrize("backend", ["emulated"], indirect=True)."""
    from mplug2 import ops

    name = request.param
    device = torch.device("cuda" if name == "cuda" else "cpu")
    dtypes = (torch.bfloat16, torch.float32) if name == "cpu" else (torch.bfloat16, torch.float16)
    kernels = {"cpu": nullcontext, "emulated": emulated_kernels, "cuda": lambda: ops.layer("portable")}[name]
    with kernels():
        yield Backend(name, device, dtypes)


@contextmanager
def emulated_kernels() -> Iterator[None]:
    """Every op of mplug2 that the emulated library has runs there when its tensors are on the CPU: autograd, fakes and
    autocast stay those of mplug2."""
    import emulated

    emulated.load()
    routed = torch.library.Library("mplug2", "IMPL", "CPU")
    try:
        for schema in torch._C._jit_get_all_schemas():
            namespace, _, op = schema.name.partition("::")
            if namespace == "mplug2_emulated" and torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CPU"):
                with warnings.catch_warnings():  # PyTorch says, once, that a kernel is replaced
                    warnings.filterwarnings("ignore", "Warning only once for all operators")
                    routed.impl(op, getattr(torch.ops.mplug2_emulated, op).default)
        yield
    finally:
        routed._destroy()
