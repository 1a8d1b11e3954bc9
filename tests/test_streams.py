"""CUDA kernels keep to the current stream, never synchronise, may be captured in graphs and compiled. Doctor's cases,
small."""

import subprocess
import sys
import warnings

import pytest
import torch

from mplug2 import doctor, ops

pytestmark = pytest.mark.gpu


def tensors(case: doctor.Case) -> dict[str, torch.Tensor]:
    made = case.make(torch.Generator().manual_seed(0), 2)
    return {
        name: t.to("cuda", torch.bfloat16).requires_grad_() if t.is_floating_point() else t.to("cuda")
        for name, t in made.items()
    }


def forward(case: doctor.Case, arguments: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    outs = getattr(ops, case.op)(**arguments, **case.options)
    return outs if isinstance(outs, tuple) else (outs,)


def with_gradients(outs: tuple[torch.Tensor, ...], arguments: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    leaves = [t for t in arguments.values() if t.requires_grad]
    return [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])]


def call(case: doctor.Case, arguments: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return with_gradients(forward(case, arguments), arguments)


def assert_same_bits(actual, expected) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", doctor.CASES, ids=lambda case: f"{case.op}: {case.what}")
def test_current_stream_without_synchronisation(case):
    given = tensors(case)
    with ops.layer("portable"):
        expected = call(case, given)
        late = {name: torch.full_like(t, 1) for name, t in given.items()}
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the mode may miss some
                torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(stream), torch.no_grad():
                torch.cuda._sleep(100_000_000)  # whoever does not wait for this stream reads ones
                for name, t in late.items():
                    t.copy_(given[name])
            with torch.cuda.stream(stream):
                actual = call(case, {name: t.requires_grad_(given[name].requires_grad) for name, t in late.items()})
                assert not stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert_same_bits(actual, expected)


FIRST_LAUNCH_IN_A_GRAPH = """
import sys
sys.path.append("tests")
import torch
from test_streams import assert_same_bits, call, doctor, ops, tensors

a = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
with ops.layer("portable"):
    for case in doctor.CASES:
        given = tensors(case)
        torch.cuda.synchronize()
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            # cuBLAS makes its handles, this thread's and autograd's, and the stream's workspace here, not in the graph.
            (a @ a).sum().backward()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            captured = call(case, given)
        for _ in range(2):
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits(captured, call(case, given))
        print(case.op, case.what)
"""


def test_the_first_launch_may_be_inside_a_graph(request):
    command = [sys.executable, "-c", FIRST_LAUNCH_IN_A_GRAPH]
    done = subprocess.run(command, capture_output=True, text=True, cwd=request.config.rootpath)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(doctor.CASES)


@pytest.mark.parametrize("case", doctor.CASES, ids=lambda case: f"{case.op}: {case.what}")
def test_compiles_without_graph_breaks(case):
    given = tensors(case)
    with ops.layer("portable"):
        compiled = torch.compile(lambda arguments: forward(case, arguments), fullgraph=True, backend="aot_eager")
        assert_same_bits(with_gradients(compiled(given), given), call(case, given))
