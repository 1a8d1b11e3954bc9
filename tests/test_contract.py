"""What every op owes: the registered schemas are walked, so an op that lacks a piece fails here by name."""

import re
from pathlib import Path

import pytest
import torch

import op_cases
from mplug2 import ops

ROOT = Path(__file__).parents[1]


def _schemas() -> dict[str, torch.FunctionSchema]:
    names = sorted(schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("mplug2::"))
    return {name.removeprefix("mplug2::"): _op(name).default._schema for name in names}


def _op(name: str) -> torch._ops.OpOverloadPacket:
    return getattr(torch.ops.mplug2, name.removeprefix("mplug2::"))


SCHEMAS = _schemas()
OPS = [name for name in SCHEMAS if not name.endswith("_reference")]
STEMS = sorted({re.sub("_(fwd|bwd)$", "", name) for name in OPS})
CASES = op_cases.cases()


def _has(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"mplug2::{name}", key)


def test_the_six_ops_are_registered():
    assert set(STEMS) >= {"add_layer_norm", "attention", "fusion", "linear", "linear_cross_entropy", "local_temporal"}


@pytest.mark.parametrize("name", OPS)
def test_op_has_kernel_reference_and_fake(name):
    assert _has(name, "CPU"), "no CPU kernel: csrc/<op>/<op>_cpu.cpp"
    assert f"{name}_reference" in SCHEMAS, "no reference schema: csrc/ops.cpp"
    assert str(SCHEMAS[f"{name}_reference"]) == str(SCHEMAS[name]).replace(name, f"{name}_reference")
    for registered in (name, f"{name}_reference"):
        assert _has(registered, "CompositeExplicitAutograd"), f"{registered}: no Python reference"
        assert _has(registered, "Meta"), f"{registered}: no fake"
    for device in ("CPU", "CUDA"):
        assert _has(name, f"Autocast{device}"), "no autocast rule"


@pytest.mark.parametrize("stem", STEMS)
def test_op_is_differentiable(stem):
    assert f"{stem}_bwd" in OPS, "no backward op"
    assert _has(f"{stem}_fwd", "Autograd"), "no autograd formula"


@pytest.mark.parametrize("stem", STEMS)
def test_op_has_function_test_bench_page_and_folder(stem):
    assert callable(getattr(ops, stem, None)), f"mplug2.ops has no {stem}"
    assert stem in CASES, f"tests/op_cases.py has no {stem}"
    for path in (
        f"csrc/{stem}/{stem}_cpu.cpp",
        f"csrc/{stem}/{stem}_host.h",
        f"python/mplug2/ops/{stem}.py",
        f"tests/test_{stem}.py",
        f"benchmarks/bench_{stem}.py",
        f"docs/{stem}.md",
    ):
        assert (ROOT / path).is_file(), f"{path} is missing"
    assert len((ROOT / f"docs/{stem}.md").read_text().splitlines()) <= 120


def test_every_op_has_a_layer():
    assert sorted(name for name, _, _ in ops.layers()) == OPS
    assert all(layer.startswith("cpu ") and reason for _, layer, reason in ops.layers())


def _tuple(result):
    return result if isinstance(result, tuple) else (result,)


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments with which ops of mplug2 are called."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mplug2":
            self.calls.setdefault(func._schema.name.removeprefix("mplug2::"), (func, args))
        return func(*args, **(kwargs or {}))


def _calls(case):
    """The forward and backward op of a case with the arguments that the public function gives them."""
    leaves = case.leaves()
    with _Recorder() as recorder:
        sum(t.sum() for t in _tuple(case.run(**leaves))).backward()
    return recorder.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_opcheck(stem, dtype):
    calls = _calls(CASES[stem].to(dtype))
    assert set(calls) == {f"{stem}_fwd", f"{stem}_bwd"}
    for name, (func, args) in calls.items():
        args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        if name.endswith("_fwd"):
            for a in args:
                if isinstance(a, torch.Tensor) and a.is_floating_point():
                    a.requires_grad_()
        torch.library.opcheck(func, tuple(args))


@pytest.mark.parametrize("stem", STEMS)
def test_gradcheck(stem):
    case = CASES[stem]
    leaves = case.leaves()
    fixed = {name: t for name, t in leaves.items() if not t.requires_grad}
    names = [name for name in leaves if name not in fixed]

    def run(*tensors):
        return case.run(**fixed, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(leaves[name] for name in names))


@pytest.mark.parametrize("stem", STEMS)
def test_compiled_training_step_is_the_eager_one(stem):
    case = CASES[stem].to(torch.float32)

    def step(**tensors):
        scaled = {name: t * 1.5 if t.is_floating_point() else t for name, t in tensors.items()}
        return sum(t.square().sum() for t in _tuple(case.run(**scaled)))

    eager, compiled = case.leaves(), case.leaves()
    step(**eager).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(**compiled).backward()
    for name in case.differentiable:
        torch.testing.assert_close(compiled[name].grad, eager[name].grad)


@pytest.mark.parametrize("stem", STEMS)
def test_compiled_with_dynamic_sizes(stem):
    small, large = (op_cases.cases(scale=scale)[stem].to(torch.float32) for scale in (2, 3))
    compiled = torch.compile(small.run, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in (small, large):
        for a, e in zip(_tuple(compiled(**case.tensors)), _tuple(case.run(**case.tensors)), strict=True):
            torch.testing.assert_close(a, e)


class _Module(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case

    def forward(self, tensors):
        return self.case.run(**tensors)


@pytest.mark.parametrize("stem", STEMS)
def test_exported_program_is_the_eager_function(stem):
    case = CASES[stem].to(torch.float32)
    program = torch.export.export(_Module(case), (case.tensors,))
    assert any("mplug2" in str(node.target) for node in program.graph.nodes)
    for exported, eager in zip(_tuple(program.module()(case.tensors)), _tuple(case.run(**case.tensors)), strict=True):
        torch.testing.assert_close(exported, eager)


@pytest.mark.parametrize("stem", STEMS)
def test_strides_do_not_matter(stem):
    case = CASES[stem].to(torch.float32)

    def spread(t):
        """The same values, with the last dimension not contiguous and gaps between elements."""
        wide = torch.full((*t.shape[:-1], t.shape[-1] * 2), float("nan") if t.is_floating_point() else 0).to(t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    packed, spaced = case.leaves(), case.leaves()
    expected = _tuple(case.run(**packed))
    actual = _tuple(case.run(**{name: spread(t) for name, t in spaced.items()}))
    sum(t.square().sum() for t in expected).backward()
    sum(t.square().sum() for t in actual).backward()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    for name in case.differentiable:
        torch.testing.assert_close(spaced[name].grad, packed[name].grad)


@pytest.mark.parametrize("stem", STEMS)
def test_autocast_runs_in_the_dtype_of_its_rule(stem):
    case = CASES[stem].to(torch.float32)
    leaves = case.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = _tuple(case.run(**leaves))
        low = _tuple(case.to(torch.bfloat16).run(**case.to(torch.bfloat16).tensors))
        sum(t.float().sum() for t in result).backward()  # a backward pass inside the context is safe too
    full = stem == "add_layer_norm"
    for t, lower in zip(result, low, strict=True):
        if full:
            assert t.dtype == torch.float32
        else:
            assert torch.equal(t, lower)
    assert all(leaves[name].grad.dtype == torch.float32 for name in case.differentiable)


def _layers_here():
    """The reference and every instruction set up to the widest of this CPU."""
    names = ["reference", "baseline", "avx2", "avx512", "amx"]
    return names[: names.index(torch.ops.mplug2_cpu.instruction_set()) + 1]


@pytest.mark.parametrize("name", _layers_here())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_layers_agree(stem, name, dtype):
    case = CASES[stem].to(dtype)
    runs = []
    for wanted in (name, torch.ops.mplug2_cpu.instruction_set()):
        leaves = case.leaves()
        with ops.layer(wanted):
            outs = _tuple(case.run(**leaves))
            sum(t.sum() for t in outs).backward()
        runs.append([*outs, *(leaves[key].grad for key in case.differentiable)])
    unit = torch.finfo(dtype).eps
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=16 * unit, atol=16 * unit)


def test_unknown_layer_is_an_error_and_changes_nothing():
    before = torch.ops.mplug2_cpu.instruction_set()
    with pytest.raises(RuntimeError, match='no layer "sse9", the widest is'), ops.layer("sse9"):
        pass
    assert torch.ops.mplug2_cpu.instruction_set() == before


@pytest.mark.parametrize("stem", STEMS)
def test_float16_is_the_reference(stem):
    case = CASES[stem].to(torch.float16)
    with ops.layer("reference"):
        expected = _tuple(case.run(**case.tensors))
    for a, e in zip(_tuple(case.run(**case.tensors)), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("stem", STEMS)
def test_result_does_not_depend_on_the_number_of_threads(stem):
    case = CASES[stem].to(torch.float32)
    threads = torch.get_num_threads()
    grads = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaves = case.leaves()
            sum(t.square().sum() for t in _tuple(case.run(**leaves))).backward()
            grads.append([leaves[name].grad for name in case.differentiable])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
