"""Which groups of inputs may share a scale."""

from collections.abc import Mapping, Sequence

from compression.core.errors import Problem
from compression.quantization.grid import GroupSize


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
