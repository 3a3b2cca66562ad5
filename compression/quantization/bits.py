"""Which layers have a packed layout that transformers loads, and which groups of their inputs may share a scale."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from compression.core.errors import Problem
from compression.quantization.grid import GroupSize

EXPERT = re.compile(r"\.experts\.\d+\.")  # in the name of an expert's layer, see compression/core/experts.py


def check_packable(layers: Iterable[str], transposed: Collection[str]) -> None:
    """Raises Problem when a layer that is to be packed is an expert's, or lies in the files as [in, out] (GPT-2's).

    transformers fills fused experts from plain matrices only, and takes packed ones for missing without an error.
    """
    for layer in layers:
        if EXPERT.search(layer) or layer in transposed:
            kind = "experts" if EXPERT.search(layer) else "transposed weights"
            what = f"transformers does not load packed {kind}"
            raise Problem("params.yaml: quantize.method", f"{what}, and {layer} is of that kind", "valid: none")


def check_group_size(
    layers: Mapping[str, Sequence[int]], group_size: GroupSize, key: str = "quantize.group_size"
) -> None:
    """Raises Problem when the group size does not divide a layer's number of inputs."""
    if not isinstance(group_size, int):
        return
    for layer, (_, width) in layers.items():
        if width % group_size:
            fitting = [size for size in (16, 32, 64, 128, 256) if all(w % size == 0 for _, w in layers.values())]
            raise Problem(
                f"params.yaml: {key}",
                f"{group_size} does not divide the {width} inputs of {layer}",
                f"sizes that divide every layer: {', '.join(map(str, fitting)) or 'none of the usual ones'}",
            )
