"""Captions: the engine against the published way (benchmarks/baselines), eager and with every layer compiled.

    python benchmarks/bench_generation.py --preset nano --batch 8
    python benchmarks/bench_generation.py --preset large --dtype bfloat16 --rounds 3 --parts forced
    python benchmarks/bench_generation.py --preset large --device cuda --batch 8

--parts, joined by commas [default: all of them]:
    forced   20 tokens each: encoder, decoding from the visual tokens on (ours: keys and values made in it), and both;
             on a GPU ours also with its steps as a CUDA graph, capture included
    natural  the same where 5 to 20 tokens are written
    items    32 items, 8 at a time: those that are done make room at once, or when all 8 are done; and the part that
             both spend alike, projecting keys and values
    memory   peak of one caption in a process of its own, weights included (baselines: 2 tokens, their peak is the same)

Models and inputs: generation_cases.py. Beams of 5, rules "released". On a CPU base and large run without warm-up, their
baselines once. --quick: two rounds of the forced part, nothing compiled. Nothing is reported unless states, and scores
of 20 tokens (items: of all), are alike up to rounding.
"""

from __future__ import annotations

import baselines
import bench
import generation_cases as cases
import torch
from torch import Tensor

from mplug2.generation import Hypothesis, beam_search
from mplug2.model import Model
from mplug2.tasks import captioning

FORCED, NATURAL = (20, 20), (4, 20)  # min_length, max_length
NUM_ITEMS, NUM_SLOTS = 32, 8
GRAPH = "ours, steps as a CUDA graph"
NAMES = {"eager": "published way eager", "compiled": "published way compiled"}


def main() -> None:
    args = bench.arguments(
        __doc__, preset="nano", batch=1, parts="forced,natural,items,memory", quick=False, peak_of=""
    )
    with bench.our_layer() as layer, torch.no_grad():
        if args.peak_of:
            measure_peak(args)
            return
        if args.quick:
            args.rounds, args.parts, args.no_compile = 2, "forced", True
        bench.start()
        wanted = args.parts.split(",")
        for dtype in args.dtype:
            peaks = find_peaks(args, dtype) if "memory" in wanted else None
            model = cases.make_model(args.preset, dtype, args.device)
            if "forced" in wanted or "natural" in wanted:
                captions(args, dtype, model, [part for part in wanted if part in LENGTHS], peaks, layer)
            if "items" in wanted:
                unequal_items(args, dtype, model, layer)
    bench.finish()


LENGTHS = {"forced": FORCED, "natural": NATURAL}


def captions(args, dtype: str, model: Model, parts: list[str], peaks: dict[str, float] | None, layer: str) -> None:
    video = cases.make_video(model, args.batch)
    ways = {"ours": cases.our_way(model)}
    if args.device == "cuda":
        graph = cases.our_way(model, cuda_graph=True)
        tokens = model.parts.encode_vision(video)
        if bench.present({GRAPH: lambda: graph.decode(FORCED, tokens)}):
            ways[GRAPH] = graph
    ways[NAMES["eager"]] = cases.published_way(model, compiled=False)
    if not args.no_compile:
        ways[NAMES["compiled"]] = cases.published_way(model, compiled=True)
    check(ways, video, model, dtype)
    once = list(NAMES.values()) if cases.is_slow(args) else []
    encoders = {f"{name}: encoder": lambda way=way: way.encode(video) for name, way in ways.items()}
    encoding: dict[str, list[float]] = {}
    for part in parts:
        decoders = {name: lambda way=way, lengths=LENGTHS[part]: way.decode(lengths) for name, way in ways.items()}
        candidates = decoders if encoding else {**encoders, **decoders}
        taken = bench.samples(
            candidates, args.rounds, once=[*once, *(f"{name}: encoder" for name in once)], **cases.warming(args)
        )
        decoding = {name: taken[name] for name in ways}
        shape = f"{args.preset} B={args.batch}"
        if not encoding:
            encoding = {name: taken[f"{name}: encoder"] for name in ways}
            bench.report("generation encoder", dtype, shape, timings(encoding), layer=layer)
        caption = {name: list(map(sum, zip(encoding[name], decoding[name], strict=True))) for name in ways}
        written = new_tokens(ways["ours"].found)
        print(f"\n{part}: ours writes {written} tokens")
        for name, way in ways.items():
            equal = sum(a[0].ids == b[0].ids for a, b in zip(way.found, ways["ours"].found, strict=True))
            print(f"{name}: {equal} of {args.batch} captions are ours, {sum(new_tokens(way.found))} tokens")
        shape += f" {part} tokens={sum(written)}"
        bench.report("generation decoding", dtype, shape, timings(decoding), layer=layer, tokens=sum(written))
        bench.report(
            "generation caption", dtype, shape, timings(caption), layer=layer, tokens=sum(written), peaks=peaks
        )


def timings(taken: dict[str, list[float]]) -> dict[str, bench.Timing]:
    return {name: bench.timing(values) for name, values in taken.items()}


def new_tokens(found: list[list[Hypothesis]]) -> list[int]:
    """Of each item's best hypothesis."""
    return [len(best.ids) - 1 for best, *_ in found]


def check(ways: dict[str, cases.Way], video: Tensor, model: Model, dtype: str) -> None:
    """States and scores as ours; compiles what is compiled, for one and for several tokens."""
    ours = ways["ours"]
    ours.encode(video)
    ours.decode(FORCED)
    for name, way in ways.items():
        if name != "ours":
            way.encode(video)
            cases.check_states(way.tokens, ours.tokens, dtype, name)
            way.decode(FORCED if name == GRAPH else (3, 3))
    decoder = baselines.PublishedDecoder(model.parts.decoder)
    for way in (ways[name] for name in ("ours", GRAPH) if name in ways):
        for item, found in enumerate(way.found):
            cases.check_score(decoder, way.tokens[item : item + 1], found[0], dtype)


def unequal_items(args, dtype: str, model: Model, layer: str) -> None:
    """Items that end at lengths of their own, a few at a time."""
    decoder, tokens = model.parts.decoder, cases.make_tokens(model, NUM_ITEMS)
    options = {"min_length": NATURAL[0], "max_length": NATURAL[1]}
    written = {}

    def flowing() -> None:
        written["ours"] = dict(captioning.stream(model.parts, model.tokenizer, tokens, batch_size=NUM_SLOTS, **options))

    def static() -> None:
        found = []
        for batch in tokens.split(NUM_SLOTS):
            found += beam_search(decoder, decoder.project(batch), **options)
        written["static"] = found

    def projected() -> None:
        for item in tokens:
            for _ in decoder.project_layers(item[None]):
                pass

    candidates = {"ours": flowing, f"batches of {NUM_SLOTS}": static, "keys and values alone": projected}
    taken = bench.samples(candidates, args.rounds, **cases.warming(args))
    lengths = new_tokens(written["static"])
    equal = sum(
        abs(written["ours"][i][0][1] - item[0].score) <= cases.TOLERANCES[dtype] * abs(item[0].score)
        for i, item in enumerate(written["static"])
    )
    print(f"\nlengths {sorted(lengths)}")
    if equal < NUM_ITEMS:
        raise SystemExit(f"{NUM_ITEMS - equal} of {NUM_ITEMS} items have other scores in static batches: not reported")
    shape = f"{args.preset} {NUM_ITEMS} items, {NUM_SLOTS} at a time, tokens={sum(lengths)}"
    bench.report("generation unequal items", dtype, shape, timings(taken), layer=layer, tokens=sum(lengths))


def find_peaks(args, dtype: str) -> dict[str, float]:
    options = ("--preset", args.preset, "--dtype", dtype, "--batch", str(args.batch), "--device", args.device)
    options += ("--threads", str(args.threads))
    names = {"ours": "ours", **NAMES}
    return {name: cases.peak_of(*options, "--peak-of", key) for key, name in names.items() if key != "compiled"}


def measure_peak(args) -> None:
    model = cases.make_model(args.preset, args.dtype[0], args.device)
    video = cases.make_video(model, args.batch)
    way = cases.our_way(model) if args.peak_of == "ours" else cases.published_way(model, compiled=False)
    lengths = FORCED if args.peak_of == "ours" else (2, 2)
    del model

    def caption() -> None:
        way.encode(video)
        way.decode(lengths)

    cases.print_peak(caption, args.device)


if __name__ == "__main__":
    main()
