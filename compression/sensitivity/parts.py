"""What is measured together: a whole block, or one linear."""

from torch import nn

from compression.core.skeleton import Skeleton, linears


def parts(skeleton: Skeleton, index: int, per: str) -> dict[str, nn.Module]:
    """The parts of block `index` by full name: the block itself (per `block`), or each of its linears (`layer`)."""
    path = f"{skeleton.path}.{index}"
    block = skeleton.model.get_submodule(path)
    return {path: block} if per == "block" else dict(linears(block, path))


def inner_linears(part: str, module: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a part by full name; of a linear, itself."""
    return {part: module} if isinstance(module, nn.Linear) else linears(module, part)


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
