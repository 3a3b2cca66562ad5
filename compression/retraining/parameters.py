"""The few parameters that PERP frees: biases and norms (arXiv 2312.15230)."""

from collections.abc import Callable

from torch import Tensor, nn

# Given the model's tensors as they are stored, by full name, the changed ones.
Merge = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def free(model: nn.Module, *, biases: bool, norms: bool) -> dict[str, nn.Parameter]:
    """Biases (of linears and of norms) and norm scales, made trainable; by full name.

    A norm's scale is a vector called `weight`: true of LayerNorm and of every RMSNorm.
    """
    freed: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        bias = name.endswith(".bias")
        scale = parameter.ndim == 1 and name.endswith(".weight")
        if (biases and bias) or (norms and scale):
            parameter.requires_grad_(True)
            freed[name] = parameter
    return freed
