"""int8 linear layers (quantize="int8") against bfloat16 and float32 on a CPU: whole captions and layers alone.

    python benchmarks/bench_quantization.py --preset nano
    python benchmarks/bench_quantization.py --preset large --rounds 3

--parts, joined by commas [default: both]:
    captions  one video: encoder, decoding of 20 tokens in 5 beams from the visual tokens on, both, and the peak of a
              process of its own that makes the model and a caption; layers that are not int8 are bfloat16
    layers    linear layers of large alone, at the rows of a video, of 8 decoding items and of one

Rows of a table are run in turn in one process. Models and inputs: generation_cases.py.
"""

from __future__ import annotations

import resource

import bench
import generation_cases as cases
import torch

from mplug2.modules.layers import Linear
from mplug2.quantization import Int8Linear, weight_bytes

KINDS = ("int8", "bfloat16", "float32")
LAYERS = ((1024, 3072, None), (1024, 1024, None), (1024, 4096, "quick_gelu"), (4096, 1024, None))
ROWS = (4112, 40, 5)


def main() -> None:
    args = bench.arguments(__doc__, preset="large", parts="captions,layers", peak_of="")
    with torch.no_grad():
        if args.peak_of:
            print_peak(args.preset, args.peak_of)
            return
        bench.start()
        wanted = args.parts.split(",")
        if "captions" in wanted:
            captions(args)
        if "layers" in wanted:
            for rows in ROWS:
                for width, out, activation in LAYERS:
                    layer(args, rows, width, out, activation)
    bench.finish()


def captions(args) -> None:
    options = ("--preset", args.preset, "--threads", str(args.threads))
    peaks = {kind: cases.peak_of(*options, "--peak-of", kind) for kind in KINDS}
    encoders, decoders = {}, {}
    for kind in KINDS:
        model = cases.make_model(args.preset, kind, "cpu")
        print(f"{kind}: {weight_bytes(model.parts) / 1e6:.0f} MB of weights")
        way, video = cases.our_way(model), cases.make_video(model, 1)
        encoders[f"{kind}: encoder"] = lambda way=way, video=video: way.encode(video)
        decoders[kind] = lambda way=way: way.decode((20, 20))
    taken = bench.samples({**encoders, **decoders}, args.rounds, warm_ups=1)
    encoding = {kind: taken[f"{kind}: encoder"] for kind in KINDS}
    decoding = {kind: taken[kind] for kind in KINDS}
    caption = {kind: list(map(sum, zip(encoding[kind], decoding[kind], strict=True))) for kind in KINDS}
    for part, values in (("encoder", encoding), ("decoding", decoding), ("caption", caption)):
        timings = {kind: bench.timing(values[kind]) for kind in KINDS}
        more = {} if part == "encoder" else {"tokens": 20}
        more |= {"peaks": peaks} if part == "caption" else {}
        bench.report(f"int8 {part}", "int8", f"{args.preset} B=1, 20 tokens", timings, ours="int8", **more)


def print_peak(preset: str, kind: str) -> None:
    """Megabytes at the peak of a process that makes the model and one caption."""
    model = cases.make_model(preset, kind, "cpu")
    way = cases.our_way(model)
    way.encode(cases.make_video(model, 1))
    way.decode((20, 20))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def layer(args, rows: int, width: int, out: int, activation: str | None) -> None:
    runs = {}
    for kind in KINDS:
        dtype = bench.DTYPES["bfloat16" if kind == "int8" else kind]
        made, x = Linear(width, out).to(dtype), torch.randn(rows, width).to(dtype)
        made = Int8Linear(made) if kind == "int8" else made
        runs[kind] = lambda made=made, x=x: made(x, activation=activation)
    timings = bench.measure(runs, args.rounds)
    shape = f"{activation or 'bias'}: rows={rows} D={width} out={out}"
    bench.report("int8 linear", "int8", shape, timings, ours="int8", gflop=2e-9 * rows * width * out)


if __name__ == "__main__":
    main()
