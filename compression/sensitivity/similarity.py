"""How alike two sets of states are: matrices X [N, a] and Y [N, b] of the same N samples, columns centred.

    cca     the largest canonical correlation (Hotelling 1936), CPTQuant's one component
    svcca   the mean canonical correlation of the leading principal components (Raghu et al. 2017, arXiv 1706.05806)
    pwcca   the mean weighted by how much of X each canonical direction makes up, of the components that hold ENERGY of
            the variance (Morcos et al. 2018, arXiv 1806.05759, eq. 2); not symmetric
    cka     ||Y^T X||^2 / (||X^T X|| ||Y^T Y||), linear (Kornblith et al. 2019, arXiv 1905.00414, eq. 4)

Few samples correlate whatever they are: two subspaces of k dimensions in the N - 1 that centred samples span have to
meet once 2 k > N - 1, and correlate highly long before. So each matrix is cut to `components` principal components
first, for `cca` as well; where these are as many as it has columns, that is CCA as published. Ten samples a component
are a good rule, two are demanded. CKA is not cut and has no such limit, but is too large where columns far outnumber
samples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compression.core.errors import Problem

ENERGY = 0.99


class State(NamedTuple):
    """A state, ready to be compared; float64.

    Attributes:
        centred: X [N, a], columns centred.
        basis: U [N, k], the leading left singular vectors of X.
    """

    centred: Tensor
    basis: Tensor


def similarities(states: list[Tensor], similarity: str, components: int) -> Tensor:
    """Similarity of every pair, in [0, 1].

    Args:
        states: each [N, width].
        similarity: cca, svcca, pwcca or cka.
        components: at most so many are kept of each.

    Returns:
        float64 [states, states]; in row i, for pwcca, the directions are weighted by state i.

    Raises:
        Problem: too few samples for so many components; a state that is not finite or the same for all samples.
    """
    if similarity != "cka":
        check_samples(len(states[0]), min(components, max(state.shape[1] for state in states)))
    reduced = [_reduce(state, similarity, components) for state in states]
    found = torch.eye(len(states), dtype=torch.float64)
    for row, own in enumerate(reduced):
        for column, other in enumerate(reduced):
            if similarity == "pwcca" and row != column:
                found[row, column] = _projection_weighted(own, other)
            elif row < column:
                found[row, column] = found[column, row] = _PAIRS[similarity](own, other)
    return found


def check_samples(samples: int, components: int) -> None:
    """Raises Problem where so few samples are alike in so many components whatever they are."""
    if samples <= 2 * components:
        raise Problem(
            "params.yaml: sensitivity.sequences",
            f"{samples} sequences correlate in {components} components whatever the states are",
            f"valid: above {2 * components}, better {10 * components} (they may be short); fewer "
            "sensitivity.components; or sensitivity.similarity cka",
        )


def _reduce(state: Tensor, similarity: str, components: int) -> State:
    state = state.double()
    if not state.isfinite().all():
        raise Problem("sensitivity", "a state holds NaN or infinite values", "are the weights sound?")
    centred = state - state.mean(0)
    vectors, values, _ = torch.linalg.svd(centred, full_matrices=False)
    noise = values[0] * max(state.shape) * torch.finfo(torch.float32).eps
    rank = int((values > noise).sum())
    if not rank:
        raise Problem("sensitivity", "a state is the same for every sequence", "give other text")
    if similarity == "pwcca":
        held = values.square().cumsum(0) / values.square().sum()
        rank = min(rank, int((held < ENERGY).sum()) + 1)
    return State(centred, vectors[:, : min(rank, components)])


def _largest_correlation(own: State, other: State) -> float:
    return float(_correlations(own, other)[0])


def _mean_correlation(own: State, other: State) -> float:
    return float(_correlations(own, other).mean())


def _correlations(own: State, other: State) -> Tensor:
    """Canonical correlations [min(k, l)], falling: the singular values of U^T V."""
    found: Tensor = torch.linalg.svdvals(own.basis.T @ other.basis)
    return found.clamp(max=1)


def _projection_weighted(own: State, other: State) -> float:
    turned, correlations, _ = torch.linalg.svd(own.basis.T @ other.basis, full_matrices=False)
    variates = own.basis @ turned  # canonical variates of X, orthonormal
    weights = (variates.T @ own.centred).abs().sum(1)
    return float((weights * correlations.clamp(max=1)).sum() / weights.sum())


def _linear_cka(own: State, other: State) -> float:
    mine, yours = (state.centred @ state.centred.T for state in (own, other))
    return float((mine * yours).sum() / (mine.norm() * yours.norm()))


_PAIRS = {"cca": _largest_correlation, "svcca": _mean_correlation, "cka": _linear_cka}
