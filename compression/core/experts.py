"""Mixture-of-experts layers as single linears, named as they are stored.

transformers keeps the experts of a block as two tensors of three dimensions and stores them, as their authors did, one
matrix an expert and role. Here each fused module is replaced by one with a linear for each of these matrices, under the
name that it has in the file, so that experts are layers like any other to whatever prunes, trains or rounds them, and a
checkpoint loads in transformers as it is. All experts are visited in their order, also by batches that send no token
there: batches that walk in step (compression.lockstep) meet the same layers everywhere.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from compression.core.errors import Problem

STORED = re.compile(
    r"experts\.\*\.(\w+)\.weight$"
)  # of a conversion: the matrix that becomes a slice of a fused tensor


class Expert(nn.Module):
    """One expert: gate, up and down projection, under the names that `names` gives them, in this order."""

    def __init__(self, width: int, inner: int, names: tuple[str, str, str]) -> None:
        super().__init__()
        for name, (outputs, inputs) in zip(names, ((inner, width), (inner, width), (width, inner)), strict=True):
            self.add_module(name, nn.Linear(inputs, outputs, bias=False, device="meta"))


class Experts(nn.Module):
    """Stands in for a fused module of transformers, whose activation it takes over.

    Args:
        fused: gate_up_proj [E, 2 * inner, d] and down_proj [E, d, inner], not transposed, without biases.
        names: of gate, up and down projection.
    """

    def __init__(self, fused: nn.Module, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.act_fn: Any = fused.act_fn
        self.names = names
        whole: Tensor = fused.down_proj  # type: ignore[assignment]
        count, width, inner = whole.shape
        for number in range(count):
            self.add_module(str(number), Expert(width, inner, names))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Tokens [n, d], the k experts of each [n, k] and what these count [n, k] -> [n, d]."""
        gate, up, down = self.names
        out = torch.zeros_like(hidden)
        for name, expert in self.named_children():
            if not isinstance(expert, Expert):
                continue  # the activation, where that is a module
            tokens, place = torch.where(index == int(name))
            own = hidden[tokens]
            inner = self.act_fn(expert.get_submodule(gate)(own)) * expert.get_submodule(up)(own)
            given = expert.get_submodule(down)(inner) * weights[tokens, place, None]
            out = out.index_add(0, tokens, given.to(out.dtype))
        return out


def unfuse(model: nn.Module) -> None:
    """Replaces the fused experts of a model on the meta device.

    Raises:
        Problem: experts with biases, transposed or interleaved, or stored in another way than a matrix each.
    """
    fused = [(name, module) for name, module in model.named_modules() if _is_fused(module)]
    if not fused:
        return
    names = _stored_names(model)
    for path, module in fused:
        plain = module.has_gate and module.is_concatenated
        odd = module.is_transposed or module.has_bias or module.has_post_expert_norm
        if odd or not plain or names is None:
            raise Problem(
                f"{type(model).__name__}: {path}",
                "experts with biases, transposed, interleaved, or not stored as a matrix each are not supported",
                "Mixtral, Qwen-MoE, OLMoE and DeepSeek are, and what is built like them",
            )
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, Experts(module, names))


def routes(parent: nn.Module) -> bool:
    """Whether linears that are held by this module itself choose among experts, which it holds as well."""
    return any(isinstance(child, Experts) for child in parent.children())


def _is_fused(module: nn.Module) -> bool:
    """Whether transformers' decorator has marked the module's class as one of fused experts."""
    return all(hasattr(module, mark) for mark in ("has_gate", "is_transposed", "is_concatenated", "down_proj"))


def _stored_names(model: nn.Module) -> tuple[str, str, str] | None:
    """What the family calls gate, up and down projection of an expert in its files."""
    found: dict[str, list[str]] = {}
    for step in get_model_conversion_mapping(model):
        if not isinstance(step, WeightConverter):
            continue
        matches = [STORED.search(source) for source in step.source_patterns]
        kinds = [type(operation) for operation in step.operations]
        target = step.target_patterns[0].rpartition(".")[2]
        if all(matches) and kinds in ([MergeModulelist, Concatenate], [MergeModulelist]):
            found[target] = [match[1] for match in matches if match]
    both = found.get("gate_up_proj", []) + found.get("down_proj", [])
    return (both[0], both[1], both[2]) if len(both) == 3 else None
