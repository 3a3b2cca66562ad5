"""What a layer's input looks like: statistics that are summed up batch by batch."""

import torch
from torch import Tensor

ROWS = 256  # tokens at a time: the float32 copy stays in the processor's cache


class InputNorms:
    """Squared norm of every input feature over all tokens seen.

    Attributes:
        squares: float64 [in], sum over tokens of x_j^2. Products are exact in float32 for bfloat16 input,
            partial sums run over ROWS tokens, and the total is kept in float64, so the way in which tokens
            are split into batches moves it by rounding only.
        tokens: how many tokens were seen.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Adds inputs [..., in]."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        for rows in flat.split(ROWS):
            self.squares += rows.float().square().sum(0).double()
        self.tokens += len(flat)

    def norms(self) -> Tensor:
        """float32 [in]: the l2 norm over the tokens, ||X_j||_2."""
        return self.squares.sqrt().float()
