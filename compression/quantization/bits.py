"""How many bits each layer gets, and which groups of inputs may share a scale."""

from compression.core.errors import Problem


def bits_by_sensitivity(
    sensitivity: dict[int, float], layers: dict[str, int], share: float, bits: int, sensitive_bits: int
) -> dict[str, int]:
    """The most sensitive blocks get `sensitive_bits`, all others `bits`.

    All layers of a block share a width, so that what runtimes fuse (q, k and v; gate and up) is never torn.

    Args:
        sensitivity: of each block; larger suffers more. Ties go to the earlier block.
        layers: block of each layer.
        share: of the blocks that count as sensitive, in [0, 1], rounded to whole blocks.

    Returns:
        bits by layer, in the order of `layers`.
    """
    ranked = sorted(sensitivity, key=lambda block: (-sensitivity[block], block))
    chosen = set(ranked[: round(share * len(ranked))])
    return {layer: sensitive_bits if block in chosen else bits for layer, block in layers.items()}


def check_group_size(layers: dict[str, list[int]], group_size: int, key: str = "quantize.group_size") -> None:
    """Raises Problem when the group size does not divide a layer's number of inputs."""
    for layer, (_, width) in layers.items():
        if width % group_size:
            fitting = [size for size in (16, 32, 64, 128, 256) if all(w % size == 0 for _, w in layers.values())]
            raise Problem(
                f"params.yaml: {key}",
                f"{group_size} does not divide the {width} inputs of {layer}",
                f"sizes that divide every layer: {', '.join(map(str, fitting)) or 'none of the usual ones'}",
            )
