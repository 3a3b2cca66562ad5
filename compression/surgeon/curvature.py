"""A and G of a model's layers, block by block.

For a layer with inputs a and gradients g of a sequence's summed loss with respect to its outputs, a bias being an input
that is always 1, the Fisher matrix of a token is the mean over tokens of (g g^T) (x) (a a^T). It stands for

    A = mean a a^T,   G = mean g g^T                         passes 0: as if a and g were independent (K-FAC)
    A = mean |g|^2 a a^T / mean |g|^2                        weighted: what the Fisher matrix, traced over outputs, has
    G <- mean (a^T A a) g g^T / ||A||^2                      passes 1, 3, ...
    A <- mean (g^T G g) a a^T / ||G||^2                      passes 2, 4, ...

K-FAC is Martens and Grosse's (2015, arXiv 1503.05671); the passes are the power iteration towards the nearest Kronecker
product (Van Loan and Pitsianis 1993) that LLM Surgeon offers, a half step each, begun at A. Means are over all N T
tokens; the last of a sequence predicts nothing, and its g is zero.

Weighted, tr_R (G (x) A) = tr(G) A is the Fisher matrix's own, and so is the product's trace. It matters where a few
tokens have inputs a hundred times as long as others' and next to no gradient, as the first of a sequence often has:
taken for independent, they rule A, and layers where there are such tokens look as if nothing could be spared.

The loss is that of the text's own next tokens (empirical Fisher), or of tokens drawn from what the model predicts. Of
these each draw is sent back by itself, since the mean of outer products is not the outer product of a mean.

`activations` leaves G the identity and needs no way back; `identity` looks at no text at all. Gradients come from the
sweep of `compression/backward.py`; memory is what that needs, and one block's A and G.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from compression.backward import Send, Visit, sweep
from compression.core import batches
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.core.progress import progress
from compression.core.skeleton import Skeleton, linears
from compression.statistics import Gram
from compression.surgeon.factors import Factors

TINY = torch.finfo(torch.float32).tiny
ROWS = 64  # tokens whose float32 probabilities are alive at a time


@dataclass(frozen=True)
class Curvature:
    """What is taken for the curvature of the loss; all but `kind` is of `kfac` alone.

    Attributes:
        kind: `kfac`: A and G; `activations`: A alone; `identity`: neither.
        labels: whose loss is sent back, that of the text's own tokens (`data`) or of some that the model itself would
            have written (`sampled`).
        samples: how many are drawn at each place.
        passes: half steps towards the nearest Kronecker product, each one more run of every block.
        seed: of the draws.
        weighted: whether a token counts in A by the square of its gradient.
    """

    kind: Literal["kfac", "activations", "identity"] = "kfac"
    labels: Literal["data", "sampled"] = "data"
    samples: int = 1
    passes: int = 0
    seed: int = 0
    weighted: bool = False


def factors_by_block(
    skeleton: Skeleton,
    ids: Tensor,
    layers: Collection[str],
    folder: Path,
    curvature: Curvature,
    what: str = "curvature",
) -> Iterator[tuple[int, dict[str, Factors]]]:
    """The factors of `layers`, a block at a time.

    When the next block is asked for, the one before is done: that is journaled in `folder`, and a run that was killed
    goes on behind it and gives the same bytes.

    Args:
        skeleton: of the model as it is; what is made of a block's factors does not change those of the next.
        ids: int64 [N, T].
        layers: full names of linears in the blocks.
        folder: for states and journal; of this very computation.
        what: the progress bar's name.

    Yields:
        A block's number and the factors of its layers by name, on the skeleton's device. Blocks without such layers
        are left out. The last block comes first, but with `activations` the first one. Layers that have the same
        input (q, k and v; gate and up) share one tensor `inputs`, unless each has its own (weighted, passes > 1).

    Raises:
        Problem: the model is an encoder, which has no loss of its own to send back; inputs or gradients are not finite.
    """
    blocks: dict[int, list[str]] = {}
    for layer in layers:
        blocks.setdefault(int(layer.removeprefix(f"{skeleton.path}.").partition(".")[0]), []).append(layer)
    if not blocks:
        return
    if curvature.kind == "identity":
        yield from _identities(blocks, Journal(folder))
    elif curvature.kind == "activations":
        yield from _activations(skeleton, ids, blocks, Journal(folder), what)
    else:
        yield from _kfac(skeleton, ids, blocks, folder, curvature, what)


def _identities(blocks: dict[int, list[str]], journal: Journal) -> Iterator[tuple[int, dict[str, Factors]]]:
    finished, _ = journal.load()
    for done, index in enumerate(sorted(blocks, reverse=True)[finished:], finished + 1):
        yield index, dict.fromkeys(blocks[index], Factors(None, None))
        journal.save(done, {})


def _activations(
    skeleton: Skeleton, ids: Tensor, blocks: dict[int, list[str]], journal: Journal, what: str
) -> Iterator[tuple[int, dict[str, Factors]]]:
    parts, depth = batches.split(ids, skeleton.device), max(blocks) + 1
    begun = torch.cat([skeleton.begin(part) for part in parts])
    finished, live = journal.load()
    states = live.get("states", begun).to(skeleton.device)
    for index in progress(range(finished, depth), what=what, unit="block", total=depth, done=finished):
        inside = linears(skeleton.load(index), f"{skeleton.path}.{index}")
        watch = _Watch({layer: inside[layer] for layer in blocks.get(index, [])})
        moments: dict[str, _Moment] = {}
        with torch.no_grad():
            for own, part in zip(states.split(len(parts[0])), parts, strict=True):
                leaving = skeleton.run(index, own, part)
                watch.add_inputs(moments)
                own.copy_(leaving)  # not before: without a norm in front of it, a layer's input is this very memory
        factors = {layer: Factors(matrix, None) for layer, matrix in watch.shared(moments).items()}
        watch.close()
        if factors:
            yield index, factors
        skeleton.release(index)
        journal.save(index + 1, {"states": states})


def _kfac(
    skeleton: Skeleton, ids: Tensor, blocks: dict[int, list[str]], folder: Path, curvature: Curvature, what: str
) -> Iterator[tuple[int, dict[str, Factors]]]:
    if not skeleton.causal:
        raise Problem(
            type(skeleton.model).__name__,
            "an encoder has no loss of its own whose curvature could be taken",
            "valid: curvature `activations` or `identity`",
        )
    parts = batches.split(ids, skeleton.device)
    for visit in sweep(skeleton, parts, _sender(skeleton, curvature), folder, what, min(blocks)):
        if visit.index in blocks:
            watch = _Watch({layer: visit.layers[layer] for layer in blocks[visit.index]})
            factors = _factors(visit, watch, curvature)
            watch.close()
            yield visit.index, factors


def _factors(visit: Visit, watch: "_Watch", curvature: Curvature) -> dict[str, Factors]:
    """Runs the block once, and once more for each pass."""
    seen = {layer: watch.input_moment(layer) for layer in watch.layers if curvature.weighted}
    sent = watch.output_moments()
    for draw, gradients in visit.gradients(watch.outputs, again=curvature.passes > 0):
        if draw == 0 and not curvature.weighted:
            watch.add_inputs(seen)
        for layer, gradient in zip(watch.layers, gradients, strict=True):
            sent[layer].add(gradient)
            if curvature.weighted:
                seen[layer].add(watch.inputs[layer], _multiplied(gradient).float().square().sum(1))
    inputs = _means(seen) if curvature.weighted else watch.shared(seen)
    outputs = _means(sent)
    if curvature.weighted:  # tr G is mean |g|^2; where no gradient comes back, nothing is divided by nothing
        inputs = {layer: matrix / outputs[layer].trace().clamp(min=TINY) for layer, matrix in inputs.items()}
    for turn in range(curvature.passes):
        sides = (inputs, outputs) if turn % 2 == 0 else (outputs, inputs)
        sides[1].update(_refined(visit, watch, sides[0], of_outputs=turn % 2 == 0, again=turn + 1 < curvature.passes))
    return {layer: Factors(inputs[layer], outputs[layer]) for layer in watch.layers}


def _refined(
    visit: Visit, watch: "_Watch", other: dict[str, Tensor], of_outputs: bool, again: bool
) -> dict[str, Tensor]:
    """One side of the nearest Kronecker product, the other being given: half a step of the power iteration."""
    moments = watch.output_moments() if of_outputs else {layer: watch.input_moment(layer) for layer in watch.layers}
    for _, gradients in visit.gradients(watch.outputs, again):
        for layer, gradient in zip(watch.layers, gradients, strict=True):
            pair = (gradient, watch.inputs[layer])
            own, opposite = pair if of_outputs else pair[::-1]
            moments[layer].add(own, _quadratic(opposite, other[layer]))
    return {
        layer: matrix / other[layer].double().square().sum().clamp_(min=TINY)  # where nothing comes back
        for layer, matrix in _means(moments).items()
    }


def _sender(skeleton: Skeleton, curvature: Curvature) -> Send:
    """Sends back each sequence's summed loss, whose slope at the logits is softmax - one-hot label; a draw each."""
    draw = torch.Generator().manual_seed(curvature.seed)

    def send(hidden: Tensor, ids: Tensor) -> Tensor:
        logits = skeleton.end(hidden, ids)
        if curvature.labels == "data":
            labels = ids[None, :, 1:]
        else:
            chances = torch.rand(len(ids), ids.shape[1] - 1, curvature.samples, generator=draw)
            labels = _drawn(logits.detach(), chances.to(logits.device)).movedim(-1, 0)
        slopes: list[Tensor] = []
        for number, own in enumerate(labels.to(logits.device)):
            more = number + 1 < len(labels)
            slopes += torch.autograd.grad(logits, hidden, _error(logits.detach(), own), retain_graph=more)
        return torch.stack(slopes)

    return send


def _drawn(logits: Tensor, chances: Tensor) -> Tensor:
    """Tokens int64 [n, T - 1, S] as logits [n, T, V] predict them, for chances [n, T - 1, S] in [0, 1)."""
    drawn = torch.empty(chances.shape, dtype=torch.int64, device=logits.device)
    for row in range(len(drawn)):
        pieces = (whole.split(ROWS) for whole in (logits[row, :-1], chances[row], drawn[row]))
        for own, chance, found in zip(*pieces, strict=True):
            below = own.float().softmax(1).cumsum(1)
            places = torch.searchsorted(below, chance * below[:, -1:], right=True)
            found.copy_(places.clamp_(max=own.shape[1] - 1))
    return drawn


def _error(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax - one-hot label [n, T, V] of logits [n, T, V] for labels [n, T - 1]; zero at the last token."""
    slope = torch.zeros_like(logits)
    for row, own in enumerate(labels):
        for start in range(0, len(own), ROWS):
            here = own[start : start + ROWS]
            p = logits[row, start : start + len(here)].float().softmax(1)
            p[torch.arange(len(here), device=p.device), here] -= 1
            slope[row, start : start + len(here)] = p
    return slope


class _Moment:
    """Mean over tokens of w x x^T, with w a token's weight and, for a layer with a bias, a 1 behind each x."""

    def __init__(self, width: int, bias: bool, device: torch.device) -> None:
        self._gram = Gram(width, device)
        # Sums of w x and of w; not a column of the products, which would round them to the inputs' type.
        self._ones = torch.zeros(width + 1, dtype=torch.float64, device=device) if bias else None

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Adds x [..., width], with their weights float32 [n] or with 1."""
        flat = _multiplied(rows)
        scale = torch.ones(len(flat), device=flat.device) if weights is None else weights.sqrt()
        if weights is not None:
            flat = (flat.float() * scale[:, None]).to(flat.dtype)
        self._gram.update(flat)
        if self._ones is not None:
            self._ones[:-1] += scale @ flat.float()
            self._ones[-1] += scale.square().sum()

    def mean(self) -> Tensor:
        """float32 [width, width], or one wider each way with a bias."""
        matrix = self._gram.matrix()
        if self._ones is None:
            return matrix
        column = (self._ones / self._gram.tokens).float()
        return torch.cat([torch.cat([matrix, column[None, :-1]]), column[:, None]], 1)


def _means(moments: dict[str, _Moment]) -> dict[str, Tensor]:
    """Makes means of sums, one after the other, so that there are never both of all layers.

    Raises:
        Problem: one is not finite.
    """
    means: dict[str, Tensor] = {}
    for layer in list(moments):
        means[layer] = moments.pop(layer).mean()
        if not means[layer].isfinite().all():
            raise Problem(layer, "its inputs or gradients hold NaN or infinite values", "is the model sound?")
    return means


def _quadratic(rows: Tensor, matrix: Tensor) -> Tensor:
    """x^T M x float32 [n] of x [..., width], with a 1 behind each where M is one wider."""
    flat = _multiplied(rows)
    width = flat.shape[1]
    found = ((flat @ matrix[:width, :width].to(flat.dtype)).float() * flat).sum(1)
    if len(matrix) > width:
        found += 2 * (flat.float() @ matrix[:width, width]) + matrix[width, width]
    return found.clamp_(min=0)  # what roundings may miss


def _multiplied(rows: Tensor) -> Tensor:
    """[..., width] -> [n, width] in the type in which `Gram` multiplies."""
    flat = rows.detach().flatten(0, -2)
    return flat if flat.dtype == torch.bfloat16 and flat.device.type == "cpu" else flat.float()


class _Watch:
    """What goes into some layers of a block and comes out, of the batch that went through last.

    Attributes:
        layers: that are looked at.
        inputs: [..., C] by layer.
    """

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        self.layers = layers
        self.inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._hooks = [linear.register_forward_hook(self._take(layer)) for layer, linear in layers.items()]

    def _take(self, layer: str):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[layer], self._outputs[layer] = inputs[0], output

        return hook

    def outputs(self) -> list[Tensor]:
        """[..., R], in the order of the layers."""
        return [self._outputs[layer] for layer in self.layers]

    def close(self) -> None:
        """Looks no longer, and lets go of the batch."""
        for hook in self._hooks:
            hook.remove()
        self.inputs.clear()
        self._outputs.clear()

    def input_moment(self, layer: str) -> _Moment:
        linear = self.layers[layer]
        return _Moment(linear.in_features, linear.bias is not None, linear.weight.device)

    def output_moments(self) -> dict[str, _Moment]:
        return {
            layer: _Moment(linear.out_features, False, linear.weight.device) for layer, linear in self.layers.items()
        }

    def leader(self, layer: str) -> str:
        """The first layer that has the same A: that sees the same tensor, and has a bias or none as well."""
        bias = self.layers[layer].bias is None
        return next(
            other
            for other, linear in self.layers.items()
            if self.inputs[other] is self.inputs[layer] and (linear.bias is None) == bias
        )

    def add_inputs(self, moments: dict[str, _Moment]) -> None:
        """Adds the batch's inputs to the moments of the leaders."""
        for layer in self.layers:
            if self.leader(layer) == layer:
                moments.setdefault(layer, self.input_moment(layer)).add(self.inputs[layer])

    def shared(self, moments: dict[str, _Moment]) -> dict[str, Tensor]:
        """A by layer, from the moments of the leaders."""
        means = _means(moments)
        return {layer: means[self.leader(layer)] for layer in self.layers}
