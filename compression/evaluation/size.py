"""What a checkpoint weighs, and what its mask says: counted on the files that ship."""

from typing import Any

from compression.core import masks
from compression.core.adapter import ADAPTER_TENSORS
from compression.core.checkpoint import MASKS, OUTER, Checkpoint, block_file
from compression.core.errors import Problem
from compression.quantization.packed import base_reader, plain_outer


def measure_size(checkpoint: Checkpoint) -> dict[str, Any]:
    """Counts weights and bytes, block by block. An adapter counts by its bytes alone: the model is what it stands by.

    Returns:
        parameters: all of the model, embeddings and norms too.
        prunable_parameters: those of the linears in the blocks.
        sparsity: share of the prunable weights that the mask drops.
        zeros: share of the prunable weights that are zero, by mask or by rounding.
        layer_sparsity: by layer, where there is a mask.
        revived_weights: dropped weights that are not zero.
        bytes: of the weight files, an adapter's among them. mask_bytes: of the mask file, which no runtime needs.
        bits_per_weight: 8 * bytes / parameters.

    Raises:
        Problem: a pruned weight came back to life.
    """
    read, packed = base_reader(checkpoint), checkpoint.masks()
    parameters = sum(tensor.numel() for tensor in plain_outer(checkpoint).values())
    prunable = dropped = zeros = revived = 0
    layer_sparsity: dict[str, float] = {}
    for index in range(checkpoint.depth):
        tensors, keep = read(index), checkpoint.block_masks(index, packed)
        parameters += sum(tensor.numel() for tensor in tensors.values())
        for layer in [name for name in checkpoint.layers if f"{name}.weight" in tensors]:
            weight = tensors[f"{layer}.weight"]
            prunable += weight.numel()
            zeros += int((weight == 0).sum())
            if layer in keep:
                gone = weight.numel() - int(keep[layer].sum())
                dropped += gone
                layer_sparsity[layer] = gone / weight.numel()
                revived += masks.revived(weight, keep[layer])
    if revived:
        raise Problem(str(checkpoint.folder), f"{revived} pruned weights are not zero any more: the mask was broken")
    size = sum((checkpoint.folder / name).stat().st_size for name in _weight_files(checkpoint))
    mask_file = checkpoint.folder / MASKS
    return {
        "parameters": parameters,
        "prunable_parameters": prunable,
        "sparsity": dropped / prunable,
        "zeros": zeros / prunable,
        "revived_weights": revived,
        "bytes": size,
        "mask_bytes": mask_file.stat().st_size if mask_file.exists() else 0,
        "bits_per_weight": 8 * size / parameters,
        "layer_sparsity": layer_sparsity,
    }


def _weight_files(checkpoint: Checkpoint) -> list[str]:
    adapter = [name for name in [ADAPTER_TENSORS] if name in checkpoint.manifest["files"]]
    return [OUTER, *(block_file(index) for index in range(checkpoint.depth)), *adapter]
