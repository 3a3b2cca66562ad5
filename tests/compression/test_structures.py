"""What hangs together is found in every family, what cannot get smaller is refused, and the cheapest goes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.importing import import_model
from compression.surgeon.allot import allot
from compression.surgeon.structures import Key, Kind, Structure, counts, find_structures, left_out, remove
from compression.surgeon.widths import read_config
from tests import tiny
from tests.compression.helpers import all_tensors
from tests.conftest import Make
from tests.reference import allot as reference

WITH_HEADS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]
READERS = {"opt": "fc2", "bert": "output.dense", "gpt_neox": "mlp.dense_4h_to_h", "gpt2": "mlp.c_proj"}


def of_config(folder: Path, family: str, changes: dict[str, Any]) -> Checkpoint:
    """An untrained model of a family, its config changed."""
    architecture, config = tiny.FAMILIES[family]
    tiny.build(architecture, config | changes).save_pretrained(folder / "source")  # type: ignore[operator]
    tiny.tokenizer().save_pretrained(folder / "source")
    import_model(folder / "source", folder / "in", "source", {})
    return Checkpoint(folder / "in")


@pytest.mark.parametrize("family", tiny.PLAIN)
def test_units_of_every_family(family: str, imported: Make) -> None:
    source = Checkpoint(imported(family))
    found = find_structures(source, ["units"])
    assert list(found) == [(0, "units"), (1, "units"), (2, "units")]
    for (index, _), structure in found.items():
        assert structure.reader == f"{source.blocks}.{index}.{READERS.get(family, 'mlp.down_proj')}"
        assert structure.number == (128 if family == "gpt2" else 64)  # four times its width, unless it is told
        assert structure.weights == 32 * (1 + len(structure.writers))
        assert len(structure.writers) == (1 if family in READERS else 2)


@pytest.mark.parametrize("family", WITH_HEADS)
def test_a_key_value_head_goes_with_the_heads_that_share_it(family: str, imported: Make) -> None:
    structure = find_structures(Checkpoint(imported(family)), ["heads"])[1, "heads"]
    q, k, v = structure.writers
    assert structure.number == 2
    assert structure.columns.tolist() == [list(range(16)), list(range(16, 32))]
    assert structure.rows[q].tolist() == structure.columns.tolist()
    assert structure.rows[k].tolist() == structure.rows[v].tolist() == [list(range(8)), list(range(8, 16))]
    assert structure.weights == 32 * (16 + 8 + 8 + 16)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("opt", "OPTForCausalLM cannot be built with fewer heads"),
        ("bert", "BertForMaskedLM cannot be built with fewer heads"),
        ("gpt_neox", r"layers\.0\.attention\.query_key_value: heads cannot go: it holds q, k and v in one matrix"),
    ],
)
def test_heads_whose_width_hangs_on_their_number_are_refused(family: str, message: str, imported: Make) -> None:
    with pytest.raises(Problem, match=rf"{message}(.|\n)*valid: units; or heads of a model whose config.json says"):
        find_structures(Checkpoint(imported(family)), ["units", "heads"])


def renamed(source: Path, folder: Path, old: str, new: str) -> Checkpoint:
    """A checkpoint whose manifest gives some layers other names."""
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["layers"] = {name.replace(old, new): shape for name, shape in manifest["layers"].items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Checkpoint(folder)


def test_unknown_layouts_are_refused(imported: Make, tmp_path: Path) -> None:
    with pytest.raises(
        Problem, match=r"model\.layers\.0: no units found(.|\n)*known: gate_proj, up_proj and down_proj"
    ):
        find_structures(renamed(imported("llama"), tmp_path / "one", "gate_proj", "w1"), ["units"])
    with pytest.raises(Problem, match=r"mlp\.gate_up_proj: units cannot go: it holds gate and up in one matrix"):
        find_structures(renamed(imported("llama"), tmp_path / "two", "gate_proj", "gate_up_proj"), ["units"])


def test_norm_over_all_heads_is_refused(tmp_path: Path) -> None:
    """OLMo 2 norms q and k over all heads together, so that no head goes without changing the others."""
    shape = tiny.FAMILIES["llama"][1]
    tiny.build("Olmo2ForCausalLM", shape).save_pretrained(tmp_path / "source")  # type: ignore[operator]
    tiny.tokenizer().save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "in", "source", {})
    with pytest.raises(Problem, match="Olmo2ForCausalLM cannot be built with fewer heads"):
        find_structures(Checkpoint(tmp_path / "in"), ["heads"])
    assert find_structures(Checkpoint(tmp_path / "in"), ["units"])[0, "units"].number == 64


def test_heads_of_several_widths_are_refused(tmp_path: Path) -> None:
    """Blocks of a Gemma 4 with full attention may have wider heads."""
    shape = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
    }  # fmt: skip
    tiny.build("Gemma4ForCausalLM", shape).save_pretrained(tmp_path / "source")  # type: ignore[operator]
    tiny.tokenizer().save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "in", "source", {})
    source = Checkpoint(tmp_path / "in")
    with pytest.raises(Problem, match="per_layer_config gives blocks a `head_dim` each"):
        find_structures(source, ["heads"])
    assert find_structures(source, ["units"])[2, "units"].number == 64


def test_counts_are_those_that_transformers_takes(tmp_path: Path) -> None:
    """A Llama's hidden width, 32, has to be divided by its heads, here two to a group."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    allowed = {}
    for family in ("llama", "mistral"):
        source = of_config(tmp_path / family, family, shape)
        found = find_structures(source, ["heads", "units"])
        allowed[family] = counts(read_config(source.folder), found[0, "heads"], 16)
        assert counts(read_config(source.folder), found[0, "units"], 16) == [16, 32, 48, 64]
        assert counts(read_config(source.folder), found[0, "units"], 24) == [24, 48, 64]
        assert counts(read_config(source.folder), found[0, "units"], 100) == [64]
    assert allowed == {"llama": [1, 2, 4], "mistral": [1, 2, 3, 4]}


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_removal_takes_rows_biases_and_no_more(family: str, imported: Make) -> None:
    source = Checkpoint(imported(family))
    kinds: list[Kind] = ["units"] if family == "opt" else ["units", "heads"]
    tensors = all_tensors(source)
    for (_, kind), structure in find_structures(source, kinds).items():
        removed = torch.tensor([0] if kind == "heads" else [3, 5, 63])
        changed, masks = remove(tensors, structure, removed)
        assert masks.keys() == {*structure.writers, structure.reader}
        assert sum(int((~mask).sum()) for mask in masks.values()) == len(removed) * structure.weights
        assert torch.equal(changed[f"{structure.reader}.weight"], tensors[f"{structure.reader}.weight"])
        for name, tensor in tensors.items():
            layer, _, part = name.rpartition(".")
            if layer in structure.writers:
                rows = masks[layer].any(1)
                assert torch.equal(changed[name], tensor * (rows if part == "bias" else rows[:, None]))
            else:
                assert changed[name] is tensor
        columns = masks[structure.reader]
        assert not columns[:, structure.columns[removed].flatten()].any()
        assert columns[:, structure.columns[left_out(structure, removed)].flatten()].all()


COSTS = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 5.0])  # sums are exact, and there are ties


@st.composite
def blocks(draw: Any, same: bool) -> tuple[dict[Key, Tensor], dict[Key, int], dict[Kind, list[int]], int]:
    """Costs, weights, counts and a budget for one to three blocks with heads, units or both."""
    depth = draw(st.integers(1, 3))
    kinds: list[Kind] = draw(st.sampled_from([["units"], ["heads"], ["units", "heads"]]))
    costs, weights, allowed = {}, {}, {}
    for kind in kinds:
        number = draw(st.integers(1, 12 if kind == "units" else 4))
        multiple = draw(st.integers(1, number))
        allowed[kind] = [*range(multiple, number, multiple), number]
        size = draw(st.integers(1, 9))
        for index in range(depth):
            if same or draw(st.booleans()) or index == 0:
                costs[index, kind] = torch.tensor(draw(st.lists(COSTS, min_size=number, max_size=number)))
                weights[index, kind] = size
    most = sum(weights[key] * (len(cost) - min(allowed[key[1]])) for key, cost in costs.items())
    return costs, weights, allowed, draw(st.integers(0, most + 2))


def plain(costs: dict[Key, Tensor]) -> dict[tuple[int, str], list[float]]:
    return {key: cost.tolist() for key, cost in costs.items()}


@given(blocks(same=True))
def test_same_widths_are_the_cheapest_pair(
    case: tuple[dict[Key, Tensor], dict[Key, int], dict[Kind, list[int]], int],
) -> None:
    costs, weights, allowed, budget = case
    depth = 1 + max(index for index, _ in costs)
    expected = reference.same(plain(costs), dict(weights), dict(allowed), budget)
    if expected is None:
        with pytest.raises(Problem, match="can give up no more than"):
            allot(costs, weights, allowed, budget, True, depth)
        return
    kept = allot(costs, weights, allowed, budget, True, depth)
    for key, cost in costs.items():
        own, kind = kept[key], key[1]
        assert len(own) in allowed[kind]
        assert own.tolist() == sorted(set(own.tolist()))
        assert len({len(kept[other]) for other in costs if other[1] == kind}) == 1
        gone = sorted(set(range(len(cost))) - set(own.tolist()))
        assert sorted(cost[gone].tolist()) == sorted(cost.tolist())[: len(gone)]
    removed = {key: len(cost) - len(kept[key]) for key, cost in costs.items()}
    total = sum(sum(sorted(cost.tolist())[: removed[key]]) for key, cost in costs.items())
    best = {key: len(cost) - expected[key[1]] for key, cost in costs.items()}
    assert total == sum(sum(sorted(cost.tolist())[: best[key]]) for key, cost in costs.items())
    assert budget <= sum(removed[key] * weights[key] for key in costs) == sum(best[key] * weights[key] for key in costs)


@given(blocks(same=False))
def test_one_threshold_takes_the_cheapest_by_weight(
    case: tuple[dict[Key, Tensor], dict[Key, int], dict[Kind, list[int]], int],
) -> None:
    costs, weights, allowed, budget = case
    depth = 1 + max(index for index, _ in costs)
    expected = reference.threshold(plain(costs), dict(weights), dict(allowed), budget)
    if expected is None:
        with pytest.raises(Problem, match="can give up no more than"):
            allot(costs, weights, allowed, budget, False, depth)
        return
    kept = allot(costs, weights, allowed, budget, False, depth)
    assert {key: set(own.tolist()) for key, own in kept.items()} == expected


def test_what_is_gone_already_goes_first() -> None:
    """It costs nothing, so a second shot builds on the first."""
    costs: dict[Key, Tensor] = {(0, "units"): torch.tensor([3.0, 0.0, 2.0, 0.0, 1.0, 4.0])}
    kept = allot(costs, {(0, "units"): 10}, {"units": [1, 2, 3, 4, 5, 6]}, 30, True, 1)
    assert kept[0, "units"].tolist() == [0, 2, 5]


def test_no_count_is_no_way() -> None:
    with pytest.raises(Problem, match="no number of units that may stay"):
        allot({(0, "units"): torch.ones(4)}, {(0, "units"): 1}, {"units": []}, 1, True, 1)


def test_same_widths_and_dense_blocks_contradict_each_other() -> None:
    costs: dict[Key, Tensor] = {(index, "heads"): torch.ones(4) for index in (0, 2)}
    weights = dict.fromkeys(costs, 10)
    with pytest.raises(Problem, match=r"same width in every block(.|\n)*keep all their heads\n.*let widths differ"):
        allot(costs, weights, {"heads": [1, 2, 3, 4]}, 10, True, 3)
    kept = allot(costs, weights, {"heads": [1, 2, 3, 4]}, 50, False, 3)
    assert {key: own.tolist() for key, own in kept.items()} == {(0, "heads"): [3], (2, "heads"): [2, 3]}


def test_a_structures_weights_are_counted_once(imported: Make) -> None:
    """All units and heads together are all the weights of a block's linears."""
    source = Checkpoint(imported("llama"))
    found: dict[Key, Structure] = find_structures(source, ["units", "heads"])
    total = sum(structure.weights * structure.number for structure in found.values())
    assert total == sum(rows * width for rows, width in source.layers.values())
