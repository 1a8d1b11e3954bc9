"""benchmarks/gpu.py as far as a CPU goes: how stages of small commands stop, fail, go on and are reported."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest


def _load():
    path = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("bench_gpu", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu = _load()


def python(name: str, code: str, seconds: int = 60, output: Path | None = None):
    return gpu.Step(name, [sys.executable, "-c", code], seconds, output)


@pytest.fixture
def run(tmp_path):
    return gpu.Run(out=tmp_path, env=tmp_path / "env")


@pytest.fixture
def stages(monkeypatch):
    """Replaces the stages: stages["name"] = list of steps, or an exception."""
    given = {}

    class Stages(dict):
        def __getitem__(self, name):
            def stage(run):
                for step in given[name]:
                    if isinstance(step, Exception):
                        raise step
                    yield step

            return stage

    monkeypatch.setattr(gpu, "STAGES", Stages.fromkeys(("build", "test", "bench")))
    return given


def _results(record) -> dict[str, str]:
    return {key: outcome.result for key, outcome in record.outcomes.items()}


def test_a_step_that_fails_does_not_stop_the_next_one(run, stages):
    output = run.out / "numbers.json"
    stages["test"] = [
        python("bad", "import sys; print('why'); sys.exit(3)"),
        python("good", "import sys; print(42); print('said', file=sys.stderr)", output=output),
    ]
    record = gpu.Record(run.out / "stages.json", "abc")
    gpu.run_stage("test", run, record)
    assert _results(record) == {"test/bad": "failed: exit status 3, see test.log", "test/good": "passed"}
    assert output.read_text() == "42\n"
    log = (run.out / "test.log").read_text()
    assert "why" in log
    assert "said" in log
    assert "42\n" not in log


def test_a_build_stops_at_its_first_failure(run, stages):
    stages["build"] = [python("tools", "raise SystemExit(1)"), python("mplug2", "")]
    record = gpu.Record(run.out / "stages.json", "abc")
    gpu.run_stage("build", run, record)
    assert list(record.outcomes) == ["build/tools"]


def test_only_what_has_not_passed_runs_again(run, stages):
    mark = run.out / "marks"
    count = f"open({str(mark)!r}, 'a').write('x')"
    stages["bench"] = [python("first", count), python("second", f"{count}; raise SystemExit(1)")]
    for times in (2, 3):  # a new process reads what the last one wrote
        gpu.run_stage("bench", run, gpu.Record(run.out / "stages.json", "abc"))
        assert mark.read_text() == "x" * times
    gpu.run_stage("bench", run, gpu.Record(run.out / "stages.json", "other sources"))
    assert mark.read_text() == "x" * 5


def test_a_step_is_stopped_with_what_it_started(run):
    child = run.out / "child"
    late = f"import time; time.sleep(2); open({str(child)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {late!r}]); time.sleep(60)"
    outcome = gpu.run_step(python("slow", code), run, run.out / "log", 1)
    assert outcome.result == "failed: stopped after 1 s, see log"
    assert outcome.seconds < 30
    time.sleep(2.5)
    assert not child.exists()


def test_a_stage_ends_with_its_time(run, stages):
    stages["test"] = [python("first", "import time; time.sleep(60)"), python("second", "")]
    record = gpu.Record(run.out / "stages.json", "abc")
    gpu.run_stage("test", run, record, seconds=2)
    first, second = record.outcomes.values()
    assert first.result == "failed: stopped after 2 s, see test.log"
    assert second.result == "failed: the stage's 2 s are used up; run it again"


def test_what_is_absent_is_said(run, stages):
    stages["test"] = [gpu.Absent("no compute-sanitizer on PATH")]
    record = gpu.Record(run.out / "stages.json", "abc")
    gpu.run_stage("test", run, record)
    assert _results(record) == {"test/": "absent: no compute-sanitizer on PATH"}
    assert "absent: no compute-sanitizer" in gpu.summary(record)


def test_stages_need_the_environment_of_the_build(run):
    with pytest.raises(gpu.Absent, match="run the build stage first"):
        list(gpu.doctor(run))


def test_environment_sees_the_packages_beneath(run):
    gpu.make_environment(run.env)
    code = "import importlib.util as i, sys; print(sys.prefix, bool(i.find_spec('torch')), bool(i.find_spec('pip')))"
    printed = run.printed([run.python, "-c", code]).split()
    assert printed == [str(run.env), "True", "True"]
    marked = run.env / "kept"
    marked.touch()
    gpu.make_environment(run.env)  # a second time leaves it
    assert marked.exists()


def test_wheels_make_pip_stay_offline(tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    run = gpu.Run(out=tmp_path, env=tmp_path, wheels=tmp_path / "wheels")
    assert run.environment()["PIP_NO_INDEX"] == "1"
    assert run.environment()["PIP_FIND_LINKS"] == str(tmp_path / "wheels")
    assert "PIP_FIND_LINKS" not in gpu.Run(out=tmp_path, env=tmp_path).environment()


def test_every_need_but_torch_is_a_wheel():
    names = [need.split(">")[0].split("=")[0].strip() for need in gpu.requirements()]
    assert {"scikit-build-core", "pybind11", "cmake", "ninja", "numpy", "av", "pytest", "pytest-xdist"} <= {*names}
    assert "torch" not in names


def test_few_tests_of_each_file_are_chosen():
    collected = "a.py::one\na.py::two[x-y]\na.py::three\na.py::four\nb.py::one\n\n4/5 tests collected\n"
    assert gpu.few_of_each_file(collected, 2) == ["a.py::one", "a.py::two[x-y]", "b.py::one"]


def test_steps_of_every_stage_fit_into_ten_minutes(run, monkeypatch):
    (run.env / "bin").mkdir(parents=True)
    (run.env / "bin" / "python").touch()
    monkeypatch.setattr(gpu, "make_environment", lambda folder: None)
    monkeypatch.setattr(gpu.Run, "printed", lambda *_: "a.py::one\n")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    for name, stage in gpu.STAGES.items():
        steps = list(stage(run))
        assert sum(step.seconds for step in steps) <= 600, name
        assert len({step.name for step in steps}) == len(steps)


def test_every_bench_has_a_row_and_takes_its_arguments():
    folder = Path(gpu.__file__).parent
    rows = gpu.BENCHES + gpu.MODEL_BENCHES
    named = {name for name, *_ in rows}
    on_gpu = {path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py")} - {"reading", "quantization"}
    assert named == on_gpu
    for name, large, small, _ in rows:
        source = (folder / f"bench_{name}.py").read_text()
        for option in (word for word in large + small if word.startswith("--")):
            assert f"{option.removeprefix('--')}=" in source


def test_command_line(tmp_path, stages, capsys):
    stages |= {"build": [python("all", "")], "test": [python("all", "raise SystemExit(1)")], "bench": []}
    arguments = ["--out", str(tmp_path), "--env", str(tmp_path / "env"), "--revision", "abc"]
    assert gpu.main([*arguments, "build"]) == 0
    assert gpu.main(arguments) == 1
    assert "test/all" in capsys.readouterr().out
    assert "test/all" in (tmp_path / "summary.txt").read_text()
    assert json.loads((tmp_path / "stages.json").read_text())["revision"] == "abc"
    with pytest.raises(SystemExit):
        gpu.main([*arguments, "unknown"])
    assert "no stage unknown" in capsys.readouterr().err


def test_help_names_every_stage():
    done = subprocess.run([sys.executable, gpu.__file__, "--help"], capture_output=True, text=True, check=True)
    for name in ("ceilings", "build", "doctor", "test", "bench", "generation", "sanitize"):
        assert name in done.stdout
