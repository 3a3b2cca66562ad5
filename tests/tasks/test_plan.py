"""From section `quantize` and a table of sensitivity to bits by layer."""

from math import log
from typing import Any

import numpy as np
import pandas as pd
import pytest

from compression.core.errors import Problem
from compression.quantization import knapsack, plan
from tasks.checks.quantizing import plan_has_scores
from tasks.params.base import load, read
from tasks.params.quantize import Quantize
from tasks.params.sensitivity import Sensitivity
from tasks.plan import bits_by_layer, group_costs, layout_of
from tests.imports import ROOT

KINDS = {"self_attn.q_proj": 64, "self_attn.k_proj": 32, "mlp.gate_proj": 64, "mlp.up_proj": 64, "mlp.down_proj": 64}
BLOCKS = 4
LAYERS = {f"model.layers.{block}.{kind}": [out, 64] for block in range(BLOCKS) for kind, out in KINDS.items()}


def settings(**changes: Any) -> Quantize:
    document = load(ROOT / "params.yaml")
    return read(Quantize, {"quantize": document["quantize"] | {"by": "measured"} | changes})


def table(**columns: Any) -> pd.DataFrame:
    """Block b costs b + 1 hundredths at 2 bits, a tenth of it at 4 and nothing at 8; its down_proj three times that."""
    rows = []
    for layer, (out, width) in LAYERS.items():
        block = int(layer.split(".")[2])
        cost = 0.01 * (block + 1) * (3 if "down" in layer else 1)
        rows.append([layer, block, out * width, cost, cost, cost / 10, 0.0, 0.1])
    names = ["layer", "block", "parameters", "measured", "cost_2", "cost_4", "cost_8", "outlier_ratio"]
    return pd.DataFrame(rows, columns=names).assign(**columns)


def of_block(bits: dict[str, int], block: int) -> set[int]:
    return {width for layer, width in bits.items() if layer.startswith(f"model.layers.{block}.")}


def test_uniform_needs_no_table() -> None:
    assert bits_by_layer(settings(plan="uniform", bits=3), None, LAYERS) == dict.fromkeys(LAYERS, 3)


def test_percentile_widens_the_most_sensitive_blocks() -> None:
    bits = bits_by_layer(settings(plan="percentile", widths=[4, 8], shares=[0.75, 0.25]), table(), LAYERS)
    assert list(bits) == list(LAYERS)
    assert [of_block(bits, block) for block in range(BLOCKS)] == [{4}, {4}, {4}, {8}]


def test_kmeans_gives_more_bits_to_the_more_sensitive_cluster() -> None:
    bits = bits_by_layer(settings(plan="kmeans", widths=[2, 8]), table(), LAYERS)
    assert [of_block(bits, block) for block in range(BLOCKS)] == [{2}, {2}, {8}, {8}]


def test_budget_is_kept_and_spent_where_it_pays() -> None:
    params = settings(plan="budget", widths=[2, 4, 8], average_bits=4.0)
    bits = bits_by_layer(params, table(), LAYERS)
    assert 3.5 < plan.average_bits(bits, LAYERS) <= 4.0
    assert bits["model.layers.3.mlp.down_proj"] >= bits["model.layers.0.mlp.down_proj"]
    for block in range(BLOCKS):
        layer = f"model.layers.{block}"
        assert bits[f"{layer}.self_attn.q_proj"] == bits[f"{layer}.self_attn.k_proj"]
        assert bits[f"{layer}.mlp.gate_proj"] == bits[f"{layer}.mlp.up_proj"]


def test_ceiling_is_kept_with_fewer_bytes_the_higher_it_is() -> None:
    rises, sizes = [], []
    for ceiling in (1.02, 1.1, 1.3):
        bits = bits_by_layer(
            settings(plan="ceiling", widths=[2, 4, 8, 16], perplexity_ceiling=ceiling), table(), LAYERS
        )
        rows = table().set_index("layer")
        rises.append(sum(float(rows.loc[layer, f"cost_{width}"]) for layer, width in bits.items() if width < 16))
        sizes.append(plan.average_bits(bits, LAYERS))
        assert rises[-1] <= log(ceiling) + 1e-9
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_score_without_costs_ranks_layers_by_its_weights() -> None:
    (group,) = [("model.layers.1.mlp.down_proj",)]
    costs = group_costs(table().set_index("layer"), "outlier_ratio", [group], [4, 5, 16], LAYERS)
    assert costs[group] == {4: pytest.approx(0.1 * 4096 / 4**4), 5: pytest.approx(0.1 * 4096 / 4**5), 16: 0.0}


def test_a_layer_that_pruning_made_smaller_costs_less() -> None:
    """The table tells of the dense model; weights that were cut out are not rounded."""
    smaller = LAYERS | {layer: [64, 16] for layer in LAYERS if "down" in layer}
    groups = [("model.layers.1.mlp.down_proj",), ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj")]
    rows = table().set_index("layer")
    before, after = (group_costs(rows, "outlier_ratio", groups, [4], layers) for layers in (LAYERS, smaller))
    assert after[groups[0]][4] == pytest.approx(before[groups[0]][4] / 4)
    assert after[groups[1]] == before[groups[1]]


@pytest.mark.parametrize(
    ("columns", "changes", "told"),
    [
        ({"cost_4": float("nan")}, {}, "`measured` is not a number for every layer"),
        ({}, {"by": "tdmpq"}, "quantize.by: the sensitivity table has no `tdmpq`"),
        ({}, {"widths": [3, 8]}, "quantize.widths: the sensitivity table has no cost of 3 bits"),
        ({"layer": [f"other.{number}" for number in range(len(LAYERS))]}, {}, "is not about the layers of this model"),
        ({}, {"average_bits": 1.5}, "quantize.average_bits: no plan keeps to"),
    ],
)
def test_a_table_that_does_not_do_is_told(columns: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    params = settings(**{"plan": "budget", "widths": [2, 4, 8]} | changes)
    with pytest.raises(Problem, match=told):
        bits_by_layer(params, table(**columns), LAYERS)


def test_costs_around_rounded_layers_do_not_foretell_a_perplexity() -> None:
    document = load(ROOT / "params.yaml")
    measure = read(Sensitivity, {"sensitivity": document["sensitivity"] | {"method": "measured", "around": 4}})
    (fault,) = plan_has_scores(settings(plan="ceiling", widths=[2, 4, 8]), measure, LAYERS)
    assert "costs around a model of 4 bits do not say how far the loss rises" in str(fault)
    assert not list(plan_has_scores(settings(plan="budget", widths=[2, 4, 8]), measure, LAYERS))


def test_sizes_are_those_of_the_layout_that_the_plan_will_have() -> None:
    assert layout_of(settings(widths=[2, 4], symmetric=True)) == "packed"
    assert layout_of(settings(widths=[2, 4], symmetric=False)) == "loose"
    assert layout_of(settings(widths=[4, 16], symmetric=False, embeddings=None)) == "packed"
    assert layout_of(settings(widths=[4, 16], symmetric=False, embeddings=8)) == "loose"
    assert layout_of(settings(widths=[2, 4], symmetric=False, group_size="tensor")) == "packed"


def test_a_plan_that_may_not_be_the_best_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = settings(plan="budget", widths=[2, 4, 8], average_bits=3.7)
    draw = np.random.default_rng(0)
    odd = table(**{f"cost_{bits}": 4.0**-bits * draw.lognormal(size=len(LAYERS)) for bits in (2, 4, 8)})
    bits_by_layer(params, odd, LAYERS)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(knapsack, "FRONT", 1)
    bits_by_layer(params, odd, LAYERS)
    assert "note: these bits are not proven to be the best; at most" in capsys.readouterr().err
