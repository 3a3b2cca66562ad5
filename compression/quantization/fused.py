"""Which layers runtimes fuse into one, so that they have to share bits."""

from collections.abc import Iterable

Group = tuple[str, ...]  # names of layers that share bits

FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"query", "key", "value"})


def fused_groups(layers: Iterable[str]) -> list[Group]:
    """Layers that vLLM and others fuse into one: q, k and v of an attention, gate and up of an MLP.

    Args:
        layers: names in the order of the model; siblings are known by their usual last names, see FUSED.

    Returns:
        every layer in one group, most of them alone in it; groups in the order of their first layers.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        module, _, name = layer.rpartition(".")
        kind = next((min(kin) for kin in FUSED if name in kin), name)
        groups.setdefault((module, kind), []).append(layer)
    return [tuple(group) for group in groups.values()]
