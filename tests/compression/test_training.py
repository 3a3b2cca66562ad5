"""The layer that learns under its mask, the loop that can be killed, the draw that repeats nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.quantization import rtn
from compression.quantization.grid import Grid
from compression.quantization.method import Settings
from compression.retraining.parameters import free
from compression.training import loop
from compression.training.cross_entropy import mixed_cross_entropy
from compression.training.loop import Recipe, train
from compression.training.masked_linear import LORA_PRUNE, MASK_LORA, SCALE_LORA, MaskedLinear, attach
from compression.training.scaled_linear import ScaledLinear
from compression.training.text import Shuffled, next_token_loss
from tests.compression.helpers import Killed, whole_model
from tests.conftest import Make
from tests.reference import training as reference

ROWS, WIDTH, RANK = 6, 8, 3
NONE = {"biases": False, "norms": False, "head": False, "embeddings": False}
FORMS = {"mask_lora": MASK_LORA, "scale_lora": SCALE_LORA, "lora_prune": LORA_PRUNE}
every_form = pytest.mark.parametrize("form", FORMS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked(
    dtype: torch.dtype = torch.float64, bias: bool = True, grid_bits: int | None = None, form: str = "mask_lora"
) -> MaskedLinear:
    """A layer in the middle of its training: neither A nor B is at its start."""
    linear = nn.Linear(WIDTH, ROWS, bias=bias, dtype=dtype).requires_grad_(False)
    keep = torch.rand(ROWS, WIDTH, generator=seeded(1)) < 0.5
    linear.weight.copy_(torch.randn(ROWS, WIDTH, generator=seeded(2)) * keep)
    if bias:
        linear.bias.copy_(torch.randn(ROWS, generator=seeded(3)))
    grid = rtn.quantize(linear.weight, grid_bits, Settings(4)).grid if grid_bits else None
    layer = MaskedLinear(linear, keep, RANK, 6.0, seeded(4), grid, FORMS[form])
    layer.B.data = torch.randn(ROWS, RANK, generator=seeded(5))
    if dtype == torch.float64:
        layer.A.data, layer.B.data = layer.A.data.double(), layer.B.data.double()
    return layer


@every_form
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_equal_autograd(bias: bool, form: str) -> None:
    layer = masked(bias=bias, form=form)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=seeded(6)).requires_grad_()
    out = torch.randn(2, 5, ROWS, dtype=torch.float64, generator=seeded(7))
    y = layer(x)
    ours = torch.autograd.grad((y * out).sum(), [x, layer.A, layer.B])
    bias_term = layer.bias if bias else torch.zeros(ROWS, dtype=torch.float64)
    twin = reference.FORMS[form](x, layer.weight, bias_term, layer.keep, layer.A, layer.B, 6.0 / RANK)
    theirs = torch.autograd.grad((twin * out).sum(), [x, layer.A, layer.B])
    torch.testing.assert_close(y, twin, rtol=1e-12, atol=1e-12)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@every_form
def test_gradients_by_finite_differences(form: str) -> None:
    layer = masked(form=form)
    x = torch.randn(4, WIDTH, dtype=torch.float64, generator=seeded(6)).requires_grad_()

    def forward(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"A": A, "B": B}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.A, layer.B))


@pytest.mark.parametrize("groups", [1, 2])
def test_scales_learn_as_autograd_says(groups: int) -> None:
    """Codes of 5 bits with zero points, stored so finely that no scale is rounded."""
    linear = nn.Linear(WIDTH, ROWS, dtype=torch.float64).requires_grad_(False)
    q = torch.randint(-16, 16, (ROWS, WIDTH), dtype=torch.int8, generator=seeded(1))
    z = torch.randint(-9, 9, (ROWS, groups), dtype=torch.int8, generator=seeded(2))
    s = (torch.rand(ROWS, groups, generator=seeded(3)) + 0.1).double()
    layer = ScaledLinear(linear, q, Grid(5, s, z))
    layer.t.data = torch.randn(ROWS, groups, generator=seeded(4))
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=seeded(6)).requires_grad_()
    out = torch.randn(2, 5, ROWS, dtype=torch.float64, generator=seeded(7))
    t = layer.t.detach().double().requires_grad_()
    y = layer(x)
    twin = reference.scaled(x.flatten(0, 1), q.double(), z.double(), s, t, linear.bias).view_as(y)
    ours = torch.autograd.grad((y * out).sum(), [x, layer.t])
    theirs = torch.autograd.grad((twin * out).sum(), [x, t])
    torch.testing.assert_close(y, twin, rtol=1e-6, atol=1e-6)  # t is float32, and so is exp(t)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-5)
    layer.as_at_start = True
    start = reference.scaled(x.flatten(0, 1), q.double(), z.double(), s, torch.zeros_like(t), linear.bias)
    torch.testing.assert_close(layer(x), start.view_as(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(ROWS, 2), (ROWS, 1), (1, 1)], ids=str)
def test_what_scales_have_learned_is_what_is_packed(shape: tuple[int, int]) -> None:
    """Down to the last bit of bfloat16, for groups, rows and a whole matrix that share a scale."""
    linear = nn.Linear(WIDTH, ROWS, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    q = torch.randint(-8, 8, (ROWS, WIDTH), dtype=torch.int8, generator=seeded(1))
    layer = ScaledLinear(linear, q, Grid(4, torch.rand(shape, generator=seeded(2)).bfloat16() + 0.1))
    layer.t.data = torch.randn(shape, generator=seeded(3)) / 10
    layer(torch.eye(WIDTH, dtype=torch.bfloat16)).sum().backward()
    assert layer.t.grad is not None
    assert layer.t.grad.shape == shape
    assert torch.equal(layer(torch.eye(WIDTH, dtype=torch.bfloat16)), layer.grid().values(q).t())


def test_bias_learns_beside_the_adapter() -> None:
    layer = masked()
    layer.bias.requires_grad_(True)
    layer(torch.ones(7, WIDTH, dtype=torch.float64)).sum().backward()
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [7.0] * ROWS
    assert layer.weight.grad is None


@every_form
def test_starts_at_the_pruned_weight(form: str) -> None:
    linear = nn.Linear(WIDTH, ROWS)
    keep = torch.rand(ROWS, WIDTH, generator=seeded(1)) < 0.5
    linear.weight.data *= keep
    layer = MaskedLinear(linear, keep, RANK, 6.0, seeded(), None, FORMS[form])
    assert torch.equal(layer.merged(), linear.weight)
    largest = layer.A.detach()[1:].abs().max().item()  # the first rank of scale_lora starts at one
    assert 0.5 * WIDTH**-0.5 < largest <= WIDTH**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_merged_is_what_the_forward_pass_multiplies_with(dtype: torch.dtype, bits: int | None) -> None:
    layer = masked(dtype, bias=False, grid_bits=bits)
    merged = layer.merged()
    assert merged.dtype == dtype
    assert torch.equal(layer(torch.eye(WIDTH, dtype=dtype)), merged.t())
    assert (merged[~layer.keep] == 0).all()
    assert (merged != layer.weight).any()
    if bits:
        assert layer.grid is not None
        assert torch.equal(layer.grid.values(layer.grid.codes(merged)), merged)


def test_gradient_goes_straight_through_the_grid() -> None:
    on_grid, free_of_it = masked(grid_bits=4), masked()
    x = torch.randn(5, WIDTH, dtype=torch.float64, generator=seeded(6))
    for layer in (on_grid, free_of_it):
        layer(x).sum().backward()
    assert on_grid.A.grad is not None
    assert torch.equal(on_grid.A.grad, free_of_it.A.grad)  # type: ignore[arg-type]
    assert torch.equal(on_grid.B.grad, free_of_it.B.grad)  # type: ignore[arg-type]


def test_attach_draws_the_same_adapters_from_the_same_seed() -> None:
    def adapters(seed: int) -> list[Tensor]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
        keep = {"0": torch.ones(4, 4, dtype=torch.bool), "1.0": torch.ones(4, 4, dtype=torch.bool)}
        layers = attach(model, keep, 2, 4.0, seed)
        assert model[0] is layers["0"]
        assert model[1][0] is layers["1.0"]  # type: ignore[index]
        return [layer.A for layer in layers.values()]

    first, again, other = adapters(1), adapters(1), adapters(2)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


# The loop.


def quadratic(parameters: dict[str, nn.Parameter], fail_at: int = -1) -> Any:
    """A loss with a noisy target that depends on the step alone."""

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == fail_at:
            raise Killed
        target = torch.randn(4, generator=seeded(step))
        value = sum(((p.float() - target) ** 2).sum() for p in parameters.values())
        assert isinstance(value, Tensor)
        return value, {"loss": value.item(), "step": float(step)}

    return loss


def pair(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.full((4,), 3.0, dtype=dtype)), "b": nn.Parameter(torch.zeros(4, dtype=dtype))}


RECIPE = Recipe(steps=25, learning_rate=0.05, warmup=0.2, clip=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fail_at", [5, 10, 17, 24])
def test_killed_and_resumed_gives_the_same_bytes(dtype: torch.dtype, fail_at: int, tmp_path: Path) -> None:
    straight = pair(dtype)
    curves, stopped = train(straight, quadratic(straight), RECIPE, Journal(tmp_path / "straight"), "x", 1)

    killed = pair(dtype)
    with pytest.raises(Killed):
        train(killed, quadratic(killed, fail_at), RECIPE, Journal(tmp_path / "killed"), "x", 1)
    resumed = pair(dtype)
    again, stopped_again = train(resumed, quadratic(resumed), RECIPE, Journal(tmp_path / "killed"), "x", 1)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert again == curves
    assert curves["step"] == [float(step) for step in range(25)]
    assert stopped == stopped_again == "all steps taken"


def test_resumed_run_starts_at_the_save(tmp_path: Path) -> None:
    parameters = pair()
    with pytest.raises(Killed):
        train(parameters, quadratic(parameters, 17), RECIPE, Journal(tmp_path), "x", 1)
    seen: list[int] = []
    fresh = pair()
    inner = quadratic(fresh)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        seen.append(step)
        out: tuple[Tensor, dict[str, float]] = inner(step)
        return out

    train(fresh, loss, RECIPE, Journal(tmp_path), "x", 1)
    assert seen == list(range(17 // loop.SAVE_EVERY * loop.SAVE_EVERY, 25))


def test_loop_is_adam_with_clipping(tmp_path: Path) -> None:
    start = torch.tensor([3.0, -1.0, 0.5, 2.0])
    parameter = nn.Parameter(start.clone())
    gradients: list[Tensor] = []

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        slope = torch.randn(4, generator=seeded(step)) * 3
        gradients.append(slope)
        return (parameter * slope).sum(), {}

    train({"p": parameter}, loss, RECIPE, Journal(tmp_path), "x", 1)
    expected = reference.adam(start, gradients, reference.rates(25, 0.05, 0.2), 1.0)
    torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)


def test_small_steps_are_not_lost_in_bfloat16(tmp_path: Path) -> None:
    """A hundred steps of 1e-4 from 1.0: each alone is less than bfloat16 can tell."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    recipe = Recipe(steps=200, learning_rate=1e-4, warmup=0.0, clip=1e9)
    train({"p": parameter}, lambda _: (parameter.float().sum(), {}), recipe, Journal(tmp_path), "x", 1)
    assert parameter.item() == pytest.approx(0.99, abs=0.004)
    assert parameter.dtype == torch.bfloat16
    assert Journal(tmp_path).load()[1]["value.p"].dtype == torch.float32


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_learning_rate(steps: int, warmup: float) -> None:
    recipe = Recipe(steps, 3e-4, warmup, 1.0)
    rates = [recipe.rate(step) for step in range(steps)]
    assert rates == pytest.approx(reference.rates(steps, 3e-4, warmup))
    assert max(rates) == pytest.approx(3e-4)
    assert min(rates) > 0


def test_recipe_of_forty_steps_by_hand() -> None:
    rates = [Recipe(40, 1.0, 0.1, 1.0).rate(step) for step in range(40)]
    assert rates[:6] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 35 / 36])
    assert rates[-1] == pytest.approx(1 / 36)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_ends_training(value: float, tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(1))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        return parameter.sum() * (value if step == 3 else 1.0), {}

    with pytest.raises(Problem, match=rf"retrain: the loss is {value} at step 3\n.*lower the learning rate"):
        train({"p": parameter}, loss, RECIPE, Journal(tmp_path), "retrain", 1)


def test_gradient_that_is_not_finite_ends_training(tmp_path: Path) -> None:
    """The loss of the last step is sound, its gradient is not: the weights must not be spoilt in silence."""
    parameter = nn.Parameter(torch.ones(1))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        return (parameter * 0).sqrt().sum() if step == 24 else parameter.sum(), {}

    with pytest.raises(Problem, match=r"retrain: the gradient is (nan|inf) at step 24\n.*lower the learning rate"):
        train({"p": parameter}, loss, RECIPE, Journal(tmp_path), "retrain", 1)


def test_parameter_that_the_loss_never_meets_stays(tmp_path: Path) -> None:
    used, unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    train({"used": used, "unused": unused}, lambda _: (used.sum(), {}), RECIPE, Journal(tmp_path), "x", 1)
    assert unused.item() == 1
    assert used.item() < 1


def test_stop_rule_ends_training(tmp_path: Path) -> None:
    parameters = pair()
    curves, stopped = train(
        parameters,
        quadratic(parameters),
        RECIPE,
        Journal(tmp_path),
        "x",
        1,
        lambda figures: "enough" if figures["step"] == 6 else None,
    )
    assert len(curves["loss"]) == 7
    assert stopped == "enough at step 7"


def test_shuffled_shows_everything_once_an_epoch() -> None:
    ids = torch.arange(7)[:, None].repeat(1, 3)
    draw = Shuffled(ids, 2, seed=5)
    seen = torch.cat([draw(step) for step in range(14)])[:, 0].tolist()
    epochs = [seen[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert draw(0).shape == (2, 3)
    assert torch.equal(Shuffled(ids, 2, seed=5)(9), draw(9))
    assert [Shuffled(ids, 7, seed)(0)[:, 0].tolist() for seed in (1, 2)] != [[*range(7)]] * 2


def test_next_token_loss_is_transformers_own(original: Make, ids: Tensor) -> None:
    model = whole_model(original("llama"))
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(model, ids), model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_cross_entropy_and_its_gradient_equal_autograd(share: float) -> None:
    ids = torch.randint(0, 300, (3, 150), generator=seeded(1))
    logits = torch.randn(3, 150, 300, generator=seeded(2), dtype=torch.float64) * 3
    teacher = torch.randn(3, 150, 300, generator=seeded(3), dtype=torch.float64) * 3
    twin = logits.clone().requires_grad_()
    log_p, log_q = twin[:, :-1].log_softmax(-1), teacher[:, :-1].log_softmax(-1)
    plain = -log_p.gather(2, ids[:, 1:, None]).mean()
    expected = (1 - share) * plain + share * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    (2 * expected).backward()
    own = logits.clone().float().requires_grad_()
    loss = mixed_cross_entropy(own, ids, teacher.float() if share else None, share)
    (2 * loss).backward()
    assert twin.grad is not None
    assert own.grad is not None
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.grad.double(), twin.grad, rtol=1e-4, atol=1e-8)
    assert (own.grad[:, -1] == 0).all()


# What PERP frees.


def opt_125m() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=50272, hidden_size=768, num_hidden_layers=12, ffn_dim=3072, num_attention_heads=12
    )
    with init_empty_weights():
        model: nn.Module = transformers.OPTForCausalLM(config)
    model.tie_weights()  # type: ignore[operator]
    return model


@pytest.mark.parametrize(
    ("biases", "norms", "percent"),
    [
        (True, False, ".0816"),
        (True, True, ".0969"),
        (False, True, ".0153"),  # the paper's .0307 counts the norms' shifts, too, which here are biases
    ],
)
def test_trainable_share_of_opt_125m_as_printed(biases: bool, norms: bool, percent: str) -> None:
    model = opt_125m()
    total = sum(parameter.numel() for parameter in model.parameters())
    freed = sum(parameter.numel() for parameter in free(model, NONE | {"biases": biases, "norms": norms}).values())
    assert f"{100 * freed / total:.4f}" == f"0{percent}"


def test_norm_scales_and_shifts_of_opt_125m_as_printed() -> None:
    """The paper's LN column: the freed scales and their shifts."""
    model = opt_125m()
    total = sum(parameter.numel() for parameter in model.parameters())
    scales = free(model, NONE | {"norms": True})
    shifts = free(model, NONE | {"biases": True})
    both = sum(p.numel() + shifts[name.removesuffix("weight") + "bias"].numel() for name, p in scales.items())
    assert f"{100 * both / total:.4f}" == "0.0307"
