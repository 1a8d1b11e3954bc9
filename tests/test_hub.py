"""Models by name: from a local folder without the network, from the hub, and pushed to it; the hub is played."""

import logging

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

import mplug2
from mplug2.config import PRESETS
from mplug2.weights import WeightsError


@pytest.fixture
def folder(tmp_path):
    """A small model with random weights, saved."""
    start = tmp_path / "start"
    start.mkdir()
    (start / "config.json").write_text(PRESETS["nano"].to_json())
    torch.manual_seed(0)
    mplug2.create_model(start, task="text-generation", random_weights=True).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch):
    """Calls of the hub's functions, by name; each answers with what `hub[name + " gives"]` holds, or raises it."""
    calls = {}

    def replace(name):
        def call(*args, **kwargs):
            calls[name] = (args, kwargs)
            answer = calls.get(f"{name} gives")
            if callable(answer):
                return answer(**kwargs)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(huggingface_hub, name, call)

    for name in ("snapshot_download", "create_repo", "upload_folder"):
        replace(name)
    return calls


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_local_folder_needs_no_network(folder, hub):
    model = mplug2.Model.from_pretrained(folder, task="text-generation")
    assert not model.load_report.missing
    assert not model.training
    assert equal(model, mplug2.create_model(folder, task="text-generation"))
    assert hub == {}


def test_dtype_and_task_reach_the_model(folder):
    model = mplug2.Model.from_pretrained(folder, task=["text-generation"], dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.parts.tasks == ("text-generation",)


@pytest.mark.parametrize("make", [mplug2.create_model, mplug2.Model.from_pretrained])
def test_hub_name_is_fetched(folder, hub, make, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hub["snapshot_download gives"] = str(folder)
    model = make("someone/clothes", revision="v1", task="text-generation")
    assert equal(model, mplug2.create_model(folder, task="text-generation"))
    args, kwargs = hub["snapshot_download"]
    assert args == ("someone/clothes",)
    assert kwargs == {"revision": "v1", "allow_patterns": ["config.json", "vocab.txt", "model.safetensors"]}


def test_local_folder_wins_over_a_hub_name(folder, hub, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/{folder.name}"
    assert mplug2.create_model(name, task="text-generation").load_report.used
    assert hub == {}


def test_revision_of_a_local_folder_is_an_error(folder, hub):
    with pytest.raises(ValueError, match="has no revision 'v1'"):
        mplug2.Model.from_pretrained(folder, revision="v1")


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no connection\nat all"),
        HFValidationError("no connection"),
        ConnectionError("no connection"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_neither_folder_nor_hub_is_one_clear_error(hub, tmp_path, monkeypatch, error):
    monkeypatch.chdir(tmp_path)
    hub["snapshot_download gives"] = error
    wanted = rf"^some/where: no such folder, and .* hub at revision 'v2' \({type(error).__name__}: no conn"
    with pytest.raises(WeightsError, match=wanted) as caught:
        mplug2.create_model("some/where", revision="v2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["huge", "/absent/folder/of/mine", "../mine", "a folder/b"])
def test_what_is_no_hub_name_never_asks_the_hub(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="neither a preset"):
        mplug2.create_model(name)
    assert hub == {}


def test_snapshot_of_another_kind_of_model(hub, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    hub["snapshot_download gives"] = str(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: unknown field 'model_type'"):
        mplug2.create_model("someone/bert")


@pytest.mark.parametrize("message", [None, "better boots"])
def test_push_uploads_a_model_folder(folder, hub, message, caplog):
    caplog.set_level(logging.ERROR)
    model = mplug2.create_model(folder, task="text-generation")
    hub["create_repo gives"] = "https://hub/someone/clothes"
    uploaded = {}
    hub["upload_folder gives"] = lambda folder_path, **_: uploaded.update(
        {file.name: file.read_bytes() for file in folder_path.iterdir()}
    )
    assert model.push_to_hub("someone/clothes", private=True, commit_message=message) == "https://hub/someone/clothes"
    assert hub["create_repo"] == (("someone/clothes",), {"private": True, "exist_ok": True})
    assert hub["upload_folder"][1]["repo_id"] == "someone/clothes"
    assert hub["upload_folder"][1]["commit_message"] == (message or "Upload nano")
    assert uploaded == {file.name: file.read_bytes() for file in folder.iterdir()}
