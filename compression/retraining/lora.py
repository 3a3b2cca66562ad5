"""Plain LoRA on a pruned model, kept beside its weights: how Wanda's authors mend theirs (arXiv 2306.11695).

W + s B A for the chosen layers, s = alpha / r (Hu et al. 2021, arXiv 2106.09685). The product is dense, so nothing is
merged: the sparse W stays as it is to the bit, and the adapter is saved as peft saves it. Layers, forward pass and
file format are peft's; what is random is drawn here, so that equal seeds give equal bytes.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from compression.core.adapter import write_adapter
from compression.retraining.parameters import Merge, free, targeted

NAME = "default"  # peft keeps any number of adapters in a layer; this is the one


class Dropout(nn.Module):
    """Drops entries of x with probability p where gradients are recorded, and nowhere else.

    What is dropped follows from the bits of x and from `key` alone. A draw from torch's global generator would be
    another one in a run that was killed and goes on.
    """

    def __init__(self, p: float, key: int) -> None:
        super().__init__()
        self.p, self.key = p, key

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return x
        bits = x.detach().view(torch.int16 if x.itemsize == 2 else torch.int32)
        generator = torch.Generator(x.device).manual_seed(self.key + int(bits.sum(dtype=torch.int64)))
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self.p, generator=generator)
        return torch.where(keep, x, 0) / (1 - self.p)


def attach(
    model: nn.Module, keep: dict[str, Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, nn.Parameter], Merge]:
    """Puts an adapter beside the chosen pruned layers, and frees the parameters that are asked for.

    A starts uniformly in +-1/sqrt(in), B at zero, both in the type of W. The model has to be told by grad mode
    whether it learns: dropout is off under `torch.no_grad()`.

    Args:
        keep: masks bool [out, in] by layer; what they say is not looked at, as W stays.
        options: rank, alpha, dropout, seed; targets, patterns of full layer names (`*.q_proj`), all layers if there
            are none; biases, norms, head, embeddings.

    Returns:
        `L.lora_A` [r, in] and `L.lora_B` [out, r] by layer L and the freed parameters by the names under which they
        are stored; and a merge with nothing to do.

    Raises:
        Problem: a pattern that no layer matches.
    """
    # By the names of the checkpoint: peft puts the layer that holds a bias one level down.
    parameters = free(model, options)
    layers = list(targeted(keep, options["targets"]))
    if layers:
        # On the meta device, where peft's own draw leaves the global generator alone.
        inject_adapter_in_model(_config(layers, options), model, NAME, low_cpu_mem_usage=True)
    for parameter in parameters.values():
        parameter.requires_grad_(True)  # peft has frozen all that is not its own
    generator = torch.Generator().manual_seed(options["seed"])
    for number, name in enumerate(layers):
        layer: Any = model.get_submodule(name)
        weight = layer.base_layer.weight
        bound = 1 / math.sqrt(weight.shape[1])
        A = torch.rand(options["rank"], weight.shape[1], generator=generator) * 2 * bound - bound
        layer.lora_A[NAME].weight = nn.Parameter(A.to(weight))
        layer.lora_B[NAME].weight = nn.Parameter(weight.new_zeros(weight.shape[0], options["rank"]))
        if options["dropout"]:
            layer.lora_dropout[NAME] = Dropout(options["dropout"], options["seed"] * 1_000_003 + number)
        parameters |= {f"{name}.lora_A": layer.lora_A[NAME].weight, f"{name}.lora_B": layer.lora_B[NAME].weight}
    return parameters, lambda _: {}


def save(folder: Path, parameters: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
    """Writes the adapter into a checkpoint's folder for `PeftModel.from_pretrained`; nothing if no layer has one.

    Args:
        parameters, options: what `attach` gave and was given.
    """
    layers = {
        name.removesuffix(".lora_A"): (A, parameters[f"{name.removesuffix('.lora_A')}.lora_B"])
        for name, A in parameters.items()
        if name.endswith(".lora_A")
    }
    if layers:
        # peft keeps the layers as a set, whose order is another one in each process.
        config = _config(layers, options).to_dict() | {"inference_mode": True, "target_modules": sorted(layers)}
        write_adapter(folder, layers, config)


def _config(layers: Iterable[str], options: Mapping[str, Any]) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options["rank"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        target_modules=list(layers),
        bias="none",
    )
