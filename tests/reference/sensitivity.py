"""The measures the obvious way: one whole model a part, whole-model gradients, similarities by their definitions."""

import copy
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.quantization import rtn

KIN = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate", "up_proj": "gate"}


def parts(model: nn.Module, blocks: str, per: str) -> Iterator[tuple[str, list[str]]]:
    """Every part by full name, and its linears."""
    for index in range(len(model.get_submodule(blocks))):  # type: ignore[arg-type]
        block = f"{blocks}.{index}"
        layers = [
            name for name, module in model.named_modules() if name.startswith(f"{block}.") and type(module) is nn.Linear
        ]
        if per == "block":
            yield block, layers
            continue
        groups: dict[str, list[str]] = {}
        for layer in layers:
            kind = KIN.get(layer.rpartition(".")[2], layer) if per == "group" else layer
            groups.setdefault(kind, []).append(layer)
        yield from ((" ".join(group), group) for group in groups.values())


def pmpq(model: nn.Module, blocks: str, ids: Tensor, sparsity: float, causal: bool, per: str) -> dict[str, float]:
    """Rise of the loss, or relative change of an encoder's output, by layer."""

    def prune(pruned: nn.Module, part: str, _: list[str]) -> None:
        for tensor in [own for name in part.split() for own in pruned.get_submodule(name).parameters()]:
            entries = tensor.flatten().tolist()
            smallest = sorted(range(len(entries)), key=lambda place: abs(entries[place]))
            for place in smallest[: round(sparsity * len(entries))]:
                entries[place] = 0.0
            tensor.copy_(torch.tensor(entries).view(tensor.shape))

    return _one_by_one(model, blocks, ids, causal, per, prune)


def noise(model: nn.Module, blocks: str, ids: Tensor, deviation: float, draws: int, per: str) -> dict[str, float]:
    """The same of Gaussian noise on a part's first tensor, the mean over some draws."""
    means: dict[str, float] = {}
    for draw in range(draws):

        def disturb(changed: nn.Module, part: str, _: list[str], draw: int = draw) -> None:
            first = next(iter(changed.get_submodule(part.split()[0]).parameters()))
            generator = torch.Generator().manual_seed(zlib.crc32(part.encode()) + draw)
            first += deviation * torch.randn(first.shape, generator=generator)

        for layer, score in _one_by_one(model, blocks, ids, True, per, disturb).items():
            means[layer] = means.get(layer, 0.0) + score / draws
    return means


def measured(
    model: nn.Module, blocks: str, ids: Tensor, bits: int, group_size: int, causal: bool, per: str
) -> dict[str, float]:
    """The same of rounding a part's linears."""

    def quantize(rounded: nn.Module, _: str, layers: list[str]) -> None:
        for layer in layers:
            weight = rounded.get_parameter(f"{layer}.weight")
            weight.copy_(rtn(weight, bits, group_size)[2])

    return _one_by_one(model, blocks, ids, causal, per, quantize)


def changed(model: nn.Module, blocks: str, ids: Tensor, tries: dict[str, Tensor], per: str) -> dict[str, float]:
    """Rise of the loss when a part's weights alone are replaced, by layer."""

    def replace(changed: nn.Module, _: str, layers: list[str]) -> None:
        for layer in layers:
            changed.get_parameter(f"{layer}.weight").copy_(tries[layer])

    return _one_by_one(model, blocks, ids, True, per, replace)


@torch.no_grad()
def _one_by_one(
    model: nn.Module,
    blocks: str,
    ids: Tensor,
    causal: bool,
    per: str,
    change: Callable[[nn.Module, str, list[str]], None],
) -> dict[str, float]:
    base = model(input_ids=ids).logits
    scores = {}
    for part, layers in parts(model, blocks, per):
        changed = copy.deepcopy(model)
        change(changed, part, layers)
        logits = changed(input_ids=ids).logits
        score = _loss(logits, ids) - _loss(base, ids) if causal else (logits - base).norm() / base.norm()
        scores |= dict.fromkeys(layers, float(score))
    return scores


def tdmpq(model: nn.Module, blocks: str, ids: Tensor, bits: int, group_size: int) -> dict[str, float]:
    """|<g, dW>| + 1/2 <F, dW^2> by layer, in float64; F from the gradients of the sequences' summed losses."""
    names = [layer for _, layers in parts(model, blocks, "block") for layer in layers]
    grids = {layer: rtn(model.get_parameter(f"{layer}.weight").detach(), bits, group_size)[2] for layer in names}
    model = copy.deepcopy(model).double()
    weights = [model.get_parameter(f"{layer}.weight") for layer in names]
    first = [torch.zeros_like(weight) for weight in weights]
    second = [torch.zeros_like(weight) for weight in weights]
    tokens = ids.shape[1] - 1
    for sequence in ids.split(1):
        loss = tokens * _loss(model(input_ids=sequence).logits, sequence)
        for place, gradient in enumerate(torch.autograd.grad(loss, weights)):
            first[place] += gradient / (len(ids) * tokens)
            second[place] += gradient**2 / (len(ids) * tokens)
    costs = {}
    for layer, weight, g, fisher in zip(names, weights, first, second, strict=True):
        moved = grids[layer].double() - weight
        costs[layer] = float((g * moved).sum() + 0.5 * (fisher * moved**2).sum())
    return costs


def tdmpq_of_outputs(model: nn.Module, blocks: str, ids: Tensor, tries: dict[str, Tensor]) -> dict[str, float]:
    """<g, dW> + 1/2 mean over tokens of <d_t, dW x_t>^2 by layer, in float64, token by token."""
    names = [layer for _, layers in parts(model, blocks, "block") for layer in layers]
    model = copy.deepcopy(model).double()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(layer: str) -> Callable[..., None]:
        return lambda _module, inputs, output: seen.update({layer: (inputs[0].detach(), output)})

    for layer in names:
        model.get_submodule(layer).register_forward_hook(watch(layer))
    costs = dict.fromkeys(names, 0.0)
    tokens = ids.shape[1] - 1
    for sequence in ids.split(1):
        loss = tokens * _loss(model(input_ids=sequence).logits, sequence)
        gradients = torch.autograd.grad(loss, [seen[layer][1] for layer in names])
        for layer, gradient in zip(names, gradients, strict=True):
            moved = tries[layer].double() - model.get_parameter(f"{layer}.weight").detach()
            inputs = seen[layer][0].reshape(-1, moved.shape[1])
            for x, d in zip(inputs, gradient.reshape(-1, len(moved)), strict=True):
                change = float(d @ (moved @ x))
                costs[layer] += (change + change**2 / 2) / (len(ids) * tokens)
    return costs


def cmpq(
    model: nn.Module, blocks: str, ids: Tensor, per: str, alike: Callable[[np.ndarray, np.ndarray], float]
) -> dict[str, float]:
    """1 - mean similarity of a part's output, averaged over tokens, to all others, by layer."""

    def token_mean(states: Tensor) -> np.ndarray:
        return states.view(*ids.shape, -1).double().mean(1).numpy()

    found: dict[str, np.ndarray] = {}
    owners = list(parts(model, blocks, per))
    if per == "block":
        model.get_submodule(f"{blocks}.0").register_forward_pre_hook(
            lambda _, args, kwargs: found.update(entering=token_mean(args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
    outlets = [name for part, _ in owners for name in part.split()]
    for name in outlets:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: found.update({name: token_mean(out if type(out) is Tensor else out[0])})
        )
    with torch.no_grad():
        model(input_ids=ids)
    found |= {part: np.hstack([found.pop(name) for name in part.split()]) for part, _ in owners}
    scores = {}
    for part, layers in owners:
        similar = [alike(found[part], other) for name, other in found.items() if name != part]
        scores |= dict.fromkeys(layers, 1 - sum(similar) / len(similar))
    return scores


def cca(X: np.ndarray, Y: np.ndarray, components: int) -> float:
    return max(_canonical(_leading(X, components), _leading(Y, components))[0])


def svcca(X: np.ndarray, Y: np.ndarray, components: int) -> float:
    correlations, _ = _canonical(_leading(X, components), _leading(Y, components))
    return float(np.mean(correlations))


def pwcca(X: np.ndarray, Y: np.ndarray, components: int) -> float:
    left, right = (_leading(Z, min(components, _holding(Z, 0.99))) for Z in (X, Y))
    correlations, variates = _canonical(left, right)
    columns = (X - X.mean(0)).T
    weights = [sum(abs(float(variate @ column)) for column in columns) for variate in variates]
    return sum(w * rho for w, rho in zip(weights, correlations, strict=True)) / sum(weights)


def cka(X: np.ndarray, Y: np.ndarray) -> float:
    X, Y = X - X.mean(0), Y - Y.mean(0)

    def squared(A: np.ndarray, B: np.ndarray) -> float:
        return sum(float(a @ b) ** 2 for a in A.T for b in B.T)

    return squared(Y, X) / float(np.sqrt(squared(X, X) * squared(Y, Y)))


def _leading(X: np.ndarray, components: int) -> np.ndarray:
    """Scores on the leading eigenvectors of the covariance."""
    X = X - X.mean(0)
    _, vectors = np.linalg.eigh(X.T @ X)
    return X @ vectors[:, ::-1][:, :components]


def _holding(X: np.ndarray, energy: float) -> int:
    """How many principal components hold so much of the variance."""
    X = X - X.mean(0)
    values = np.linalg.eigvalsh(X.T @ X)[::-1]
    return next(count for count in range(1, len(values) + 1) if values[:count].sum() >= energy * values.sum())


def _canonical(X: np.ndarray, Y: np.ndarray) -> tuple[list[float], list[np.ndarray]]:
    """Correlations and unit variates of X, from the eigenvectors of Sxx^-1 Sxy Syy^-1 Syx."""
    squares, directions = np.linalg.eig(np.linalg.solve(X.T @ X, X.T @ Y) @ np.linalg.solve(Y.T @ Y, Y.T @ X))
    order = np.argsort(-squares.real)[: min(X.shape[1], Y.shape[1])]
    variates = [X @ directions.real[:, place] for place in order]
    correlations = [float(np.sqrt(max(squares.real[place], 0.0))) for place in order]
    return correlations, [variate / np.linalg.norm(variate) for variate in variates]


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())


def outlier_ratio(weight: Tensor, norms: Tensor, threshold: float) -> float:
    scores = [
        abs(w) * norm for row in weight.double().tolist() for w, norm in zip(row, norms.double().tolist(), strict=True)
    ]
    mean = sum(scores) / len(scores)
    return sum(score > threshold * mean for score in scores) / len(scores)
