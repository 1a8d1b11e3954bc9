"""Evaluation: accuracies, and a run over a data folder."""

import json

import pytest

from mplug2 import create_model
from mplug2.data.clothes.folder import write_folder
from mplug2.data.clothes.pictures import BUNDLED
from mplug2.data.clothes.scripts import QUESTIONS
from mplug2.evaluation.accuracy import Share, answer_accuracy, normalize_answer
from mplug2.evaluation.clothes import caption_accuracy
from mplug2.evaluation.run import evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "data"
    write_folder(folder, BUNDLED, num_clips=2, seed=0)
    return folder


class Parrot:
    """Stands for a model that knows the annotations: caption and answer by file name and question."""

    def __init__(self, folder, wrong=()):
        self.captions = {x["video"]: x["caption"] for x in lines(folder / "captions.jsonl")}
        self.answers = {(x["video"], x["question"]): x["answer"] for x in lines(folder / "answers.jsonl")}
        self.wrong = wrong

    def caption(self, files, **options):
        return ["a dog" if f.name in self.wrong else self.captions[f.name] for f in files]

    def answer(self, files, questions, **options):
        pairs = zip(files, questions, strict=True)
        return ["a dog" if f.name in self.wrong else self.answers[f.name, q] for f, q in pairs]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_compared_without_case_and_spaces():
    assert normalize_answer(" A T - Shirt ") == "a t-shirt"
    assert answer_accuracy(["t - shirt", "red"], ["t-shirt", "blue"]) == Share(1, 2)


def test_captions_are_taken_apart():
    truths = ["a red shirt moves left", "a blue bag moves right", "a red coat grows", "a white bag spins"]
    said = ["a red shirt moves right", "a blue bag moves right", "a red coat moves left", "a white boot stays still"]
    assert caption_accuracy(said, truths) == {
        "item": Share(3, 4), "color": Share(4, 4), "motion": Share(1, 4), "all": Share(1, 4), "axis": Share(2, 4),
        "moves left / moves right": Share(1, 2), "moves up / moves down": Share(0, 0), "grows / shrinks": Share(0, 0),
        "direction": Share(1, 2),
    }  # fmt: skip
    assert caption_accuracy(["a dog"], ["a red shirt grows"])["axis"] == Share(0, 1)


def test_a_run_measures_and_keeps_predictions(folder, tmp_path):
    model = Parrot(folder, wrong={"0001.mp4"})
    result = evaluate(model, "video-captioning", folder, predictions=tmp_path / "p.jsonl", progress=False)
    assert (result["item"], result["all"]) == (Share(1, 2), Share(1, 2))
    kept = lines(tmp_path / "p.jsonl")
    assert [k["prediction"] for k in kept] == [kept[0]["caption"], "a dog"]
    assert evaluate(model, "video-captioning", folder, metric="accuracy", progress=False) == {"accuracy": Share(1, 2)}
    result = evaluate(model, "video-qa", folder, progress=False)
    assert result == {"accuracy": Share(3, 6), **dict.fromkeys(QUESTIONS, Share(1, 2))}


def test_a_model_runs_over_a_folder(folder):
    result = evaluate(create_model("nano", random_weights=True), "video-qa", folder, progress=False)
    assert 0 <= result["accuracy"].value <= 1


def test_what_does_not_fit_is_named(folder, tmp_path):
    model = Parrot(folder)
    with pytest.raises(ValueError, match="task must be one of"):
        evaluate(model, "image-captioning", folder)
    with pytest.raises(ValueError, match="does not measure video-qa"):
        evaluate(model, "video-qa", folder, metric="clothes")
    with pytest.raises(ValueError, match=r"captions\.jsonl: no such file"):
        evaluate(model, "video-captioning", tmp_path)
    (tmp_path / "captions.jsonl").write_text('{"video": "a.mp4"}\n')
    with pytest.raises(ValueError, match=r"captions\.jsonl:1: expected an object with strings video, caption"):
        evaluate(model, "video-captioning", tmp_path)
