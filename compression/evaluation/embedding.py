"""Sentence embeddings of an encoder, a block of the model at a time.

    e = h / ||h||,   h = the mean of the last states over a sentence's tokens

as Sentence-BERT pools them (Reimers and Gurevych 2019, arXiv 1908.10084). Sentences of one length go through the model
together, so none is ever padded: an embedding depends on its own tokens alone, and no mask has to say which are real.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.core import batches
from compression.core.progress import progress
from compression.core.skeleton import Skeleton


@torch.no_grad()
def embed(skeleton: Skeleton, sentences: Sequence[Tensor]) -> Tensor:
    """Embeddings of sentences, all of them in one walk through the blocks.

    Args:
        skeleton: of an encoder, with or without a head, which is not looked at.
        sentences: ids int64 [T] each, with the special tokens that the model is used to; T may differ.

    Returns:
        float32 [N, d] on the CPU, rows of length 1 in the order of `sentences`.
    """
    order = sorted(range(len(sentences)), key=lambda place: len(sentences[place]))
    alike = [list(places) for _, places in groupby(order, key=lambda place: len(sentences[place]))]
    split = [
        ids
        for places in alike
        for ids in batches.split(torch.stack([sentences[place] for place in places]), skeleton.device)
    ]
    hidden = [skeleton.begin(ids) for ids in split]
    for index in progress(range(skeleton.depth), what="embed", unit="block"):
        skeleton.load(index)
        for part, ids in enumerate(split):
            hidden[part] = skeleton.run(index, hidden[part], ids)
        skeleton.release(index)
    found = torch.cat([pooled(skeleton, states, ids).cpu() for states, ids in zip(hidden, split, strict=True)])
    return found[torch.tensor(order).argsort()]


def pooled(skeleton: Skeleton, hidden: Tensor, ids: Tensor) -> Tensor:
    """States after the last block [N, T, d] of sentences `ids` [N, T] -> their embeddings float32 [N, d]."""
    last: list[Tensor] = []

    def take(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        last.append(output.last_hidden_state)

    # The model below its head, or the model itself: what a family does behind its blocks (a final norm) is in there.
    hook = skeleton.model.base_model.register_forward_hook(take)  # type: ignore[union-attr]
    try:
        skeleton.end(hidden, ids)
    finally:
        hook.remove()
    return F.normalize(last[0].float().mean(1), dim=1)
