"""Bits by layer, out of section `quantize` and the sensitivity table."""

import sys
from collections.abc import Mapping
from functools import partial
from math import log, prod

import pandas as pd

from compression.core.errors import Problem
from compression.quantization import plan
from compression.quantization.fused import Group, fused_groups
from compression.quantization.packed import Layout
from tasks.params.quantize import Quantize

KEY = "quantize.average_bits"


def bits_by_layer(params: Quantize, table: pd.DataFrame | None, layers: Mapping[str, list[int]]) -> dict[str, int]:
    """What each layer gets; no plan tears apart what runtimes fuse.

    Rules that go by scores deal out widths to whole blocks, as CPTQuant does, by the mean score of their layers. Rules
    that go by costs deal them out to fused groups, by the sum of their layers' costs.

    Args:
        table: of stage sensitivity; not looked at for a uniform plan.
        layers: shape [out, in] of each layer, in the order of the model.

    Raises:
        Problem: the table does not fit, or no plan keeps to the budget or the ceiling.
    """
    bits = _chosen(params, table, layers)
    plan.check_plan(bits, fused_groups(layers))
    return bits


def _chosen(params: Quantize, table: pd.DataFrame | None, layers: Mapping[str, list[int]]) -> dict[str, int]:
    fused = fused_groups(layers)
    if params.plan == "uniform":
        return plan.by_layer(plan.uniform(fused, params.bits), layers)
    assert table is not None
    if list(table["layer"]) != list(layers):
        raise Problem("the sensitivity table", "is not about the layers of this model", "run stage sensitivity again")
    if params.by not in table:
        raise Problem(
            "params.yaml: quantize.by", f"the sensitivity table has no `{params.by}`", "set sensitivity.method to it"
        )
    if table.filter(regex=f"^({params.by}|cost_.*)$").isna().any(axis=None):
        raise Problem("the sensitivity table", f"`{params.by}` is not a number for every layer", "measure it again")
    rows = table.set_index("layer")
    if params.plan in ("percentile", "kmeans"):
        blocks = plan.block_groups({str(layer): int(block) for layer, block in rows["block"].items()})
        scores = {group: float(rows.loc[list(group), params.by].mean()) for group in blocks}
        shares = dict(zip(params.widths, params.shares, strict=False))
        by_score = (
            plan.by_kmeans(scores, params.widths) if params.plan == "kmeans" else plan.by_percentile(scores, shares)
        )
        return plan.by_layer(by_score, layers)
    costs = group_costs(rows, params.by, fused, params.widths, layers)
    if params.plan == "budget":
        sizes = plan.group_sizes(fused, layers, params.widths)
        budget = params.average_bits * sum(out * width for out, width in layers.values())
        tell = partial(_tell, unit="of cost")
        return plan.by_layer(plan.by_budget(costs, sizes, budget, KEY, tell), layers)
    sizes = plan.group_sizes(fused, layers, params.widths, params.group_size, params.symmetric, layout_of(params))
    ceiling, tell = log(params.perplexity_ceiling), partial(_tell, unit="bits in the file")
    return plan.by_layer(plan.cheapest_under(costs, sizes, ceiling, "quantize.perplexity_ceiling", tell), layers)


def layout_of(params: Quantize) -> Layout:
    """How a plan's layers are stored, as long as it does make use of several widths."""
    widths = {bits for bits in [*params.widths, params.embeddings] if bits and bits < plan.UNPACKED}
    loose = not params.symmetric and isinstance(params.group_size, int) and len(widths) > 1
    return "loose" if loose else "packed"


def _tell(gap: float, unit: str) -> None:
    print(f"note: these bits are not proven to be the best; at most {gap:.3g} {unit} could be saved", file=sys.stderr)


def group_costs(
    rows: pd.DataFrame, by: str, groups: list[Group], widths: list[int], layers: Mapping[str, list[int]]
) -> dict[Group, dict[int, float]]:
    """What each group costs at each width, in nats a token where the measure says so.

    A measure that has no cost for each width has a score S: a layer of n weights then costs max(S, 0) n 4^-b, since the
    square of the rounding error falls fourfold with each bit. What is not rounded costs nothing.

    Args:
        rows: the sensitivity table by layer, which is about the dense model.
        layers: shape [out, in] by layer as it is now, smaller than in the table where pruning has cut something out.

    Raises:
        Problem: a width that was not measured.
    """
    costed = by in ("tdmpq", "measured")
    missing = [bits for bits in widths if bits < plan.UNPACKED and f"cost_{bits}" not in rows]
    if costed and missing:
        raise Problem(
            "params.yaml: quantize.widths",
            f"the sensitivity table has no cost of {missing[0]} bits",
            "name it in sensitivity.widths",
        )

    def cost(group: Group, bits: int) -> float:
        if bits >= plan.UNPACKED:
            return 0.0
        part = rows.loc[list(group)]
        if costed:
            return float(part[f"cost_{bits}"].sum())
        sizes = [prod(layers[layer]) for layer in group]
        return float((part[by].clip(lower=0) * sizes).sum()) * 4.0**-bits

    return {group: {bits: cost(group, bits) for bits in widths} for group in groups}
