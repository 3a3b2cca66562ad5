"""What is measured together: a whole block, the linears that runtimes fuse, or one linear."""

from torch import nn

from compression.core.skeleton import Skeleton, linears
from compression.quantization.fused import fused_groups


def parts(skeleton: Skeleton, index: int, per: str) -> dict[str, nn.Module]:
    """The parts of block `index`: the block itself (per `block`), its fused groups (`group`) or linears (`layer`).

    By full name; that of a group is its linears' names with blanks between them, its module a list of them.
    """
    path = f"{skeleton.path}.{index}"
    block = skeleton.model.get_submodule(path)
    if per == "block":
        return {path: block}
    layers = linears(block, path)
    if per == "layer":
        return dict(layers)
    return {" ".join(group): nn.ModuleList(layers[layer] for layer in group) for group in fused_groups(layers)}


def inner_linears(part: str, module: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a part by full name; of a linear, itself."""
    if isinstance(module, nn.Linear):
        return {part: module}
    if isinstance(module, nn.ModuleList):
        return dict(zip(part.split(), module, strict=True))  # type: ignore[arg-type]
    return linears(module, part)


def all_linears(skeleton: Skeleton, per: str) -> dict[str, dict[str, nn.Linear]]:
    """The linears of every part by full name, by part, in the order of the model; weights may be on the meta device."""
    return {
        part: inner_linears(part, module)
        for index in range(skeleton.depth)
        for part, module in parts(skeleton, index, per).items()
    }


def by_layer(skeleton: Skeleton, per: str, scores: dict[str, float]) -> dict[str, float]:
    """The score of each linear's part, by layer."""
    return {layer: scores[part] for part, layers in all_linears(skeleton, per).items() for layer in layers}


def shared_out(skeleton: Skeleton, per: str, scores: dict[str, float]) -> dict[str, float]:
    """The score of each part dealt out to its linears by their numbers of weights, by layer."""
    shares: dict[str, float] = {}
    for part, layers in all_linears(skeleton, per).items():
        sizes = {layer: linear.weight.numel() for layer, linear in layers.items()}
        shares |= {layer: scores[part] * size / sum(sizes.values()) for layer, size in sizes.items()}
    return shares
