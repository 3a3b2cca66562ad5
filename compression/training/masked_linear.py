"""A pruned linear layer that learns through a low-rank product, in the forms that PERP compares.

    mask_lora    W' = W + s M o (B A)          s = alpha / r,  o the elementwise product
    scale_lora   W' = W o (B A)
    lora_prune   W' = W + s (B A) in training, merged as mask_lora: what the mask takes away then is a jump

W [out, in] pruned and frozen, M its mask, A [r, in] and B [out, r] trained (Zimmer et al. 2023, arXiv 2312.15230,
section on sparsity-preserving adapters). On a grid, W' is rounded to it and the gradient passes straight through the
rounding, so that what is learned is what will be packed.

The released layer keeps W' and its dense gradient alive in every layer. Here W' is built for one product at a
time and built again in the backward pass, so memory is that of the adapters and of one layer.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compression.quantization.grid import Grid


class Form(NamedTuple):
    """How W' comes of B A; W and M [out, in], B [out, r], A [r, in].

    Attributes:
        effective: (W, M, B, A, s) -> W'.
        pull: (dL/dW', W, M) -> dL/d(s B A), in place.
    """

    effective: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    pull: Callable[[Tensor, Tensor, Tensor], Tensor]


def _ones(M: Tensor, dtype: torch.dtype) -> Tensor:
    """M as ones and zeros; torch takes eight times as long to cast it, or to multiply with it, as bool."""
    return M.view(torch.uint8).to(dtype)


# W is zero where M is, so M o (W + s B A) = W + s M o (B A).
MASK_LORA = Form(
    lambda W, M, B, A, s: torch.addmm(W, B, A, alpha=s).mul_(_ones(M, W.dtype)),
    lambda grad, W, M: grad.mul_(_ones(M, grad.dtype)),
)
SCALE_LORA = Form(
    lambda W, M, B, A, s: (B @ A).mul_(W),
    lambda grad, W, M: grad.mul_(W),
)
LORA_PRUNE = Form(
    lambda W, M, B, A, s: torch.addmm(W, B, A, alpha=s),
    lambda grad, W, M: grad,
)


class _MaskedLowRank(torch.autograd.Function):
    """y = x W'^T for x [n, in]; gradients with respect to x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, layer: "MaskedLinear") -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.layer = layer
        return x @ layer.effective(A, B, x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, A, B = ctx.saved_tensors
        layer: MaskedLinear = ctx.layer
        grad_x = grad @ layer.effective(A, B, x.dtype) if ctx.needs_input_grad[0] else None
        # dL/dW' is the one dense matrix, gone after two thin products.
        grad_product = layer.form.pull(grad.t() @ x, layer.weight.to(x.dtype), layer.keep)
        grad_A = B.to(x.dtype).t() @ grad_product
        grad_B = grad_product @ A.to(x.dtype).t()
        return grad_x, grad_A.to(A.dtype).mul_(layer.scaling), grad_B.to(B.dtype).mul_(layer.scaling), None


class MaskedLinear(nn.Module):
    """Stands in for a pruned `nn.Linear`.

    Args:
        linear: W [out, in] and bias; both are taken over, not copied.
        keep: M, bool [out, in].
        rank, alpha: r and alpha.
        generator: draws A uniformly in +-1/sqrt(in), as the released layers do; B starts at zero, so W' starts at W.
        grid: where W' has to lie, if anywhere.
        form: how W' comes of B A. For SCALE_LORA one row of A and one column of B start at one, so that B A is all
            ones and W' starts at W as well.
    """

    def __init__(
        self,
        linear: nn.Linear,
        keep: Tensor,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        grid: Grid | None = None,
        form: Form = MASK_LORA,
    ) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.keep: Tensor
        self.register_buffer("keep", keep.to(linear.weight.device), persistent=False)
        self.scaling = 1.0 if form is SCALE_LORA else alpha / rank  # s; scale_lora has none
        self.grid, self.form, self.as_at_start = grid, form, False
        bound = 1 / math.sqrt(linear.in_features)
        start = torch.rand(rank, linear.in_features, generator=generator) * 2 * bound - bound
        self.A = nn.Parameter(start.to(linear.weight.device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        if form is SCALE_LORA:
            self.A.data[0], self.B.data[:, 0] = 1, 1

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ self.weight.t() if self.as_at_start else _MaskedLowRank.apply(flat, self.A, self.B, self)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def effective(self, A: Tensor, B: Tensor, dtype: torch.dtype, stored: Tensor | None = None) -> Tensor:
        """W' [out, in], in `dtype`; `stored` is W if not the copy that the layer computes with."""
        start = (self.weight if stored is None else stored).to(dtype)
        weight = self.form.effective(start, self.keep, B.to(dtype), A.to(dtype), self.scaling)
        return weight if self.grid is None else self.grid.values(self.grid.codes(weight)).to(dtype)

    @torch.no_grad()
    def merged(self, stored: Tensor | None = None) -> Tensor:
        """W' [out, in], in the type of `stored`; in that of the layer it is exactly what the forward pass used.

        Args:
            stored: W as it is stored, if that is finer than what the layer computes with: a float32 model
                trained in bfloat16 keeps what the update does not touch.
        """
        weight = self.weight if stored is None else stored.to(self.weight.device)
        return self.effective(self.A, self.B, weight.dtype, weight)


def attach(
    model: nn.Module,
    keep: dict[str, Tensor],
    rank: int,
    alpha: float,
    seed: int,
    grids: dict[str, Grid] | None = None,
    form: Form = MASK_LORA,
) -> dict[str, MaskedLinear]:
    """Puts a MaskedLinear in the place of every layer that `keep` names, in its order.

    Args:
        keep: masks bool [out, in] by module name.
        grids: by module name, for a quantised model.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, mask in keep.items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layers[name] = MaskedLinear(linear, mask, rank, alpha, generator, (grids or {}).get(name), form)
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


class Returning(Protocol):
    """A layer that can compute with what it started with."""

    as_at_start: bool


@contextmanager
def at_start(layers: Iterable[Returning]) -> Iterator[None]:
    """Within it the layers compute with W: the model that training began with, and no second copy of it."""
    chosen = list(layers)
    for layer in chosen:
        layer.as_at_start = True
    try:
        yield
    finally:
        for layer in chosen:
            layer.as_at_start = False
