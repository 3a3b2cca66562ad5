"""TDMPQ: what rounding a layer costs by Taylor's formula (CPTQuant, arXiv 2412.03599, Taylor decomposition).

    dW = Q_b(W) - W
    cost(b) = <g, dW> + 1/2 <F, dW o dW>                          curvature `diagonal`
    cost(b) = <g, dW> + 1/2 mean over tokens of <d_t, dW x_t>^2    curvature `outputs`

g is the mean gradient of the loss in nats a token, F the diagonal of the Fisher matrix, which stands for that of the
Hessian: the mean over sequences of the squared gradient of a sequence's summed loss, divided by its tokens. (With
the mean loss instead, whose gradient shrinks as sequences grow, the second term would be too small by their length.)
The first term keeps its sign: of a hundred layers' terms most cancel, and their absolute values would drown the second.
The paper's code has no derivative: it adds unit noise to one tensor and takes the loss, see noise.py.

The diagonal takes the errors of a row's weights for independent. GPTQ's are not: they are made so that they cancel in
the layer's output. So the other form takes that output's error dW x_t at each token and d_t, the gradient of a
sequence's summed loss with respect to the output: the Fisher matrix of the outputs, whole within a token, with nothing
between tokens.

An encoder has no loss of its own, and who is given text alone has no labels for a head. What it loses is 1 - cos of its
sentence embedding e with the dense one, 1/2 ||e(W + dW) - e(W)||^2. At the dense point that is zero, and so is its
gradient. What is left is Gauss-Newton's second term: in place of the loss each sequence sends back <r, e>, with r of
random signs, so that E r r^T = I (Hutchinson 1990) and the mean of the squared gradients is the diagonal of J^T J, with
J the Jacobian of e. A head's cross entropy would count only what moves its classes apart; this counts all that an
embedding may be used for.

The gradients come from the sweep of `compression/backward.py`, a sequence at a time. Memory is what that needs, and one
block's g and F in float32, or one sequence's inputs and outputs of its layers.
"""

import torch
from torch import Tensor, nn

from compression.backward import Send, sweep
from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.evaluation.embedding import pooled
from compression.sensitivity.parts import all_linears, by_layer
from compression.sensitivity.rounding import cost, rounded
from compression.sensitivity.settings import Columns, Settings
from compression.training.cross_entropy import mixed_cross_entropy

SEED = 0  # of the random signs


def measure(skeleton: Skeleton, ids: Tensor, journal: Journal, settings: Settings) -> Columns:
    """Columns cost_b for each width b, and `tdmpq`, the cost at the smallest width: in nats a token, or for an encoder
    in 1 - cosine of sentence embeddings.

    There the layers differ most, and there bits are won or lost. Per `block`, `tdmpq` is the sum over the block's
    layers; cost_b is each layer's own in any case.

    Args:
        ids: calibration tokens int64 [N, T].
        settings: per, widths, group_size, tried and curvature.

    Raises:
        Problem: the group size does not divide a layer's number of inputs.
    """
    found = _costs(skeleton, ids.split(1), journal, settings)
    parts = all_linears(skeleton, settings.per)
    by_width = {
        bits: {layer: float(found[layer][place]) for layers in parts.values() for layer in layers}
        for place, bits in enumerate(settings.widths)
    }
    least = by_width[min(settings.widths)]
    scores = {part: sum(least[layer] for layer in layers) for part, layers in parts.items()}
    return {"tdmpq": by_layer(skeleton, settings.per, scores)} | {cost(bits): own for bits, own in by_width.items()}


def _costs(
    skeleton: Skeleton, sequences: tuple[Tensor, ...], journal: Journal, settings: Settings
) -> dict[str, Tensor]:
    """Costs float64 [widths] by layer."""
    _, costs = journal.load()
    # What the gradient and its square count: a mean loss is made a summed one; an embedding has no first term.
    first, second = (1, sequences[0].shape[1] - 1) if skeleton.causal else (0, 1)
    for visit in sweep(skeleton, sequences, _sender(skeleton), journal.folder, "tdmpq"):
        seen = (_Outputs if settings.curvature == "outputs" else _Weights)(visit.layers, settings)
        for _, gradients in visit.gradients(seen.watched):
            seen.add(gradients, first, second)
        costs |= {layer: own.cpu() / len(sequences) for layer, own in seen.costs().items()}
        seen.close()
        journal.save(skeleton.depth - visit.index, costs)
    return costs


def _sender(skeleton: Skeleton) -> Send:
    """What each sequence sends back: its mean loss, or <r, e>."""
    draw = torch.Generator().manual_seed(SEED)

    def send(hidden: Tensor, sequence: Tensor) -> Tensor:
        if skeleton.causal:
            sent = mixed_cross_entropy(skeleton.end(hidden, sequence), sequence.to(hidden.device))
        else:
            embedding = pooled(skeleton, hidden, sequence)[0]
            sent = embedding @ signs(len(embedding), draw).to(hidden.device)
        return torch.stack(torch.autograd.grad(sent, hidden))

    return send


def signs(width: int, draw: torch.Generator) -> Tensor:
    """r float32 [width], each entry 1 or -1 by the toss of a coin."""
    return torch.randint(2, (width,), generator=draw) * 2.0 - 1


class _Weights:
    """Costs with the diagonal of the Fisher matrix: g and F of each weight [out, in], summed over sequences."""

    def __init__(self, layers: dict[str, nn.Linear], settings: Settings) -> None:
        self.layers, self.settings = layers, settings
        self.first = {layer: torch.zeros_like(linear.weight, dtype=torch.float32) for layer, linear in layers.items()}
        self.second = {layer: torch.zeros_like(sums) for layer, sums in self.first.items()}
        self.weights = [linear.weight.requires_grad_() for linear in layers.values()]  # before the block is run

    def watched(self) -> list[Tensor]:
        """With respect to what the gradient of a sequence's mean loss is taken."""
        return self.weights

    def add(self, gradients: list[Tensor], first: int, second: int) -> None:
        for layer, gradient in zip(self.layers, gradients, strict=True):
            self.first[layer] += gradient.float() * first
            self.second[layer] += gradient.float().square_() * second

    def costs(self) -> dict[str, Tensor]:
        """float64 [widths] by layer, summed over sequences."""
        found: dict[str, Tensor] = {}
        for layer, moves in _moves(self.layers, self.settings).items():
            terms = [
                (self.first[layer] * moved).sum(dtype=torch.float64)
                + (self.second[layer] * moved.square()).sum(dtype=torch.float64) / 2
                for moved in moves
            ]
            found[layer] = torch.stack(terms)
        return found

    def close(self) -> None:
        """Nothing to let go of."""


class _Outputs:
    """Costs with the Fisher matrix of the outputs: what each layer's errors do to the loss at each token."""

    def __init__(self, layers: dict[str, nn.Linear], settings: Settings) -> None:
        self.moves = _moves(layers, settings)
        self.sums = {layer: torch.zeros(len(settings.widths), dtype=torch.float64) for layer in layers}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.hooks = [linear.register_forward_hook(self._watch(layer)) for layer, linear in layers.items()]

    def _watch(self, layer: str):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[layer], self.outputs[layer] = inputs[0].detach(), output

        return hook

    def watched(self) -> list[Tensor]:
        return [self.outputs[layer] for layer in self.moves]

    def add(self, gradients: list[Tensor], first: int, second: int) -> None:
        for (layer, moves), gradient in zip(self.moves.items(), gradients, strict=True):
            for place, moved in enumerate(moves):
                error = self.inputs[layer] @ moved.to(gradient.dtype).T
                change = (error.float() * gradient.float()).sum(-1, dtype=torch.float64)
                self.sums[layer][place] += (first * change.sum() + second * change.square().sum() / 2).cpu()

    def costs(self) -> dict[str, Tensor]:
        return self.sums

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _moves(layers: dict[str, nn.Linear], settings: Settings) -> dict[str, list[Tensor]]:
    """dW float32 [out, in] at each width, by layer."""
    found: dict[str, list[Tensor]] = {}
    for layer, linear in layers.items():
        weight = linear.weight.detach()
        tries = [rounded(layer, weight, bits, settings.group_size, settings.tried) for bits in settings.widths]
        found[layer] = [own.float() - weight.float() for own in tries]
    return found
