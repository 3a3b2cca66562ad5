"""Activation statistics of a model, block by block."""

import torch
from torch import Tensor, nn

from compression.core import batches
from compression.core.journal import Journal
from compression.core.progress import progress
from compression.core.skeleton import Skeleton, linears
from compression.statistics import InputNorms


@torch.no_grad()
def input_norms(skeleton: Skeleton, ids: Tensor, journal: Journal) -> dict[str, Tensor]:
    """Norm of every input feature of every linear in the blocks, over all tokens.

    Args:
        ids: int64 [N, T].

    Returns:
        float32 [in] by layer name: ||X_j||_2.
    """
    parts = batches.split(ids, skeleton.device)
    begun = torch.cat([skeleton.begin(batch) for batch in parts])
    finished, state = journal.load()
    hidden = state.pop("hidden", begun).to(skeleton.device)
    norms = state
    blocks = range(finished, skeleton.depth)
    for index in progress(blocks, what="calibrate", unit="block", total=skeleton.depth, done=finished):
        layers = linears(skeleton.load(index), f"{skeleton.path}.{index}")
        seen = {name: InputNorms(layer.in_features, skeleton.device) for name, layer in layers.items()}
        hooks = [layer.register_forward_pre_hook(_watch(seen[name])) for name, layer in layers.items()]
        for states, batch in zip(hidden.split(len(parts[0])), parts, strict=True):
            states.copy_(skeleton.run(index, states, batch))
        for hook in hooks:
            hook.remove()
        skeleton.release(index)
        norms |= {name: statistic.norms().cpu() for name, statistic in seen.items()}
        journal.save(index + 1, norms | {"hidden": hidden})
    return norms


def _watch(statistic: InputNorms):  # type: ignore[no-untyped-def]
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        statistic.update(inputs[0])

    return hook
