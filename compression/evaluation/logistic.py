"""Logistic regression: a classification head on features that stay as they are.

    minimise   -sum_n c_n log p(y_n | x_n) + penalty / 2 ||W||^2,   p(. | x) = softmax(W x + b)

with c_n = 1/N, or where classes are balanced such that those of each class add up to the same and all to 1; by L-BFGS
in float64 from zero (Liu and Nocedal 1989): equal features give equal heads, no seed is needed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 500
GRADIENT, CHANGE = 1e-8, 1e-12  # it ends once no entry of the gradient, or none of a step, is larger


@dataclass(frozen=True)
class LogisticHead:
    """A head; its numbers are float64, on the CPU.

    Attributes:
        weight: W [classes, d].
        bias: b [classes].
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Features [N, d] -> logits float64 [N, classes]."""
        return features.double() @ self.weight.T + self.bias

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of the features [N, d] whose likeliest class is their label, int64 [N]."""
        return float((self.logits(features).argmax(1) == labels).double().mean())


def train_head(features: Tensor, labels: Tensor, penalty: float, balanced: bool = False) -> LogisticHead:
    """Fits a head.

    Args:
        features: [N, d].
        labels: int64 [N], in 0 .. classes - 1, of which the largest is among them.
        penalty: above 0, so that there is one best head; the bias carries none.
        balanced: each class counts the same, however many features it has.
    """
    inputs, classes = features.double(), int(labels.max()) + 1
    share = 1 / torch.bincount(labels).double() if balanced else None
    weight, bias = (
        torch.zeros(*shape, dtype=torch.float64, requires_grad=True)
        for shape in [(classes, inputs.shape[1]), (classes,)]
    )
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=GRADIENT, tolerance_change=CHANGE, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(inputs @ weight.T + bias, labels, share) + penalty / 2 * weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return LogisticHead(weight.detach(), bias.detach())
