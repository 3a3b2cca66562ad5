"""RMS norms on a CPU, a few tokens at a time.

transformers composes them of plain operations with float32 copies of all that they are given; where these do not fit in
the processor's cache, they take half as long again. Every token is treated by itself, so nothing changes, to the bit.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

ENTRIES = 2**16  # numbers at a time


def by_rows(module: nn.Module) -> None:
    """Has the RMS norms in a module (told by their names) look at few tokens at a time where no gradient is wanted."""
    for part in module.modules():
        if "RMSNorm" in type(part).__name__:
            part.forward = _by_rows(part.forward)


def _by_rows(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def call(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = not (args or kwargs or torch.is_grad_enabled()) and hidden.device.type == "cpu"
        if not plain or hidden.numel() <= ENTRIES:
            return forward(hidden, *args, **kwargs)
        rows = hidden.reshape(-1, hidden.shape[-1]).split(max(1, ENTRIES // hidden.shape[-1]))
        return torch.cat([forward(few) for few in rows]).view(hidden.shape)

    return call
