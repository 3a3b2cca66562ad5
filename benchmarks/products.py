"""Linear layers at one token and at many: bfloat16 weights against every kernel of torch's that reads fewer bits.

    python -m benchmarks.products                       # the layers of SmolLM2-135M and of Llama-2-7B
    python -m benchmarks.products 576x576 --tokens 1 --threads 1

A layer's weights come from memory, as they do in a model: so many copies take turns that together they fill CACHE.
`int4`, `int4 twice` and `int8` are the layers of compression/evaluation/kernels.py: few tokens go through the kernel,
many through strips of weights. For comparison: `int4 kernel`, whatever the tokens; `int8 x int8`, torch._int_mm of
codes with codes, for which a model would have to round its inputs (not timed); `dynamic int4`, which rounds them too.
GB/s are of weights as they are stored; the first line has what a copy reads on this machine. `speedup`: over the first.
"""

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compression.evaluation.kernels import Int4Linear, Int8Linear
from compression.quantization.grid import fit_grid

SHAPES = ["576x576", "192x576", "1536x576", "576x1536", "4096x4096", "11008x4096"]
CACHE = 2**26  # bytes: more than a share of a processor's cache
GROUP = 64
SECONDS = 0.5  # of rounds at least, for each figure

Product = Callable[[Tensor], Tensor]  # its tensors lie in it, so that a deep copy has its own


def bfloat16(weight: Tensor) -> tuple[Product, int]:
    return partial(_linear, weight), weight.nbytes


def int4(weight: Tensor, bits: int = 4) -> tuple[Product, int]:
    grid = fit_grid(weight, bits, GROUP)
    layer = Int4Linear(grid.codes(weight), grid)
    return layer, layer.packed.nbytes + layer.steps.nbytes


def int4_twice(weight: Tensor) -> tuple[Product, int]:
    return int4(weight, 8)


def int8(weight: Tensor) -> tuple[Product, int]:
    grid = fit_grid(weight, 8, "row")
    layer = Int8Linear(grid.codes(weight), grid)
    return layer, layer.codes.nbytes + layer.scale.nbytes


def int4_kernel(weight: Tensor) -> tuple[Product, int]:
    grid = fit_grid(weight, 4, GROUP)
    layer = Int4Linear(grid.codes(weight), grid)
    return partial(_int4_kernel, layer.packed, layer.steps), layer.packed.nbytes + layer.steps.nbytes


def int8_by_int8(weight: Tensor) -> tuple[Product, int]:
    codes = fit_grid(weight, 8, "row").codes(weight).t()
    return partial(_int8_by_int8, codes), codes.nbytes


def dynamic_int4(weight: Tensor) -> tuple[Product, int]:
    grid = fit_grid(weight, 4, GROUP)
    codes = (grid.codes(weight) + 8).to(torch.uint8)
    pairs, (outputs, inputs) = codes[:, ::2] | codes[:, 1::2] << 4, weight.shape
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(pairs, grid.scale.float(), None, GROUP, inputs, outputs)
    return partial(_dynamic_int4, packed, inputs, outputs), pairs.nbytes + grid.scale.nbytes


ARMS: dict[str, Callable[[Tensor], tuple[Product, int]]] = {
    "bfloat16": bfloat16,
    "int4": int4,
    "int4 twice": int4_twice,
    "int8": int8,
    "int4 kernel": int4_kernel,
    "int8 x int8": int8_by_int8,
    "dynamic int4": dynamic_int4,
}


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def _int4_kernel(packed: Tensor, steps: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, steps)


def _int8_by_int8(codes: Tensor, x: Tensor) -> Tensor:
    return torch._int_mm(x.to(torch.int8), codes)


def _dynamic_int4(packed: Tensor, inputs: int, outputs: int, x: Tensor) -> Tensor:
    return torch.ops.aten._dyn_quant_matmul_4bit(x.float(), packed, GROUP, inputs, outputs)


def measure(outputs: int, inputs: int, tokens: int, arm: str) -> dict[str, Any]:
    """Time of a product, with the weights out of memory."""
    draw = torch.Generator().manual_seed(0)
    product, size = ARMS[arm](torch.randn(outputs, inputs, generator=draw).mul_(0.05).bfloat16())
    x = torch.randn(tokens, inputs, generator=draw).bfloat16()
    turns = [partial(copied, x) for copied in [product, *(deepcopy(product) for _ in range(CACHE // size))]]
    seconds = seconds_of(turns)
    return {
        "layer": f"{outputs}x{inputs}",
        "tokens": tokens,
        "kernel": arm,
        "microseconds": 1e6 * seconds,
        "gigabytes_per_second": size / seconds / 1e9,
        "gigaflops": 2e-9 * outputs * inputs * tokens / seconds,
    }


def copy_bandwidth() -> float:
    """GB/s that are read by a copy of more than the cache holds; it writes as many."""
    source = torch.ones(2 * CACHE, dtype=torch.uint8)
    return source.nbytes / seconds_of([partial(torch.empty_like(source).copy_, source)]) / 1e9


def seconds_of(turns: list[Callable[[], Tensor]]) -> float:
    """Of one turn: the least mean over a round in which every turn is taken, of at least two rounds."""
    rounds: list[float] = []
    while len(rounds) < 3 or sum(rounds) < SECONDS:
        start = time.perf_counter()
        for turn in turns:
            turn()
        rounds.append(time.perf_counter() - start)
    return min(rounds[1:]) / len(turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    about = {"threads": chosen.threads, "capability": torch.backends.cpu.get_cpu_capability()}
    print(json.dumps(about | {"copy_gigabytes_per_second": copy_bandwidth()}), flush=True)
    for shape in chosen.shapes:
        outputs, inputs = map(int, shape.split("x"))
        for tokens in chosen.tokens:
            base = None
            for arm in chosen.arms:
                row = measure(outputs, inputs, tokens, arm)
                base = base or row["microseconds"]
                print(json.dumps(row | {"speedup": base / row["microseconds"]}), flush=True)


if __name__ == "__main__":
    main()
