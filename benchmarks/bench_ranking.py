"""Ranking of 128 answers: one context for all of them against the published way (benchmarks/baselines), in which every
answer has a copy of the visual tokens, projected again; eager and with every layer compiled.

    python benchmarks/bench_ranking.py --preset nano
    python benchmarks/bench_ranking.py --preset large --dtype bfloat16 --rounds 3

Answers: 1 to 4 pieces of the model's vocabulary that share their beginnings, seed 0; all are compared whole. Peaks: of
one process each, weights included, ours also for one answer. Models and inputs: generation_cases.py. On a CPU base
and large run without warm-up, their baselines once. Nothing is timed unless probabilities are alike up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import baselines
import bench
import generation_cases as cases
import numpy as np
import torch
from torch import Tensor

from mplug2.generation import rank_answers
from mplug2.model import Model

NUM_ANSWERS, NUM_STEMS, NUM_NEXT = 128, 24, 4  # first pieces, and pieces that follow each
EAGER, COMPILED = "published way eager", "published way compiled"
Ranking = tuple[Tensor, Tensor]  # indices and probabilities (B, k)


def make_answers(model: Model, count: int = NUM_ANSWERS) -> Tensor:
    """(A, S) ids of answers of 1 to 4 pieces, no two alike, start and end token round them, padded with 0."""
    rng, config = np.random.default_rng(0), model.config
    first_word = model.tokenizer.vocab.get("[MASK]", max(model.tokenizer.special_ids)) + 1
    stems = rng.choice(np.arange(first_word, config.text.vocab_size), NUM_STEMS, replace=False)
    nexts = rng.integers(first_word, config.text.vocab_size, (NUM_STEMS, 3, NUM_NEXT))
    answers: dict[tuple[int, ...], None] = {}
    while len(answers) < NUM_ANSWERS:
        stem = int(rng.integers(NUM_STEMS))
        further = [int(nexts[stem, i, rng.integers(NUM_NEXT)]) for i in range(int(rng.integers(4)))]
        answers[(int(stems[stem]), *further)] = None
    ids = torch.zeros(NUM_ANSWERS, 6, dtype=torch.int64)
    for row, pieces in zip(ids, answers, strict=True):
        row[: len(pieces) + 2] = torch.tensor([config.decoder.start_id, *pieces, config.decoder.end_id])
    return ids[:count].to(next(model.parts.parameters()).device)


def our_way(model: Model) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Ranking]]:
    decoder = model.parts.decoder

    def rank(tokens: Tensor, answers: Tensor) -> Ranking:
        return rank_answers(decoder, decoder.project(tokens), answers, num_return=len(answers))

    return model.parts.encode_vision, rank


def published_way(model: Model, *, compiled: bool):
    encoder, decoder = baselines.PublishedEncoder(model.parts), baselines.PublishedDecoder(model.parts.decoder)
    if compiled:
        baselines.compile_layers(encoder, decoder)

    def rank(tokens: Tensor, answers: Tensor) -> Ranking:
        return baselines.rank_answers(decoder, tokens, answers, num_return=len(answers))

    return encoder, rank


def main() -> None:
    args = bench.arguments(__doc__, preset="nano", batch=1, peak_of="", answers=NUM_ANSWERS)
    with bench.our_layer() as layer, torch.no_grad():
        if args.peak_of:
            measure_peak(args)
            return
        bench.start()
        for dtype in args.dtype:
            run(args, dtype, layer)
    bench.finish()


def run(args, dtype: str, layer: str) -> None:
    peaks = find_peaks(args, dtype)
    model = cases.make_model(args.preset, dtype, args.device)
    video, answers = cases.make_video(model, args.batch), make_answers(model, args.answers)
    ways = {"ours": our_way(model), EAGER: published_way(model, compiled=False)}
    if not args.no_compile:
        ways[COMPILED] = published_way(model, compiled=True)
    tokens = {name: encode(video) for name, (encode, _) in ways.items()}
    for name in ways:
        cases.check_states(tokens[name], tokens["ours"], dtype, name)
    few = answers[:4]
    for name, (_, rank) in ways.items():
        check_ranking(rank(tokens["ours"], few), ways["ours"][1](tokens["ours"], few), dtype, name)
    candidates, found = {}, {}
    for name, (encode, rank) in ways.items():
        candidates[f"{name}: encoder"] = lambda encode=encode: encode(video)
        candidates[name] = lambda rank=rank, name=name: found.update({name: rank(tokens[name], answers)})
    once = [EAGER, COMPILED] if cases.is_slow(args) else []
    taken = bench.samples(
        candidates, args.rounds, once=[*once, *(f"{name}: encoder" for name in once)], **cases.warming(args)
    )
    ranking = {name: bench.timing(taken[name]) for name in ways}
    whole = {
        name: bench.timing(list(map(sum, zip(taken[name], taken[f"{name}: encoder"], strict=True)))) for name in ways
    }
    for name in ways:
        check_ranking(found[name], found["ours"], dtype, name)
        alike = int((found[name][0] == found["ours"][0]).sum())
        print(f"{name}: {alike} of {found[name][0].numel()} answers stand in the place that ours gives them")
    shape = f"{args.preset} B={args.batch} A={args.answers}"
    print(
        f"\npeak MB of ours for one answer: {peaks['one']:.0f}, for {args.answers}: {peaks['ours'] / peaks['one']:.2f}x"
    )
    bench.report("ranking stage", dtype, shape, ranking, layer=layer)
    bench.report("ranking with encoder", dtype, shape, whole, layer=layer, peaks=peaks)


def check_ranking(found: Ranking, expected: Ranking, dtype: str, name: str) -> None:
    """Raises where log-probabilities differ by more than rounding, in units of how far they lie apart."""
    by_answer = [torch.zeros_like(probs).scatter(1, index, probs.log()) for index, probs in (found, expected)]
    apart = (by_answer[1].amax() - by_answer[1].amin()).item()
    error = (by_answer[0] - by_answer[1]).abs().max().item() / max(apart, 1e-6)
    if not error <= cases.TOLERANCES[dtype]:
        raise SystemExit(f"{name}: log p of an answer differs from ours by {error:.1e} of their range")


def find_peaks(args, dtype: str) -> dict[str, float]:
    options = ("--preset", args.preset, "--dtype", dtype, "--batch", str(args.batch), "--device", args.device)
    options += ("--threads", str(args.threads))
    runs = {"ours": ("ours", args.answers), "one": ("ours", 1), EAGER: ("eager", args.answers)}
    return {
        name: cases.peak_of(*options, "--peak-of", way, "--answers", str(count)) for name, (way, count) in runs.items()
    }


def measure_peak(args) -> None:
    model = cases.make_model(args.preset, args.dtype[0], args.device)
    video, answers = cases.make_video(model, args.batch), make_answers(model, args.answers)
    encode, rank = our_way(model) if args.peak_of == "ours" else published_way(model, compiled=False)
    del model
    cases.print_peak(lambda: rank(encode(video), answers), args.device)


if __name__ == "__main__":
    main()
