"""A narrower residual stream: dimensions that nothing writes any more are cut out of every tensor.

Which axis of which tensor the hidden width is, transformers is asked (see widths.py). A norm divides by the root of the
mean square; of d dimensions, of which d - k are zero, that of the k that stay is d / k times as large, so

    x / sqrt(S / d + eps) = sqrt(d / k) x / sqrt(S / k + eps d / k)        S the sum of squares

and with weights times sqrt(d / k) and eps times d / k nothing changes. Norms of another width, those of q and k, have
the new eps as well, by which they differ from before only where heads are nearly zero.

    structures.safetensors    `hidden`: int32 indices, in the model before, of the dimensions that stay
"""

import copy
from collections.abc import Mapping
from math import sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.files import write_tensors
from compression.core.skeleton import empty_model
from compression.surgeon.shrink import STRUCTURES, refuse_grids
from compression.surgeon.widths import built, head_width, is_taken, read_config

Axes = dict[str, tuple[int, ...]]  # by tensor, which of its axes are the hidden width

EPS = "rms_norm_eps"
VALID = "valid: models of RMS norms whose embeddings are not scaled, such as Llama, Mistral and Qwen"


class Narrowed(NamedTuple):
    """What CheckpointWriter.finish has to be told.

    Attributes:
        config: the new config.json.
        layers: shape [out, in] of each linear in the blocks, for the manifest.
        widths: `hidden`, the width that is left.
        padding: 0.
    """

    config: dict[str, Any]
    layers: dict[str, list[int]]
    widths: dict[str, int]
    padding: int = 0


def hidden_widths(source: Checkpoint, multiple: int) -> list[int]:
    """The hidden widths that may be left: multiples that transformers takes, ascending, and last the one there is.

    Raises:
        Problem: norms that are not RMS norms, or an embedding that is not handed on as it is.
    """
    config = read_config(source.folder)
    _check_family(source, config, empty_model(source.folder))
    fewer = range(multiple, config.hidden_size, multiple)
    return [*(width for width in fewer if is_taken(config, _resized(config, width))), config.hidden_size]


def hidden_axes(source: Checkpoint, width: int) -> Axes:
    """Which axes get narrower with a hidden width of `width`.

    Raises:
        Problem: transformers does not take that width; norms that are not RMS norms, or an embedding that is not handed
            on as it is.
    """
    config, model = read_config(source.folder), empty_model(source.folder)
    _check_family(source, config, model)
    if not is_taken(config, _resized(config, width)):
        raise Problem(
            str(source.folder / "config.json"),
            f"transformers takes no hidden width of {width} with {config.num_attention_heads} heads",
            f"valid: multiples of {config.num_attention_heads}",
        )
    wide, narrow = built(source.config()), built(source.config() | _resized(config, width))
    axes = {
        name: tuple(axis for axis, size in enumerate(shape) if size != narrow[name][axis])
        for name, shape in wide.items()
    }
    for name, module in model.named_modules():
        if axes.get(f"{name}.weight") == (0,) and not isinstance(module, nn.Linear):
            _check_norm(name, module, config)
    return {name: found for name, found in axes.items() if found}


def remove_dimensions(tensors: Mapping[str, Tensor], axes: Axes, removed: Tensor) -> dict[str, Tensor]:
    """The tensors with the removed dimensions int64 zero in all that reads or writes them; norms stay as they are."""
    changed = dict(tensors)
    for name in tensors.keys() & axes.keys():
        if not _is_norm(name, tensors[name], axes):
            for axis in axes[name]:
                changed[name] = changed[name].index_fill(axis, removed, 0)
    return changed


def narrow(source: Checkpoint, writer: CheckpointWriter, kept: Tensor) -> Narrowed:
    """Writes `source`, whose other dimensions are zero, without them; one block is in memory.

    Args:
        source: plain weights, in full precision.
        kept: int64, the dimensions that stay, ascending.

    Raises:
        Problem: as of hidden_axes; weights on a grid; a dimension that goes but is still written.
    """
    refuse_grids(source)
    axes, config = hidden_axes(source, len(kept)), read_config(source.folder)
    gone = torch.ones(config.hidden_size, dtype=torch.bool)
    gone[kept] = False
    growth = config.hidden_size / len(kept)
    embedding = _embedding(empty_model(source.folder))

    def cut(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        smaller = {}
        for name, tensor in tensors.items():
            own = axes.get(name, ())
            norm = _is_norm(name, tensor, axes)
            writes = (own == (0,) and not norm) or name == embedding
            if own and writes and tensor.movedim(own[0], 0)[gone].any():
                raise Problem(name, "still writes dimensions that are to go", "remove them from the weights first")
            for axis in own:
                tensor = tensor.index_select(axis, kept)
            smaller[name] = (tensor.float() * sqrt(growth)).to(tensor.dtype) if norm else tensor
        return smaller

    packed, layers = source.masks(), dict(source.layers)
    for index in range(source.depth):
        prefix = f"{source.blocks}.{index}."
        masks = {
            layer: torch.ones(shape, dtype=torch.bool) for layer, shape in layers.items() if layer.startswith(prefix)
        } | source.block_masks(index, packed)
        for layer, mask in masks.items():
            for axis in axes.get(f"{layer}.weight", ()):
                mask = mask.index_select(axis, kept)
            masks[layer], layers[layer] = mask, list(mask.shape)
        writer.write_block(index, cut(source.block(index)), masks)
    writer.write_outer(cut(source.outer()))
    write_tensors(writer.folder / STRUCTURES, {"hidden": kept.to(torch.int32)})
    changes = _resized(config, len(kept)) | {EPS: growth * getattr(config, EPS)}
    return Narrowed(source.config() | changes, layers, {"hidden": len(kept)})


def _resized(config: Any, width: int) -> dict[str, Any]:
    return {"hidden_size": width, "head_dim": head_width(config)}


def _embedding(model: nn.Module) -> str:
    """Name of the input embedding's weight."""
    wanted = model.get_input_embeddings()  # type: ignore[operator]
    return next(f"{name}.weight" for name, module in model.named_modules() if module is wanted)


def _is_norm(name: str, tensor: Tensor, axes: Axes) -> bool:
    """Whether it is the weights of a norm of the residual stream."""
    return name in axes and tensor.ndim == 1 and not name.endswith(".bias")


def _check_family(source: Checkpoint, config: Any, model: nn.Module) -> None:
    """Raises Problem unless norms have the eps of an RMS norm and the embedding is handed on as it is."""
    if not isinstance(getattr(config, EPS, None), float) or type(model.get_input_embeddings()) is not nn.Embedding:  # type: ignore[operator]
        raise Problem(str(source.folder), f"the hidden width of a {type(model).__name__} cannot change", VALID)


def _check_norm(name: str, module: nn.Module, config: Any) -> None:
    """Raises Problem unless a norm is w x / sqrt(mean x^2 + eps): it is tried."""
    real = copy.deepcopy(module).to_empty(device="cpu")
    x, w = torch.linspace(-1, 2, config.hidden_size), torch.linspace(0.5, 2, config.hidden_size)
    parameters = dict(real.named_parameters())
    if parameters.keys() == {"weight"}:
        parameters["weight"].copy_(w)
        if torch.allclose(real(x), F.rms_norm(x, x.shape, w, getattr(config, EPS))):
            return
    raise Problem(name, f"a {type(module).__name__} is not an RMS norm as its width is counted here", VALID)
