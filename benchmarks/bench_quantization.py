"""int8 linear layers against bfloat16 and float32: layers alone, vision encoder, a decoding step, bytes of the weights.

Random weights of `large`; --blocks and --layers build less of it, as the time a block takes does not depend on their
number. Rows of a table are one shape, run in turn in one process.
"""

from dataclasses import replace

import bench
import torch

from mplug2 import compose
from mplug2.config import get_config
from mplug2.generation.cache import new_cache, step
from mplug2.modules.layers import Linear
from mplug2.quantization import Int8Linear, quantize_int8, weight_bytes

LAYERS = ((1024, 3072, None), (1024, 1024, None), (1024, 4096, "quick_gelu"), (4096, 1024, None))
INT8 = "int8, rest bfloat16"
DTYPES = {INT8: torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def run_layer(args, rows: int, width: int, out: int, activation: str | None) -> None:
    runs = {}
    for name, dtype in DTYPES.items():
        layer, x = Linear(width, out).to(dtype), torch.randn(rows, width).to(dtype)
        layer = Int8Linear(layer) if name == INT8 else layer
        runs[name] = lambda layer=layer, x=x: layer(x, activation=activation)
    timings = bench.measure(runs, args.rounds)
    shape = f"{activation or 'bias'}: rows={rows} D={width} out={out}"
    bench.report("linear", "int8", shape, timings, ours=INT8, gflop=2e-9 * rows * width * out)


def run_model(args) -> None:
    config = get_config("large")
    config = replace(
        config,
        vision=replace(config.vision, num_layers=args.blocks),
        decoder=replace(config.decoder, num_layers=args.layers),
    )
    video = torch.randn(1, 3, args.frames, config.vision.image_size, config.vision.image_size)
    ids = torch.full((args.beams, 1), 1000)
    encode, decode = {}, {}
    for name, dtype in DTYPES.items():
        parts = compose(["video-captioning"], config, dtype=dtype).eval()
        if name == INT8:
            quantize_int8(parts)
        print(f"{name}: {weight_bytes(parts) / 1e6:.0f} MB of weights")
        encode[name] = lambda vision=parts.vision, dtype=dtype: vision(video.to(dtype))
        tokens = torch.randn(1, 1 + args.frames * 256, config.text.width).to(dtype)
        decoder, context = parts.decoder, parts.decoder.project(tokens)
        decode[name] = lambda d=decoder, c=context: step(d, ids, c, new_cache(d, 20))
    shape = f"{args.blocks} blocks, T={args.frames}"
    bench.report("vision encoder", "int8", shape, bench.measure(encode, args.rounds), ours=INT8)
    shape = f"{args.layers} layers, {args.beams} beams"
    bench.report("decoding step", "int8", shape, bench.measure(decode, args.rounds), ours=INT8)


def main() -> None:
    args = bench.arguments(__doc__, blocks=24, layers=12, frames=16, beams=5)
    bench.start()
    with torch.no_grad():
        run_model(args)
        for rows in (257 * args.frames, 40, args.beams):
            for width, out, activation in LAYERS:
                run_layer(args, rows, width, out, activation)
    bench.finish()


if __name__ == "__main__":
    main()
