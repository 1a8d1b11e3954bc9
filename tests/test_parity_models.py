"""Whole models against the golden numbers: losses, gradients, beam search, ranking; from official parameter names."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mplug2
from mplug2.config import VisionConfig
from mplug2.data.text import Tokens
from mplug2.generation import beam_search, rank_answers
from mplug2.modules import Decoder
from mplug2.tasks import captioning, question_answering
from parity_case import Case, Holder, decoder_ends, load, model_config, official_grads

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SCORE_BOUND = {torch.float32: 2e-5, torch.float64: 1e-9}


class CompiledOps(TorchDispatchMode):
    """Counts calls of the project's compiled ops."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mplug2":
            self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def build(parity_dir, task, dtype):
    shared = Case(parity_dir, "model_params", dtype)
    size = shared.json["config"]
    vision = VisionConfig(
        width=size["vision"]["vision_width"], num_layers=size["vision"]["vision_layers"],
        num_heads=size["vision_heads"], mlp_width=4 * size["vision"]["vision_width"],
        image_size=size["vision"]["image_res"],
        patch_size=size["vision"]["patch_size"],
    )  # fmt: skip
    config = model_config(size["bert"], vision=vision, decoder_layers=size["decoder_layers"])
    parts = mplug2.compose(task, config, init=False)
    report = load(parts, shared.params(), dtype)
    assert not report.missing
    assert not report.resized
    return parts, shared.params()


def check_hypotheses(got, want, dtype):
    assert [[h.ids for h in item] for item in got] == want["ids"]
    for item, scores in zip(got, want["scores"], strict=True):
        assert [h.score for h in item] == pytest.approx(scores, rel=SCORE_BOUND[dtype])


@DTYPES
def test_captioning_loss(parity_dir, dtype):
    case = Case(parity_dir, "caption_model", dtype)
    parts, params = build(parity_dir, "video-captioning", dtype)
    video = case.input("video")
    case.expect("visual_tokens", parts.encode_vision(video))
    out = parts(video=video, labels=case.input("answer_ids"), prompt_length=case.json["prompt_length"])
    case.expect("loss", out.loss)
    out.loss.backward()
    case.expect_grads(official_grads(parts, params))


@DTYPES
def test_captioning_loss_from_words(parity_dir, dtype):
    """The task's loss on strings is the recorded one on ids: glued prompt, prompt length, padding."""
    case = Case(parity_dir, "caption_model", dtype)
    parts, _ = build(parity_dir, "video-captioning", dtype)
    ids = case.input("answer_ids")
    calls = {}

    class Words:
        def __call__(self, texts, max_length):
            calls["texts"] = texts
            return Tokens(ids, ids != 0)

        def encode(self, text):
            calls["prompt"] = text
            return case.json["prompt_ids"]

    out = captioning.loss(parts, Words(), case.input("video"), ["A man sings.", "two dogs"])
    case.expect("loss", out.loss)
    assert calls == {"texts": ["a video ofa man sings[SEP]", "a video oftwo dogs[SEP]"], "prompt": "a video of"}


@DTYPES
def test_question_answering_loss_from_words(parity_dir, dtype):
    case = Case(parity_dir, "vqa_model", dtype)
    parts, _ = build(parity_dir, "video-qa", dtype)
    counts, weights = case.json["k"], case.input("weights").tolist()
    groups = [weights[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]
    questions = Tokens(case.input("question_ids"), case.mask("question_mask"))
    answers = Tokens(case.input("answer_ids"), case.mask("answer_mask"))

    def tokenizer(texts, max_length):
        return answers if texts[0].endswith("[SEP]") else questions

    words = [["yes"] * n for n in counts]
    video = case.input("video")
    out = question_answering.loss(parts, tokenizer, video, ["who?"] * len(counts), words, weights=groups)
    case.expect("loss", out.loss)


@DTYPES
def test_captioning_generation(parity_dir, dtype):
    case = Case(parity_dir, "caption_model", dtype)
    parts, _ = build(parity_dir, "video-captioning", dtype)
    for run in case.json["generation"]:
        context = parts.context(video=case.input(run["input"]))
        lengths = {k: run[k] for k in ("beam_size", "min_length", "max_length")}
        got = beam_search(parts.decoder, context, num_return=run["out_size"], **lengths)
        check_hypotheses(got, run[case.tag], dtype)


def question(case, parts):
    return {"video": case.input("video"), "text": case.input("question_ids"), "text_mask": case.mask("question_mask")}


@DTYPES
def test_question_answering_loss(parity_dir, dtype):
    case = Case(parity_dir, "vqa_model", dtype)
    parts, params = build(parity_dir, "video-qa", dtype)
    inputs = question(case, parts)
    text = parts.encode_text(inputs["text"], inputs["text_mask"])
    visual, fused = parts.fusion(parts.encode_vision(inputs["video"]), text, text_mask=inputs["text_mask"])
    case.expect("fusion_visual", visual)
    case.expect("fusion_text", fused)
    counts, weights = torch.tensor(case.json["k"]), case.input("weights")
    out = parts(**inputs, labels=case.input("answer_ids"), label_counts=counts, label_weights=weights)
    case.expect("loss", out.loss)
    out.loss.backward()
    case.expect_grads(official_grads(parts, params))


@DTYPES
def test_question_answering_generation(parity_dir, dtype):
    case = Case(parity_dir, "vqa_model", dtype)
    parts, _ = build(parity_dir, "video-qa", dtype)
    context = parts.context(**question(case, parts))
    for run in case.json["generation"]:
        lengths = {k: run[k] for k in ("beam_size", "min_length", "max_length")}
        got = beam_search(parts.decoder, context, num_return=run.get("out_size", 1), **lengths)
        check_hypotheses(got, run[case.tag], dtype)


@DTYPES
def test_answer_ranking(parity_dir, dtype):
    case = Case(parity_dir, "vqa_model", dtype)
    parts, _ = build(parity_dir, "video-qa", dtype)
    context = parts.context(**question(case, parts))
    bound = 1e-4 if dtype == torch.float32 else 1e-9
    for run in case.json["rank_answer"]:
        ids, probs = rank_answers(parts.decoder, context, case.input("candidate_ids"), num_return=run["k"])
        assert ids.tolist() == run[case.tag]["topk_ids"]
        for got, want in zip(probs.tolist(), run[case.tag]["topk_probs"], strict=True):
            assert got == pytest.approx(want, rel=bound)


@DTYPES
def test_beam_search(parity_dir, dtype):
    case = Case(parity_dir, "beam_search", dtype)
    config = model_config(case.json["config"], decoder_layers=case.json["config"]["num_hidden_layers"])
    config = decoder_ends(config, case.json["start_token"], case.json["end_token"])
    with torch.device("meta"):
        holder = Holder(config, decoder=Decoder(config.decoder, config.text))
    load(holder, case.params("text_decoder."), dtype)
    decoder = holder.decoder
    with torch.no_grad():
        context = decoder.project(case.input("source"), case.mask("source_mask"))
    for run in case.json["runs"]:
        decoder.head.bias.data[config.decoder.end_id] = run["eos_bias"]
        lengths = {k: run[k] for k in ("beam_size", "min_length", "max_length")}
        prefix = case.input("prefix_ids") if run["prefix"] else None
        got = beam_search(decoder, context, num_return=run["out_size"], prefix=prefix, **lengths)
        check_hypotheses(got, run[case.tag], dtype)


def test_float32_runs_through_the_compiled_ops(parity_dir, monkeypatch):
    # A kernel that falls back calls the reference: it must not be there to call.
    def absent(*args, **kwargs):
        raise AssertionError("a compiled op fell back to its reference")

    for name in ("attention", "local_temporal", "add_layer_norm", "linear", "linear_cross_entropy"):
        monkeypatch.setattr(f"mplug2.ops.reference.{name}", absent)
    case = Case(parity_dir, "vqa_model", torch.float32)
    parts, _ = build(parity_dir, "video-qa", torch.float32)
    layers = parts.config.vision.num_layers
    with CompiledOps() as ops, torch.no_grad():
        parts.encode_vision(case.input("video"))
    assert ops.counts["local_temporal_fwd"] == 2 * layers
    assert ops.counts["attention_fwd"] == layers + 2 * parts.config.universal.num_layers
    assert ops.counts["add_layer_norm_fwd"] == 3 * parts.config.universal.num_layers
    assert ops.counts["linear_fwd"] > 4 * layers
    with CompiledOps() as ops:
        parts(**question(case, parts), labels=case.input("answer_ids"), label_counts=torch.tensor(case.json["k"]))
    assert ops.counts["linear_cross_entropy_fwd"] == 1
