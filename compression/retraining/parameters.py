"""The few parameters that PERP frees, and the adapters that it puts on pruned layers (arXiv 2312.15230)."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from compression.training.masked_linear import Form, MaskedLinear
from compression.training.masked_linear import attach as attach_masked

# Given the model's tensors as they are stored, by full name, the changed ones.
Merge = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def free(model: nn.Module, options: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """The parameters that `options` names, made trainable; by full name.

    Args:
        options: bool by kind. biases: of linears and of norms. norms: their scales, which are vectors called
            `weight`, true of LayerNorm and of every RMSNorm. head and embeddings: whole matrices; where the two are
            tied they are one parameter.
    """
    whole = [
        module.weight
        for wanted, module in (
            (options["head"], model.get_output_embeddings()),  # type: ignore[operator]
            (options["embeddings"], model.get_input_embeddings()),  # type: ignore[operator]
        )
        if wanted and module is not None
    ]
    freed: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        bias = name.endswith(".bias")
        scale = parameter.ndim == 1 and name.endswith(".weight")
        if (options["biases"] and bias) or (options["norms"] and scale) or any(parameter is matrix for matrix in whole):
            parameter.requires_grad_(True)
            freed[name] = parameter
    return freed


def adapt(
    model: nn.Module, keep: dict[str, Tensor], options: Mapping[str, Any], form: Form
) -> tuple[dict[str, nn.Parameter], dict[str, MaskedLinear], Merge]:
    """Puts an adapter on every pruned layer, beside the parameters that are freed.

    Args:
        keep: masks bool [out, in] by layer.
        options: rank, alpha, seed; biases, norms, head, embeddings.

    Returns:
        A and B of every layer and the freed parameters; the layers; and a merge that gives every layer's W'.
    """
    layers = attach_masked(model, keep, options["rank"], options["alpha"], options["seed"], form=form)
    parameters = free(model, options)
    for name, layer in layers.items():
        parameters |= {f"{name}.A": layer.A, f"{name}.B": layer.B}

    def merge(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{name}.weight": layer.merged(stored[f"{name}.weight"]) for name, layer in layers.items()}

    return parameters, layers, merge
