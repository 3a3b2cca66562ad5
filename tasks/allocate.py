"""Stage allocate: how many weights each layer drops, a row per layer."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module

import pandas as pd
from torch import Tensor

from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.core.files import read_tensors, write_text
from compression.core.progress import progress
from compression.pruning import METHODS, allocation
from compression.pruning.pattern import NofM, make_pattern
from tasks.core.entry import run_stage
from tasks.core.paths import DATA
from tasks.params.allocate import Allocate, dense_layers
from tasks.params.base import read
from tasks.params.prune import Prune

ALLOCATION = DATA / "allocation" / "allocation.csv"
SENSITIVITY = DATA / "sensitivity" / "sensitivity.csv"
STATISTICS = DATA / "calibration" / "input_norms.safetensors"


def main() -> None:
    params, prune = read(Allocate), read(Prune)
    model = Checkpoint(DATA / "taught")
    sizes = {layer: rows * width for layer, (rows, width) in model.layers.items()}
    dropped = dict.fromkeys(sizes, 0) if prune.method == "none" else _dropped(params, prune, model, sizes)
    bounds = {layer: (count, count) for layer, count in dropped.items()}
    if prune.method == "surgeon" and params.rule == "global":
        # It finds its threshold shot by shot, and is told how far that may go.
        fixed = dict.fromkeys(sizes, (0, 0))
        bounds = fixed | allocation.bounds(sizes, params.low, params.high, dense_layers(params.dense, sizes))
    table = pd.DataFrame({"layer": list(sizes), "weights": list(sizes.values()), "dropped": list(dropped.values())})
    table["sparsity"] = table["dropped"] / table["weights"]
    table["least"], table["most"] = zip(*(bounds[layer] for layer in sizes), strict=True)
    ALLOCATION.parent.mkdir(parents=True, exist_ok=True)
    write_text(ALLOCATION, table.to_csv(index=False))


def _dropped(params: Allocate, prune: Prune, model: Checkpoint, sizes: dict[str, int]) -> dict[str, int]:
    """Number of weights that each layer drops, in the order of `sizes`."""
    dense = dense_layers(params.dense, sizes)
    pattern = make_pattern(prune.pattern, prune.sparsity, "row")  # the scope is for stage prune
    allocation.check_rule(params.rule, pattern)
    if isinstance(pattern, NofM):
        return allocation.nofm_counts(sizes, pattern, dense)
    if params.rule == "uniform" or (prune.method == "surgeon" and params.rule == "global"):
        wanted = allocation.uniform(sizes, prune.sparsity)
    elif params.rule == "global":
        budget = allocation.reachable_budget(sizes, prune.sparsity, params.low, params.high, dense)
        counts = allocation.global_counts(partial(_scores, prune.method, model, dense), budget)
        wanted = {layer: count / sizes[layer] for layer, count in counts.items()}
    else:
        wanted = _by_sensitivity(params, prune, sizes)
    return allocation.project(wanted, sizes, prune.sparsity, params.low, params.high, dense)


def _scores(method: str, model: Checkpoint, dense: set[str]) -> Iterator[tuple[str, Tensor]]:
    """|W| by layer, times the dense model's input norms where the method looks at inputs; without dense layers."""
    weighed = import_module(METHODS[method]).STATISTIC is not None
    norms = read_tensors(STATISTICS) if weighed else {}
    for block in progress(range(model.depth), what="allocate", unit="block"):
        tensors = model.block(block)
        for layer in model.layers:
            if f"{layer}.weight" in tensors and layer not in dense:
                score = tensors[f"{layer}.weight"].abs().float()
                yield layer, score * norms[layer] if weighed else score


def _by_sensitivity(params: Allocate, prune: Prune, sizes: dict[str, int]) -> dict[str, float]:
    """The sparsities that rules `owl` and `pmpq` want."""
    table = pd.read_csv(SENSITIVITY)
    blocks = dict(zip(table["layer"], table["block"].astype(int), strict=True))
    if params.rule == "owl":
        ratios = dict(zip(table["layer"], table["outlier_ratio"], strict=True))
        return allocation.owl(ratios, sizes, blocks, prune.sparsity, params.spread)
    if "pmpq" not in table or table["pmpq"].isna().any():
        raise Problem(
            "params.yaml: allocate.rule",
            "the sensitivity table has no `pmpq`",
            "set sensitivity.method to pmpq, or allocate.rule to uniform, owl or global",
        )
    scores = dict(enumerate(table.groupby("block")["pmpq"].mean().tolist()))
    return allocation.by_block(scores, blocks, prune.sparsity, params.spread)


if __name__ == "__main__":
    run_stage(main)
