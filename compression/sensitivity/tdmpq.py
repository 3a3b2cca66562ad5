"""TDMPQ: what rounding a layer costs by Taylor's formula (CPTQuant, arXiv 2412.03599, Taylor decomposition).

    dW = Q_b(W) - W
    cost(b) = <g, dW> + 1/2 <F, dW o dW>

g is the mean gradient of the loss in nats a token, F the diagonal of the Fisher matrix, which stands for that of the
Hessian: the mean over sequences of the squared gradient of a sequence's summed loss, divided by its tokens. (With
the mean loss instead, whose gradient shrinks as sequences grow, the second term would be too small by their length.)
The first term keeps its sign: of a hundred layers' terms most cancel, and their absolute values would drown the second.
The paper's code has no derivative: it adds unit noise to one tensor and takes the loss, so nothing of it is kept.

Forward, the states that enter each block are kept; backward, one block after the other from the last to the first is
loaded, run again with a gradient, a sequence at a time, and let go. Memory is those states, (depth + 1) * [N, T, d],
and one block with g and F in float32.
"""

import torch
from torch import Tensor

from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.core.progress import progress
from compression.core.skeleton import Skeleton, linears
from compression.sensitivity.parts import all_linears, by_layer
from compression.sensitivity.rounding import cost, rounded
from compression.sensitivity.settings import Columns, Settings
from compression.training.cross_entropy import mixed_cross_entropy


def measure(skeleton: Skeleton, ids: Tensor, journal: Journal, settings: Settings) -> Columns:
    """Columns cost_b in nats a token for each width b, and `tdmpq`, the cost at the smallest width.

    There the layers differ most, and there bits are won or lost. Per `block`, `tdmpq` is the sum over the block's
    layers; cost_b is each layer's own in any case.

    Args:
        ids: calibration tokens int64 [N, T].
        settings: per, widths and group_size.

    Raises:
        Problem: the model is an encoder, which has no loss to take the gradient of; the group size does not divide a
            layer's number of inputs.
    """
    if not skeleton.causal:
        raise Problem(
            "params.yaml: sensitivity.method",
            "`tdmpq` takes the gradient of the loss, and an encoder has none of its own",
            "valid: pmpq, cmpq, measured, none",
        )
    sequences = ids.split(1)
    entering = _forward(skeleton, sequences, Journal(journal.folder / "forward"))
    found = _backward(skeleton, sequences, entering, Journal(journal.folder / "backward"), settings)
    parts = all_linears(skeleton, settings.per)
    by_width = {
        bits: {layer: float(found[layer][place]) for layers in parts.values() for layer in layers}
        for place, bits in enumerate(settings.widths)
    }
    least = by_width[min(settings.widths)]
    scores = {part: sum(least[layer] for layer in layers) for part, layers in parts.items()}
    return {"tdmpq": by_layer(skeleton, settings.per, scores)} | {cost(bits): own for bits, own in by_width.items()}


@torch.no_grad()
def _forward(skeleton: Skeleton, sequences: tuple[Tensor, ...], journal: Journal) -> list[Tensor]:
    """The states [N, T, d] that enter each block, and those that leave the last one."""
    states = torch.cat([skeleton.begin(sequence) for sequence in sequences])
    finished, stored = journal.load()
    if finished:
        return [stored[str(index)].to(skeleton.device) for index in range(skeleton.depth + 1)]
    entering = [states]
    for index in progress(range(skeleton.depth), what="tdmpq, forward", unit="block"):
        skeleton.load(index)
        streams = zip(entering[-1].split(1), sequences, strict=True)
        entering.append(torch.cat([skeleton.run(index, hidden, sequence) for hidden, sequence in streams]))
        skeleton.release(index)
    journal.save(1, {str(index): states for index, states in enumerate(entering)})
    return entering


def _backward(
    skeleton: Skeleton, sequences: tuple[Tensor, ...], entering: list[Tensor], journal: Journal, settings: Settings
) -> dict[str, Tensor]:
    """Costs float64 [widths] by layer."""
    finished, costs = journal.load()
    if finished:
        slope = costs.pop("slope").to(skeleton.device)
    else:
        streams = zip(entering[-1].split(1), sequences, strict=True)
        slope = torch.cat([_loss_gradient(skeleton, hidden, sequence) for hidden, sequence in streams])
    tokens = sequences[0].shape[1] - 1
    blocks = range(skeleton.depth - 1 - finished, -1, -1)
    for index in progress(blocks, what="tdmpq, backward", unit="block", total=skeleton.depth, done=finished):
        layers = linears(skeleton.load(index), f"{skeleton.path}.{index}")
        mean = {layer: torch.zeros_like(linear.weight, dtype=torch.float32) for layer, linear in layers.items()}
        fisher = {layer: torch.zeros_like(sums) for layer, sums in mean.items()}
        weights = [linear.weight.requires_grad_() for linear in layers.values()]
        for row, sequence in enumerate(sequences):
            hidden = entering[index][row : row + 1].requires_grad_()
            out = skeleton.run(index, hidden, sequence)
            into, *gradients = torch.autograd.grad(out, [hidden, *weights], slope[row : row + 1])
            slope[row] = into[0]
            for layer, gradient in zip(layers, gradients, strict=True):
                mean[layer] += gradient.float() / len(sequences)
                fisher[layer] += gradient.float().square_() * (tokens / len(sequences))
        for layer, weight in zip(layers, weights, strict=True):
            costs[layer] = _costs(layer, weight.detach(), mean.pop(layer), fisher.pop(layer), settings)
        skeleton.release(index)
        journal.save(len(entering) - 1 - index, costs | {"slope": slope})
    return costs


def _loss_gradient(skeleton: Skeleton, hidden: Tensor, sequence: Tensor) -> Tensor:
    """Gradient of a sequence's mean loss with respect to the states [1, T, d] after the last block."""
    hidden = hidden.detach().requires_grad_()
    loss = mixed_cross_entropy(skeleton.end(hidden, sequence), sequence.to(hidden.device))
    return torch.autograd.grad(loss, hidden)[0]


def _costs(layer: str, weight: Tensor, mean: Tensor, fisher: Tensor, settings: Settings) -> Tensor:
    """float64 [widths]: cost(b) of a layer, given W, g and F [out, in]."""
    found = []
    for bits in settings.widths:
        moved = rounded(layer, weight, bits, settings.group_size).float() - weight.float()
        first = (mean * moved).sum(dtype=torch.float64)
        second = (fisher * moved.square()).sum(dtype=torch.float64) / 2
        found.append(first + second)
    return torch.stack(found).cpu()
