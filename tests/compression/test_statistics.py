"""What is summed up over the calibration tokens equals its naive twin, however the tokens come."""

import pytest
import torch
from torch import Tensor

from compression.core.errors import Problem
from compression.statistics import CHUNK, Gram, InputNorms
from tests.reference import obs as reference

TOKENS = 2 * CHUNK + 700
SPLITS = [
    [1] * TOKENS,
    [7] * (TOKENS // 7) + [TOKENS % 7],
    [CHUNK - 1, 1, TOKENS - CHUNK],
    [CHUNK + 1, TOKENS - CHUNK - 1],
]
every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def tokens(width: int, count: int = TOKENS, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs [count, width] that hang together, some of them hundreds of times as large as others."""
    draw = torch.Generator().manual_seed(width)
    mixed = torch.randn(count, width, generator=draw) @ torch.randn(width, width, generator=draw)
    return (mixed * torch.logspace(-1, 1, width)).to(dtype)


def gram(inputs: Tensor) -> Gram:
    summed = Gram(inputs.shape[-1])
    summed.update(inputs)
    return summed


@every_type
@pytest.mark.parametrize("width", [1, 3, 24, 33])
def test_gram_is_the_mean_product_of_the_inputs(width: int, dtype: torch.dtype) -> None:
    inputs = tokens(width, dtype=dtype)
    matrix, exact = gram(inputs).matrix(), inputs.double().T @ inputs.double() / len(inputs)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, matrix.T)
    sizes = exact.diagonal().sqrt()
    off = (matrix - exact).abs() / sizes / sizes[:, None]  # as a share of what the two inputs' lengths allow
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5  # of a product that comes out in bfloat16
    assert float(off.max()) <= rounding
    assert float((matrix - exact).norm() / exact.norm()) < 2e-3


@every_type
@pytest.mark.parametrize("sizes", SPLITS, ids=["one by one", "sevens", "to a chunk", "past a chunk"])
@pytest.mark.parametrize("width", [3, 33])
def test_the_split_into_batches_does_not_move_one_bit(width: int, sizes: list[int], dtype: torch.dtype) -> None:
    inputs = tokens(width, dtype=dtype)
    split = Gram(width)
    for part in inputs.split(sizes):
        split.update(part[None])  # [batch, token, in]
    assert split.tokens == TOKENS
    assert torch.equal(split.matrix(), gram(inputs).matrix())
    assert torch.equal(split.norms(), gram(inputs).norms())


def test_what_is_held_does_not_change_with_its_batch() -> None:
    """A batch's tensor may be written anew once it has been taken in."""
    inputs = tokens(8, 10)
    held, batch = Gram(8), inputs.clone()
    held.update(batch)
    batch.zero_()
    assert torch.equal(held.matrix(), gram(inputs).matrix())


def test_tokens_may_be_looked_at_before_the_last_one() -> None:
    inputs, looked = tokens(8, 90), Gram(8)
    for part in inputs.split(30):
        looked.update(part)
        looked.norms()
    torch.testing.assert_close(looked.matrix(), gram(inputs).matrix())


@pytest.mark.parametrize("statistic", [Gram, InputNorms])
def test_norms_are_the_lengths_of_the_inputs(statistic: type[Gram] | type[InputNorms]) -> None:
    inputs = tokens(24)
    inputs[:, 5] = 0
    summed = statistic(24)
    summed.update(inputs)
    norms = summed.norms()
    assert norms.dtype == torch.float32
    assert norms[5] == 0
    torch.testing.assert_close(norms, inputs.double().square().sum(0).sqrt().float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_the_share_of_the_output_that_is_lost(dtype: torch.dtype) -> None:
    inputs = tokens(24)
    weight = torch.randn(7, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    for changed in (weight * (weight.abs() > 0.5), torch.zeros_like(weight), weight * 1.5):
        exact = reference.layer_error(weight, changed, inputs)
        assert gram(inputs).error(weight, changed) == pytest.approx(exact, rel=1e-4)
    assert gram(inputs).error(weight, weight) == 0


def test_error_of_a_layer_that_gives_nothing_is_none() -> None:
    assert gram(torch.zeros(5, 4)).error(torch.ones(2, 4), torch.zeros(2, 4)) == 0
    assert gram(torch.ones(5, 4)).error(torch.zeros(2, 4), torch.zeros(2, 4)) == 0


@pytest.mark.parametrize("damping", [0.001, 0.01, 0.3])
@pytest.mark.parametrize("width", [1, 24])
def test_factor_is_that_of_the_inverse(width: int, damping: float) -> None:
    inputs = tokens(width)
    factor = gram(inputs).factor(damping)
    assert factor.damping == damping
    assert not factor.dead.any()
    assert torch.equal(factor.upper, factor.upper.triu())
    assert (factor.upper.diagonal() > 0).all()
    H, upper = reference.hessian(inputs, damping), factor.upper.double()
    torch.testing.assert_close(upper.T @ upper @ H, torch.eye(width).double(), rtol=0, atol=1e-3)


def test_damping_is_raised_until_a_singular_matrix_can_be_factored() -> None:
    """One token, many times: rank one."""
    inputs = torch.linspace(1, 2, 16).repeat(40, 1)
    factor = gram(inputs).factor(1e-12)
    assert 1e-12 < factor.damping <= 1e-2
    assert factor.upper.isfinite().all()
    upper = factor.upper.double()
    product = upper.T @ upper @ reference.hessian(inputs, factor.damping)
    torch.testing.assert_close(product, torch.eye(16).double(), rtol=0, atol=2e-2)


def test_damping_that_suffices_is_not_raised() -> None:
    assert gram(torch.linspace(1, 2, 16).repeat(40, 1)).factor(0.01).damping == 0.01


def test_what_cannot_be_factored_is_named() -> None:
    inputs = tokens(8, 20)
    inputs[3, 2] = float("inf")
    with pytest.raises(Problem, match=r"X\^T X: cannot be factored"):
        gram(inputs).factor(0.01)


def test_dead_inputs_are_reported() -> None:
    inputs = tokens(24)
    dead = torch.arange(24) % 5 == 0
    inputs[:, dead] = 0
    factor = gram(inputs).factor(0.01)
    assert torch.equal(factor.dead, dead)
    assert (factor.upper[dead][:, ~dead] == 0).all()  # what they lose is made up for by no other
    assert (factor.upper[~dead][:, dead] == 0).all()


def test_unit_has_a_unit_diagonal_and_its_own_eigenvectors() -> None:
    inputs = tokens(24)
    (scale, matrix), (values, vectors) = gram(inputs).unit(0.01), gram(inputs).eigen(0.01)
    H = reference.hessian(inputs, 0.01)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(24))
    back = scale.double()[:, None] * matrix.double() * scale.double()
    sizes = H.diagonal().sqrt()
    assert float(((back - H).abs() / sizes / sizes[:, None]).max()) < 1e-5
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix, rtol=0, atol=1e-5)


def test_factors_do_not_change_the_sums() -> None:
    """Layers that share an input share its statistic."""
    summed = gram(tokens(8))
    before = summed.matrix()
    summed.factor(0.1)
    summed.eigen(0.1)
    assert torch.equal(summed.matrix(), before)
    assert summed.factor(0.2).damping == 0.2
