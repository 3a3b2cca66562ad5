"""Membership inference: can a text that was learned be told from one that never was? A score a sample, higher is seen.

    loss              mean log p of the answer's tokens (Yeom et al. 2018)
    zlib              the same, over the bytes that zlib makes of the answer (Carlini et al. 2021)
    min_k_20, _40     mean of the lowest 20 or 40 % of the log p (Shi et al. 2023, arXiv 2310.16789)
    min_k_plus_*      mean of the lowest of (log p - m_t) / s_t, standardised at each place (arXiv 2404.02936)

Each score is worth its AUC: the chance that a sample that was learned scores higher than one that was not. At 1/2
nothing is told; what a model that never saw either text reaches is the mark, as texts differ by themselves.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from compression.evaluation.loss import TokenFigures
from compression.training.samples import Samples

SHARES = (20, 40)  # percent of the tokens


def scores(figures: TokenFigures, samples: Samples, texts: Sequence[str]) -> dict[str, Tensor]:
    """Scores float64 [N] by name.

    Args:
        texts: the answers as text, N of them.
    """
    counted = samples.answer[:, 1:]
    log_p, standardised = -figures.loss.double(), figures.standardised.double()
    mean = (log_p * counted).sum(1) / counted.sum(1)
    found = {"loss": mean, "zlib": mean / torch.tensor([len(zlib.compress(text.encode())) for text in texts])}
    for share in SHARES:
        found[f"min_k_{share}"] = lowest_mean(log_p, counted, share)
        found[f"min_k_plus_{share}"] = lowest_mean(standardised, counted, share)
    return found


def lowest_mean(values: Tensor, counted: Tensor, percent: int) -> Tensor:
    """Mean of the lowest `percent` of each row's counted values, at least of one; values float64 [N, T] -> [N]."""
    ordered = values.masked_fill(~counted, torch.inf).sort(1).values
    number = (counted.sum(1) * percent // 100).clamp_min(1)
    taken = torch.arange(values.shape[1]) < number[:, None]
    return ordered.masked_fill(~taken, 0).sum(1) / number


def auc(seen: Tensor, unseen: Tensor) -> float:
    """Chance that a score of `seen` [n] is above one of `unseen` [m], equal scores counting half; NaN among NaN."""
    if seen.isnan().any() or unseen.isnan().any():
        return float("nan")
    ordered = unseen.sort().values
    below, up_to = (torch.searchsorted(ordered, seen, right=right).double() for right in (False, True))
    return float((below + up_to).mean() / (2 * len(unseen)))
