"""The few parameters that PERP frees, and the adapters that it puts on pruned layers (arXiv 2312.15230)."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from compression.core.errors import Problem
from compression.training.masked_linear import Form, MaskedLinear
from compression.training.masked_linear import attach as attach_masked

# Given the model's tensors as they are stored, by full name, the changed ones.
Merge = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def free(model: nn.Module, options: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """The parameters that `options` names, made trainable; by full name.

    Args:
        model: a whole model, or a block, which has no head and no embeddings.
        options: bool by kind. biases: of linears and of norms. norms: their scales, which are vectors called
            `weight`, true of LayerNorm and of every RMSNorm. head and embeddings: whole matrices; where the two are
            tied they are one parameter.
    """
    ends = [
        getattr(model, end)()
        for end, wanted in (("get_output_embeddings", options["head"]), ("get_input_embeddings", options["embeddings"]))
        if wanted
    ]
    whole = [end.weight for end in ends if end is not None]
    freed: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        bias = name.endswith(".bias")
        scale = parameter.ndim == 1 and name.endswith(".weight")
        if (options["biases"] and bias) or (options["norms"] and scale) or any(parameter is matrix for matrix in whole):
            parameter.requires_grad_(True)
            freed[name] = parameter
    return freed


def targeted(keep: Mapping[str, Tensor], patterns: list[str]) -> dict[str, Tensor]:
    """Masks of the layers that one of the patterns matches (`*.q_proj`); all of them if there is no pattern.

    Raises:
        Problem: a pattern that matches no layer.
    """
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in keep):
            raise Problem(
                "params.yaml: retrain.targets",
                f"`{pattern}` matches no pruned layer",
                "valid: patterns of names such as " + ", ".join(list(keep)[:7]),
            )
    chosen = [layer for layer in keep if not patterns or any(fnmatchcase(layer, pattern) for pattern in patterns)]
    return {layer: keep[layer] for layer in chosen}


def adapt(
    model: nn.Module, keep: dict[str, Tensor], options: Mapping[str, Any], form: Form
) -> tuple[dict[str, nn.Parameter], dict[str, MaskedLinear], Merge]:
    """Puts an adapter on every targeted layer, beside the parameters that are freed.

    Args:
        keep: masks bool [out, in] by layer.
        options: targets, rank, alpha, seed; biases, norms, head, embeddings.

    Returns:
        A and B of every layer and the freed parameters; the layers; and a merge that gives every layer's W'.
    """
    chosen = targeted(keep, options["targets"])
    layers = attach_masked(model, chosen, options["rank"], options["alpha"], options["seed"], form=form)
    parameters = free(model, options)
    for name, layer in layers.items():
        parameters |= {f"{name}.A": layer.A, f"{name}.B": layer.B}

    def merge(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{name}.weight": layer.merged(stored[f"{name}.weight"]) for name, layer in layers.items()}

    return parameters, layers, merge
