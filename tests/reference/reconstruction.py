"""Layer-wise reconstruction with the whole model in memory, float64, plain autograd and Adam as it is written."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference.training import adam

Weights = dict[str, Tensor]


def block_output(model: nn.Module, block: str, hidden: Tensor, weights: Weights, ids: Tensor) -> Tensor:
    """What a block gives for `hidden` [n, T, d]: the model runs on `ids`, and the states before the block are swapped.

    Args:
        weights: take the place of the model's, by full name.
    """
    taken: list[Tensor] = []

    def swap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (hidden, *args[1:]), kwargs

    def take(_: nn.Module, __: Any, output: Any) -> None:
        taken.append(output[0] if isinstance(output, tuple) else output)

    module = model.get_submodule(block)
    handles = [module.register_forward_pre_hook(swap, with_kwargs=True), module.register_forward_hook(take)]
    functional_call(model, weights, kwargs={"input_ids": ids, "use_cache": False})
    for handle in handles:
        handle.remove()
    return taken[0]


def reconstruct(
    dense: nn.Module,
    pruned: nn.Module,
    blocks: list[str],
    keep: dict[str, Tensor],
    adapters: dict[str, tuple[Tensor, Tensor]],
    scaling: float,
    ids: Tensor,
    embedded: Tensor,
    order: list[list[int]],
    rates: list[float],
    clip: float,
) -> tuple[Weights, list[tuple[float, float]]]:
    """Reconstructs block after block, and never looks back at whether it got worse.

    Args:
        dense, pruned: whole models in float64; left as they are.
        blocks: full names of the blocks.
        keep: masks by layer.
        adapters: A and B at the start, by layer: these and the norms learn, W' = W + s M o (B A). Without any, every
            parameter of the block learns.
        scaling: s.
        embedded: states that enter block 0 [N, T, d].
        order: rows of each step.
        rates: learning rate of each step.
        clip: of the norm of the whole gradient.

    Returns:
        all weights of the model in the end, and relative errors before and after, by block.
    """
    own, original = dict(pruned.named_parameters()), dict(dense.named_parameters())
    weights = {name: parameter.detach().clone() for name, parameter in own.items()}
    hidden, errors = embedded, []
    for block in blocks:
        inside = [name for name in own if name.startswith(f"{block}.")]
        layers = [layer for layer in keep if layer.startswith(f"{block}.")]
        with torch.no_grad():
            target = block_output(dense, block, hidden, original, ids)
            scale = (target - hidden).square().mean()
        if adapters:
            start = {name: weights[name] for name in inside if weights[name].ndim == 1}
            start |= {f"{layer}.{which}": adapters[layer]["AB".index(which)] for layer in layers for which in "AB"}
        else:
            start = {name: weights[name] for name in inside}

        def merged(values: Weights, weights: Weights = weights, layers: list[str] = layers) -> Weights:
            full = weights | {name: value for name, value in values.items() if name in weights}
            for layer in layers:
                if adapters:
                    update = values[f"{layer}.B"] @ values[f"{layer}.A"]
                    full[f"{layer}.weight"] = weights[f"{layer}.weight"] + scaling * keep[layer] * update
                else:
                    full[f"{layer}.weight"] = full[f"{layer}.weight"] * keep[layer]
            return full

        def error(
            values: Weights, rows: list[int], block: str = block, hidden: Tensor = hidden, target: Tensor = target,
            scale: Tensor = scale, merged: Any = merged,
        ) -> Tensor:  # fmt: skip
            out = block_output(pruned, block, hidden[rows], merged(values), ids[rows])
            return (out - target[rows]).square().mean() / scale

        everything = list(range(len(ids)))
        values = {name: value.double() for name, value in start.items()}
        gradients: dict[str, list[Tensor]] = {name: [] for name in start}
        before = error(values, everything).item()
        for step, rows in enumerate(order):
            leaves = {name: value.detach().requires_grad_(True) for name, value in values.items()}
            found = torch.autograd.grad(error(leaves, rows), list(leaves.values()))
            norm = torch.cat([gradient.flatten() for gradient in found]).norm().item()
            for name, gradient in zip(leaves, found, strict=True):
                gradients[name].append(gradient * min(1.0, clip / (norm + 1e-6)))
                values[name] = adam(start[name], gradients[name], rates[: step + 1], float("inf"))
        weights = {name: value.detach() for name, value in merged(values).items()}
        with torch.no_grad():
            errors.append((before, error(values, everything).item()))
            hidden = block_output(pruned, block, hidden, weights, ids)
    return weights, errors
