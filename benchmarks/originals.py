"""Wanda and SparseGPT as their released code goes about it, re-stated from its description.

float32, the whole model in memory, one sequence at a time, eager attention, two passes a block (collect, then go on
with the pruned block), full sorts, a Python loop over columns. It stands for that code in benchmarks/pruning.py.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


@torch.no_grad()
def prune(source: Path, method: str, wanted: str, ids: Tensor, folder: Path) -> None:
    """Prunes `source` into `folder`.

    Args:
        method: wanda or sparsegpt.
        wanted: a sparsity, or N:M.
        ids: calibration tokens int64 [N, T].
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    collect, drop = {"wanda": (add_norms, wanda), "sparsegpt": (add_outer, sparsegpt)}[method]
    inputs, arguments = first_inputs(model, ids)
    for block in model.model.layers:
        layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        sums: dict[str, Any] = dict.fromkeys(layers)

        def hook(name: str, sums: dict[str, Any] = sums) -> Any:
            def add(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
                sums[name] = collect(sums[name], given[0].reshape(-1, given[0].shape[-1]).t(), len(ids))

            return add

        hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
        for hidden in inputs:
            block(hidden, **arguments)
        for handle in hooks:
            handle.remove()
        for name, layer in layers.items():
            drop(layer, sums[name], wanted)
        inputs = [block(hidden, **arguments) for hidden in inputs]
    model.save_pretrained(folder)


def first_inputs(model: Any, ids: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """What enters the first block, a sequence at a time, and the arguments that blocks are called with."""
    inputs: list[Tensor] = []
    arguments: dict[str, Any] = {}

    class Catch(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, hidden: Tensor, **given: Any) -> None:
            inputs.append(hidden)
            arguments.update(given)
            raise InterruptedError

    blocks = model.model.layers
    blocks[0] = Catch(blocks[0])
    for row in ids.split(1):
        with suppress(InterruptedError):
            model(row, use_cache=False)
    blocks[0] = blocks[0].block
    return inputs, arguments


def add_norms(squares: Tensor | None, inputs: Tensor, samples: int) -> Tensor:
    """Mean over samples of the squared norm of every input; inputs [in, tokens]."""
    return (0 if squares is None else squares) + torch.norm(inputs, dim=1) ** 2 / samples


def wanda(layer: nn.Linear, squares: Tensor, wanted: str) -> None:
    score = layer.weight.abs() * squares.sqrt()
    if ":" in wanted:
        keep, of = map(int, wanted.split(":"))
        for start in range(0, score.shape[1], of):
            low = score[:, start : start + of].topk(of - keep, dim=1, largest=False).indices
            layer.weight.scatter_(1, start + low, 0)
        return
    order = torch.sort(score, dim=-1, stable=True).indices
    layer.weight.scatter_(1, order[:, : int(float(wanted) * score.shape[1])], 0)


def add_outer(total: Tensor | None, inputs: Tensor, samples: int) -> Tensor:
    """2 / samples times X X^T; inputs [in, tokens]."""
    scaled = (2 / samples) ** 0.5 * inputs
    return scaled.matmul(scaled.t()) + (0 if total is None else total)


def sparsegpt(layer: nn.Linear, hessian: Tensor, wanted: str, width: int = 128, damping: float = 0.01) -> None:
    weight, columns = layer.weight.clone(), layer.in_features
    keep, of = map(int, wanted.split(":")) if ":" in wanted else (0, 0)
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    index = torch.arange(columns)
    hessian[index, index] += damping * hessian.diagonal().mean()
    hessian = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(hessian, upper=True)
    for start in range(0, columns, width):
        end = min(start + width, columns)
        part, own = weight[:, start:end].clone(), upper[start:end, start:end]
        new, errors = torch.zeros_like(part), torch.zeros_like(part)
        dropped = torch.zeros_like(part, dtype=torch.bool)
        if not of:
            cost = part**2 / own.diagonal()[None] ** 2
            dropped = cost <= cost.flatten().sort().values[int(cost.numel() * float(wanted))]
        for column in range(end - start):
            if of and column % of == 0:
                cost = part[:, column : column + of] ** 2 / own.diagonal()[None, column : column + of] ** 2
                dropped.scatter_(1, column + cost.topk(of - keep, dim=1, largest=False).indices, True)
            kept = part[:, column].clone()
            kept[dropped[:, column]] = 0
            new[:, column] = kept
            error = (part[:, column] - kept) / own[column, column]
            part[:, column:] -= error[:, None].matmul(own[column, column:][None])
            errors[:, column] = error
        weight[:, start:end] = new
        weight[:, end:] -= errors.matmul(upper[start:end, end:])
    layer.weight.copy_(weight)
