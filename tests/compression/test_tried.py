"""Costs of the weights that a quantiser really gives, of fused groups, around a model of so many bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compression.core.checkpoint import Checkpoint
from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.quantization import gptq
from compression.quantization.method import Settings as GridSettings
from compression.quantization.packed import block_reader
from compression.sensitivity import cmpq, measured, pmpq, tdmpq
from compression.sensitivity.rounding import Tried, try_widths
from compression.sensitivity.settings import Settings
from tests.compression.helpers import CPU, make_skeleton, quantize, whole_model
from tests.conftest import Make
from tests.reference import sensitivity as reference

WIDTHS = (2, 4)


def tried(source: Checkpoint, folder: Path, ids: Tensor, around: int | None, rounding: str = "gptq") -> Tried:
    journal = Journal(folder / "journal")
    return try_widths(rounding, source, folder / "tried", journal, ids, WIDTHS, 16, around, CPU, torch.float32)


def skeleton_around(source: Checkpoint, own: Tried) -> Skeleton:
    return Skeleton(source.folder, source.outer(), own.block, CPU, torch.float32)


def model_around(source: Checkpoint, own: Tried) -> nn.Module:
    """The model as transformers loads it, all layers rounded to `around` bits."""
    model = whole_model(source.folder)
    for index in range(source.depth):
        for name, tensor in own.block(index).items():
            model.get_parameter(name).data.copy_(tensor)
    return model


def test_what_is_tried_is_what_gptq_gives(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """Around 4 bits, the very model that is quantised to 4 bits; around none, the dense one."""
    source = Checkpoint(imported("llama"))
    own = tried(source, tmp_path / "around", ids, 4)
    settings = GridSettings(16, clip=True, order="activation")
    straight = quantize(source, tmp_path / "straight", method=gptq, ids=ids, settings=settings, bits=4)
    for index in range(source.depth):
        expected, found = block_reader(straight)(index), own.block(index)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    dense = tried(source, tmp_path / "dense", ids, None)
    layer = list(source.layers)[-1]
    assert torch.equal(dense.block(2)[f"{layer}.weight"], source.block(2)[f"{layer}.weight"])
    assert not torch.equal(dense.weight(layer, 4), own.weight(layer, 4))  # their inputs differ
    assert dense.weight(layer, 2).unique().numel() > 4


@pytest.mark.parametrize("around", [None, 4])
def test_measured_puts_a_group_to_what_was_tried(
    around: int | None, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    source = Checkpoint(imported("llama"))
    own = tried(source, tmp_path, ids, around)
    settings = Settings(per="group", widths=WIDTHS, group_size=16, tried=own)
    found = measured.measure(skeleton_around(source, own), ids, Journal(tmp_path / "measured"), settings)
    model = model_around(source, own)
    for bits in WIDTHS:
        tries = {layer: own.weight(layer, bits) for layer in source.layers}
        expected = reference.changed(model, "model.layers", ids, tries, "group")
        assert len(set(expected.values())) == (1 if bits == around else 12)
        for _, group in reference.parts(model, "model.layers", "group"):
            whole = sum(found[f"cost_{bits}"][layer] for layer in group)
            assert whole == pytest.approx(expected[group[0]], rel=1e-3, abs=1e-4)


def test_curvature_of_the_outputs_equals_going_token_by_token(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    source = Checkpoint(imported("llama"))
    own = tried(source, tmp_path, ids, None)
    settings = Settings(per="layer", widths=WIDTHS, group_size=16, tried=own, curvature="outputs")
    found = tdmpq.measure(skeleton_around(source, own), ids, Journal(tmp_path / "tdmpq"), settings)
    for bits in WIDTHS:
        tries = {layer: own.weight(layer, bits) for layer in source.layers}
        expected = reference.tdmpq_of_outputs(whole_model(source.folder), "model.layers", ids, tries)
        assert found[f"cost_{bits}"] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_curvature_of_the_outputs_foretells_what_gptq_costs(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """Better than the diagonal, which takes no notice that GPTQ's errors cancel."""
    source = Checkpoint(imported("llama"))
    own = tried(source, tmp_path, ids, None)

    def total(curvature: str) -> float:
        settings = Settings(per="layer", widths=WIDTHS, group_size=16, tried=own, curvature=curvature)
        journal = Journal(tmp_path / curvature)
        return sum(tdmpq.measure(skeleton_around(source, own), ids, journal, settings)["cost_2"].values())

    settings = Settings(per="layer", widths=WIDTHS, group_size=16, tried=own)
    journal = Journal(tmp_path / "measured")
    true = sum(measured.measure(skeleton_around(source, own), ids, journal, settings)["cost_2"].values())
    assert abs(np.log(total("outputs") / true)) < abs(np.log(total("diagonal") / true))


def test_pmpq_of_groups_equals_one_model_a_group(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    settings = Settings(per="group", sparsity=0.6)
    found = pmpq.measure(make_skeleton(imported("llama")), ids, Journal(tmp_path), settings)["pmpq"]
    expected = reference.pmpq(whole_model(imported("llama")), "model.layers", ids, 0.6, True, "group")
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert len(set(found.values())) == 12


def test_cmpq_of_groups_compares_outputs_side_by_side(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    text = ids.view(-1, 16)
    settings = Settings(per="group", similarity="cka")
    found = cmpq.measure(make_skeleton(imported("llama")), text, Journal(tmp_path), settings)["cmpq"]
    model = whole_model(imported("llama")).double()
    assert found == pytest.approx(reference.cmpq(model, "model.layers", text, "group", reference.cka), abs=1e-4)
    assert len(set(found.values())) == 12
