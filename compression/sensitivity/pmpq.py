"""PMPQ: what it costs to prune one block alone (CPTQuant, arXiv 2412.03599, section on pruning sensitivity).

The paper zeroes the s smallest entries of every tensor of a block and measures the loss; its code takes
ppl_base - ppl_sparse, so that sensitive means negative. Here it is the rise of the mean loss, so that larger
means more sensitive, and it is measured on calibration text, not on the test set.

The obvious way runs L models from start to end. Here all of them walk together: up to block l the model with
block l pruned is the dense one, so its stream of hidden states branches off there, and each block is read
once, for the dense stream and for every stream that has branched off before.
"""

import torch
from torch import Tensor, nn

from compression.core.journal import Journal
from compression.core.progress import progress
from compression.core.skeleton import Skeleton
from compression.evaluation.loss import head_losses


@torch.no_grad()
def measure(skeleton: Skeleton, ids: Tensor, journal: Journal, sparsity: float) -> dict[int, float]:
    """Sensitivity of every block.

    Args:
        ids: calibration tokens int64 [N, T].
        sparsity: share s of each tensor's entries that are zeroed, weights, biases and norms alike.

    Returns:
        by block: the rise of the mean loss in nats a token for a causal model; for an encoder, which has no
        loss of its own, the relative change of its last states ||h_s - h|| / ||h||.
    """
    finished, state = journal.load()
    dense = skeleton.begin(ids)
    if finished:
        dense = state["dense"].to(skeleton.device)
    branches = [state[f"branch.{block}"].to(skeleton.device) for block in range(finished)]
    blocks = range(finished, skeleton.depth)
    for index in progress(blocks, what="pmpq", unit="block", total=skeleton.depth, done=finished):
        block = skeleton.load(index)
        branches = [skeleton.run(index, branch, ids) for branch in branches]
        after = skeleton.run(index, dense, ids)
        zero_smallest(block, sparsity)
        branches.append(skeleton.run(index, dense, ids))
        dense = after
        skeleton.release(index)
        named = {f"branch.{number}": branch for number, branch in enumerate(branches)}
        journal.save(index + 1, named | {"dense": dense})
    base = _output(skeleton, dense, ids)
    return {number: _distance(_output(skeleton, branch, ids), base) for number, branch in enumerate(branches)}


def zero_smallest(block: nn.Module, sparsity: float) -> None:
    """Zeroes round(sparsity * n) entries of least |w| in every tensor of n entries, in place."""
    for parameter in block.parameters():
        flat = parameter.view(-1)
        count = round(sparsity * len(flat))
        order = flat.abs().float().sort(stable=True).indices
        flat[order[:count]] = 0


def _output(skeleton: Skeleton, hidden: Tensor, ids: Tensor) -> Tensor:
    """float64: the token losses of a causal model [N, T - 1], the last states of an encoder [N, T, d]."""
    if skeleton.causal:
        return head_losses(skeleton, hidden, ids).double()
    return skeleton.end(hidden, ids).double()


def _distance(changed: Tensor, base: Tensor) -> float:
    if base.ndim == 2:
        return float(changed.mean() - base.mean())
    return float((changed - base).norm() / base.norm())
