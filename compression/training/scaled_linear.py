"""A linear layer on a grid that learns its scales, while its codes stay.

    W'_ij = (q_ij - z_ig) s_ig exp(t_ig)        g the group of input j

q [out, in] the codes, s and z [out, groups] the grid's scales and zero points (see compression.quantization.grid), all
frozen; t [out, groups] trained, from 0 on. A zero stays zero whatever t is. The new scale is rounded to the type in
which it is stored, and the gradient passes straight through that rounding, so that what is learned is what ships.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compression.quantization.grid import Grid


class _Scaled(torch.autograd.Function):
    """y = x W'^T for x [n, in]; gradients with respect to x and t."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, layer: "ScaledLinear") -> Tensor:
        ctx.save_for_backward(x, t)
        ctx.layer = layer
        return x @ layer.effective(t, x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, t = ctx.saved_tensors
        weight = ctx.layer.effective(t, x.dtype)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        # dL/dt_g is the sum of dL/dW' o W' over the group, as W' is proportional to exp(t_g).
        products = (grad.t() @ x).mul_(weight).view(len(weight), ctx.layer.scale.shape[1], -1)
        return grad_x, products.sum(-1, dtype=torch.float32).sum_to_size(t.shape), None


class ScaledLinear(nn.Module):
    """Stands in for a quantised `nn.Linear`, whose weight it lets go of.

    Args:
        linear: its bias is taken over, not copied.
        codes: q int8 [out, in].
        grid: s and z.
    """

    def __init__(self, linear: nn.Linear, codes: Tensor, grid: Grid) -> None:
        super().__init__()
        self.bias, self.as_at_start, self.zero, self.bits = linear.bias, False, grid.zero, grid.bits
        self.steps: Tensor  # q - z, whole numbers of at most 9 bits: exact in bfloat16, which has 8 beside the sign
        self.scale: Tensor
        steps = Grid(grid.bits, torch.ones_like(grid.scale), grid.zero).values(codes)
        self.register_buffer("steps", steps.to(linear.weight), persistent=False)
        self.register_buffer("scale", grid.scale.to(linear.weight.device), persistent=False)
        self.t = nn.Parameter(torch.zeros(grid.scale.shape, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.as_at_start:
            y = flat @ self.effective(torch.zeros_like(self.t), x.dtype).t()
        else:
            y = _Scaled.apply(flat, self.t, self)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def effective(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """W' [out, in], in `dtype`, computed in the type of the scales as those who load the file do."""
        scale = self._scaled(t)
        grouped = self.steps.view(len(self.steps), scale.shape[1], -1).to(scale.dtype)
        return (grouped * scale[..., None]).view(self.steps.shape).to(dtype)

    @torch.no_grad()
    def grid(self) -> Grid:
        """The grid with the scales that are learned, where `codes` stand for W'."""
        return Grid(self.bits, self._scaled(self.t), self.zero)

    def _scaled(self, t: Tensor) -> Tensor:
        return (self.scale.float() * t.exp()).to(self.scale.dtype)


def attach(model: nn.Module, codes: dict[str, Tensor], grids: dict[str, Grid]) -> dict[str, ScaledLinear]:
    """Puts a ScaledLinear in the place of every layer that `codes` names, in its order."""
    layers = {}
    for name, own in codes.items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layers[name] = ScaledLinear(linear, own, grids[name])
        setattr(model.get_submodule(parent), child, layers[name])
    return layers
