"""Embedding and head on a grid: the two ends of a model, which often are one matrix.

A head is a linear like any other, and GPTQ rounds it by H = X^T X of what it reads, the states behind the final norm.
An embedding is read row by row, so each weight's error counts by itself, and the nearest value is the best. A matrix W
that serves as both, W' when rounded, errs in both ways; GPTQ then goes by their sum

    ||X (W - W')^T||^2 / tokens + mu mean(diag H) ||W - W'||^2

which is the error of a linear that reads, beside X, each input alone (mu: EMBEDDED).
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor, nn

from compression.core.errors import Problem
from compression.quantization.bits import check_group_size
from compression.quantization.grid import Grid, fit_grid
from compression.quantization.method import Settings
from compression.quantization.scheme import Anatomy, Scheme
from compression.statistics import Gram
from compression.walk import Walk

ROWS = 2048  # at a time
EMBEDDED = 0.1  # mu: SmolLM2's embedding of 4 bits costs 5.1 % of perplexity, as against 5.7 % at 0.03 and at 0.3


def check_ends(outer: Mapping[str, Tensor], schemes: Mapping[str, Scheme]) -> None:
    """Raises Problem when a group size does not divide the width of an end, or its weights are not finite.

    Args:
        outer: the tensors outside the blocks, by full name.
        schemes: by end.
    """
    for layer, scheme in schemes.items():
        weight = outer[f"{layer}.weight"]
        check_group_size({layer: list(weight.shape)}, scheme.group_size)
        if not weight.isfinite().all():
            raise Problem(f"{layer}.weight", "holds NaN or infinite values", "is the model file whole?")


def what_ends_read(walk: Walk, ends: Collection[str], model: Anatomy) -> dict[str, Gram]:
    """X^T X of those ends of which it is known what they read, by module: a head, or an embedding that serves as one.

    Args:
        walk: behind the last block.
        ends: the modules that are to be rounded.
    """
    if model.head is None:
        return {}
    reader = model.embedding if model.tied else model.head
    if reader not in ends:
        return {}
    read = _what_head_reads(walk, model.head)
    if model.tied:
        alone = torch.eye(len(read.matrix()), device=walk.hidden.device)
        read.update(alone * (EMBEDDED * read.matrix().diagonal().mean() * read.tokens).sqrt())
    return {reader: read}


def round_end(
    weight: Tensor, scheme: Scheme, method: ModuleType, settings: Settings, read: Gram | None
) -> tuple[Tensor, Grid]:
    """Codes int8 [rows, d] and grid of an embedding or a head.

    Args:
        weight: W [rows, d].
        method: rounds W, where it is known what it reads, on the scheme's group size and symmetry.
        settings: the rest of them.
        read: X^T X; None: W is rounded to nearest, clipped where that errs less.
    """
    settings = replace(settings, group_size=scheme.group_size, symmetric=scheme.symmetric)
    alike = torch.ones(weight.shape[1], device=weight.device)
    parts: list[tuple[Tensor, Grid]] = []
    for part in weight.split(len(weight) if scheme.group_size == "tensor" else ROWS):
        if read is None:
            grid = fit_grid(part, scheme.bits, scheme.group_size, scheme.symmetric, alike)
            parts.append((grid.codes(part), grid))
        else:
            done = method.quantize(part, scheme.bits, settings, read)
            parts.append((done.codes, done.grid))
    scales = [grid.scale for _, grid in parts]
    zeros = [grid.zero for _, grid in parts if grid.zero is not None]
    return torch.cat([codes for codes, _ in parts]), Grid(
        scheme.bits, torch.cat(scales), torch.cat(zeros) if zeros else None
    )


def _what_head_reads(walk: Walk, head: str) -> Gram:
    """X^T X of the head's inputs; the head itself, the largest product of a small model, is not computed."""
    model = walk.skeleton.model
    read = Gram(model.get_parameter(f"{head}.weight").shape[1], walk.hidden.device)

    def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read.update(inputs[0])
        raise _Seen

    hook = model.get_submodule(head).register_forward_pre_hook(see)
    try:
        for states, ids in zip(walk.hidden.split(len(walk.batches[0])), walk.batches, strict=True):
            with suppress(_Seen):
                walk.skeleton.end(states, ids)
    finally:
        hook.remove()
    return read


class _Seen(Exception):
    pass
