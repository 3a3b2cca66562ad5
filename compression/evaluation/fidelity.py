"""How true the embeddings of an altered encoder are to those of the dense one."""

from typing import NamedTuple

import torch
from torch import Tensor

from compression.sensitivity.claims import spearman


class Fidelity(NamedTuple):
    """Both are 1 where nothing has changed.

    Attributes:
        cosine: mean over sentences of that between the sentence's two embeddings.
        ranks: Spearman's correlation of the similarities of all pairs of sentences: does a search still find the same?
    """

    cosine: float
    ranks: float


def fidelity(altered: Tensor, dense: Tensor) -> Fidelity:
    """Compares the embeddings [N, d] of the same sentences, rows of length 1; N at least 3."""
    mine, yours = altered.double(), dense.double()
    pairs = torch.triu_indices(len(mine), len(mine), 1)
    found, wanted = ((own @ own.T)[pairs[0], pairs[1]].tolist() for own in (mine, yours))
    # Pairs share sentences, so an interval from pairs drawn anew would mean nothing: one draw, and it is dropped.
    rho, _, _ = spearman(found, wanted, seed=0, resamples=1)
    return Fidelity(float((mine * yours).sum(1).mean()), rho)
