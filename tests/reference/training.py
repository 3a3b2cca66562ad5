"""PERP's adapters by plain autograd, and the learning rate of every step as two straight lines."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_lora(x: Tensor, W: Tensor, bias: Tensor, M: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """y = x (W + s * M o (B A))^T + bias, the whole matrix kept for autograd."""
    return F.linear(x, W + s * M * (B @ A), bias)


def scale_lora(x: Tensor, W: Tensor, bias: Tensor, M: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """y = x (W o (B A))^T + bias."""
    return F.linear(x, W * (B @ A), bias)


def lora_prune(x: Tensor, W: Tensor, bias: Tensor, M: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """y = x (W + s * B A)^T + bias, the mask not looked at."""
    return F.linear(x, W + s * (B @ A), bias)


FORMS = {"mask_lora": mask_lora, "scale_lora": scale_lora, "lora_prune": lora_prune}


def scaled(x: Tensor, q: Tensor, z: Tensor, s: Tensor, t: Tensor, bias: Tensor) -> Tensor:
    """y_i = sum_j (q_ij - z_ig) s_ig exp(t_ig) x_j + b_i, g the group of j, by loops."""
    width = q.shape[1] // s.shape[1]
    y = bias.expand(len(x), -1).clone()
    for i in range(len(q)):
        for j in range(q.shape[1]):
            g = j // width
            y[:, i] = y[:, i] + (q[i, j] - z[i, g]) * s[i, g] * t[i, g].exp() * x[:, j]
    return y


def adam(start: Tensor, gradients: list[Tensor], rates: list[float], clip: float) -> Tensor:
    """A parameter after AdamW without decay, its gradient clipped to the norm `clip`; float64."""
    value, mean, square = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        clipped = gradient.double() * min(1.0, clip / (float(gradient.double().norm()) + 1e-6))
        mean = 0.9 * mean + 0.1 * clipped
        square = 0.999 * square + 0.001 * clipped**2
        value = value - rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return value


def rates(steps: int, peak: float, warmup: float) -> list[float]:
    """Up to `peak` in equal steps over round(warmup * steps) steps, then down towards zero in equal steps."""
    up = round(warmup * steps)
    rising = [peak / up * number for number in range(1, up + 1)]
    down = steps - up
    falling = [peak / down * number for number in range(down, 0, -1)]
    return rising + falling
