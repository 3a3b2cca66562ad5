"""Kernels compute what the codes stand for, take what fits them, and keep no weight beside the codes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compression.core.checkpoint import Checkpoint
from compression.evaluation import kernels
from compression.evaluation.kernels import NONE, Int4Linear, Int8Linear, kernel_for, use_kernels
from compression.importing import import_model
from compression.quantization.grid import Grid, GroupSize, fit_grid
from compression.quantization.method import Settings
from tests import tiny
from tests.compression.helpers import quantize, whole_model
from tests.reference import kernels as reference

BFLOAT16 = torch.bfloat16
FEW, MANY = 3, 80  # rows on either side of what kernels are for

# shape, bits, group size, symmetric, kernel
FITTING: list[tuple[tuple[int, int], int, GroupSize, bool, str]] = [
    ((128, 192), 4, 64, True, "int4"),
    ((128, 192), 4, 64, False, "int4"),
    ((64, 96), 3, 96, True, "int4"),  # 96 are three times 32
    ((64, 96), 2, 32, False, "int4"),
    ((64, 64), 4, "row", True, "int4"),
    ((64, 64), 4, "tensor", False, "int4"),
    ((128, 192), 8, 64, True, "int4 twice"),
    ((128, 192), 8, 64, False, "int4 twice"),
    ((64, 96), 5, 32, True, "int4 twice"),
    ((64, 64), 6, "row", False, "int4 twice"),
    ((48, 96), 8, "row", True, "int8"),
    ((64, 32), 7, "tensor", True, "int8"),
]
OTHERS: list[tuple[tuple[int, int], int, GroupSize, bool]] = [
    ((96, 64), 4, 64, True),  # outputs that are no multiple of 64
    ((64, 64), 4, 16, True),  # groups that no kernel has
    ((64, 48), 4, 48, True),
    ((64, 80), 8, "row", True),  # inputs that are no multiple of 32
]


def random_layer(
    shape: tuple[int, int], bits: int, group_size: GroupSize, symmetric: bool = True
) -> tuple[Tensor, Grid]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits)).to(BFLOAT16)
    grid = fit_grid(weight + (0 if symmetric else 0.5), bits, group_size, symmetric)
    return grid.codes(weight), grid


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize(("shape", "bits", "group_size", "symmetric", "kernel"), FITTING)
def test_equals_the_product_with_the_values(
    shape: tuple[int, int], bits: int, group_size: GroupSize, symmetric: bool, kernel: str, rows: int
) -> None:
    codes, grid = random_layer(shape, bits, group_size, symmetric)
    assert (grid.zero is None) == symmetric
    assert kernel_for(shape, grid) == kernel
    draw = torch.Generator().manual_seed(0)
    bias = torch.randn(shape[0], generator=draw).to(BFLOAT16)
    x = torch.randn(2, rows, shape[1], generator=draw).to(BFLOAT16)[1]
    y = (Int8Linear if kernel == "int8" else Int4Linear)(codes, grid, bias)(x)
    assert (y.dtype, y.shape) == (BFLOAT16, (rows, shape[0]))
    expected = reference.linear(x, codes, grid.scale, grid.zero, bias)
    # bfloat16 has 8 bits: inputs, weights and outputs are each right to 2^-9.
    assert (y.double() - expected).norm() <= 2**-7 * expected.norm()
    assert ((y.double() - expected).abs() <= 2**-5 * expected.square().mean().sqrt() + 2**-7 * expected.abs()).all()


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_every_code_counts_as_it_is(bits: int) -> None:
    """Inputs that are the unit vectors read off the weights, which a scale of one makes whole numbers: no rounding."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (64, 64), generator=draw).to(torch.int8)
    grid = Grid(bits, torch.ones(64, 2, dtype=BFLOAT16))
    linear = Int4Linear(codes, grid)
    units = torch.eye(64, dtype=BFLOAT16)
    few = torch.cat([linear(unit[None]) for unit in units])
    assert few.T.equal(codes.to(BFLOAT16))
    assert linear(units.repeat(2, 1))[:64].T.equal(codes.to(BFLOAT16))


def test_strips_join(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits, group_size in ((4, 32), (8, 32), (8, "row")):
        codes, grid = random_layer((256, 64), bits, group_size)  # type: ignore[arg-type]
        linear = Int8Linear(codes, grid) if group_size == "row" else Int4Linear(codes, grid)
        x = torch.randn(MANY, 64, generator=torch.Generator().manual_seed(0)).to(BFLOAT16)
        whole = linear(x)
        with monkeypatch.context() as patched:
            patched.setattr(kernels, "STRIP", 64 * 64)
            torch.testing.assert_close(linear(x), whole)


def test_an_unknown_packing_is_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, grid = random_layer((64, 64), 4, 32)
    x = torch.randn(MANY, 64, generator=torch.Generator().manual_seed(0)).to(BFLOAT16)
    expected = reference.linear(x, codes, grid.scale, None, None)
    monkeypatch.setattr(kernels, "_tile", lambda: 0)
    y = Int4Linear(codes, grid)(x).double()
    assert (y - expected).norm() <= 2**-7 * expected.norm()


@pytest.mark.parametrize(("shape", "bits", "group_size", "symmetric"), OTHERS)
def test_what_does_not_fit_gets_no_kernel(
    shape: tuple[int, int], bits: int, group_size: GroupSize, symmetric: bool
) -> None:
    assert kernel_for(shape, random_layer(shape, bits, group_size, symmetric)[1]) == NONE


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A llama in bfloat16 whose gate and up have 96 outputs, which no kernel takes."""
    folder = tmp_path_factory.mktemp("dense")
    shape = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny.build("LlamaForCausalLM", tiny.FAMILIES["llama"][1] | shape)
    tiny.teach(model, 5)
    model.eval().save_pretrained(folder / "original")  # type: ignore[operator]
    tiny.tokenizer().save_pretrained(folder / "original")
    import_model(folder / "original", folder / "model", "bfloat16", {"source": "tiny", "licence": "none"})
    return Checkpoint(folder / "model")


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_computes_with_its_codes(dense: Checkpoint, tmp_path: Path, symmetric: bool, ids: Tensor) -> None:
    first = 8 if symmetric else 4  # transformers loads asymmetric grids alike
    packed = quantize(dense, tmp_path / "packed", first=first, settings=Settings(32, symmetric))
    plain, coded = whole_model(packed.folder, BFLOAT16), whole_model(packed.folder, BFLOAT16)
    chosen = use_kernels(coded, packed)
    assert set(chosen) == set(packed.layers)
    for layer, kernel in chosen.items():
        wide = first == 8 and ".layers.0." in layer
        expected = NONE if layer.endswith(("gate_proj", "up_proj")) else "int4 twice" if wide else "int4"
        assert kernel == expected, layer
    with torch.no_grad():
        for tokens in (ids[:1, :FEW], ids):
            expected, logits = plain(input_ids=tokens).logits.float(), coded(input_ids=tokens).logits.float()
            assert len(tokens) > 1 or not logits.equal(expected)  # kernels sum in another order, so they ran
            assert (logits - expected).norm() < 0.02 * expected.norm()
    for layer, kernel in chosen.items():
        module = coded.get_submodule(layer)
        assert isinstance(module, nn.Linear) == (kernel == NONE)
        numbers = packed.layers[layer][0] * packed.layers[layer][1]
        codes_bytes = {"int4": 0.5, "int4 twice": 1.0, NONE: 2.0}[kernel] * numbers
        held = sum(tensor.nbytes for name, tensor in module.state_dict().items() if not name.startswith("weight_"))
        assert codes_bytes <= held <= 1.3 * codes_bytes  # and scales; the plain weight would be 2 bytes each


def test_rows_run_on_int8(dense: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    packed = quantize(dense, tmp_path / "packed", settings=Settings("row"))
    plain, coded = whole_model(packed.folder, BFLOAT16), whole_model(packed.folder, BFLOAT16)
    chosen = use_kernels(coded, packed)
    assert {kernel for layer, kernel in chosen.items() if ".layers.0." in layer} == {"int8"}
    with torch.no_grad():
        expected, logits = plain(input_ids=ids).logits.float(), coded(input_ids=ids).logits.float()
    assert (logits - expected).norm() < 0.02 * expected.norm()


def test_another_type_gets_no_kernel(dense: Checkpoint, tmp_path: Path) -> None:
    """Kernels are fast with bfloat16 inputs only."""
    packed = quantize(dense, tmp_path / "packed")
    model = whole_model(packed.folder, torch.float32)
    assert set(use_kernels(model, packed).values()) == {NONE}
    assert not [module for module in model.modules() if isinstance(module, Int4Linear | Int8Linear)]
