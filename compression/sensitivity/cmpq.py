"""CMPQ: a block whose states are unlike those of all others is sensitive (CPTQuant, arXiv 2412.03599, canonical
correlation).

Each state is averaged over the tokens of a sequence, H_i [N, d]; S_i = 1 - mean over j != i of the similarity of H_i
and H_j. The depth + 1 states are what enters block 0 and what each block puts out; block l is scored by the state that
it puts out, so that the first state has a say in every score and none of its own.
Per `layer`, the states are the outputs of all linears, and each is scored by its own; per `group`, the outputs of its
linears side by side are one state.
"""

import torch
from torch import Tensor, nn

from compression.core import batches
from compression.core.journal import Journal
from compression.core.progress import progress
from compression.core.skeleton import Skeleton
from compression.sensitivity.parts import by_layer, parts
from compression.sensitivity.settings import Columns, Settings
from compression.sensitivity.similarity import similarities

ENTERING = "entering"  # the state that enters block 0


def measure(skeleton: Skeleton, ids: Tensor, journal: Journal, settings: Settings) -> Columns:
    """Column `cmpq`: S in [0, 1], of no unit.

    Args:
        ids: calibration tokens int64 [N, T]; many short sequences serve better than few long ones.
        settings: per, similarity and components.

    Raises:
        Problem: see compression.sensitivity.similarity.
    """
    means = _token_means(skeleton, ids, journal, settings.per)
    alike = similarities(list(means.values()), settings.similarity, settings.components)
    others = (alike.sum(1) - alike.diagonal()) / (len(means) - 1)
    scores = dict(zip(means, (1 - others).tolist(), strict=True))
    return {"cmpq": by_layer(skeleton, settings.per, scores)}


@torch.no_grad()
def _token_means(skeleton: Skeleton, ids: Tensor, journal: Journal, per: str) -> dict[str, Tensor]:
    """What each part puts out, averaged over tokens: float32 [N, width] by part; per `block` with what enters first."""
    split = batches.split(ids, skeleton.device)
    begun = torch.cat([skeleton.begin(batch) for batch in split])
    finished, state = journal.load()
    hidden = state.pop("hidden", begun).to(skeleton.device)
    means = state or ({ENTERING: _mean(begun)} if per == "block" else {})
    blocks = range(finished, skeleton.depth)
    for index in progress(blocks, what="cmpq", unit="block", total=skeleton.depth, done=finished):
        skeleton.load(index)
        modules = parts(skeleton, index, per)
        seen: dict[str, list[list[Tensor]]] = {part: [[] for _ in _outlets(module)] for part, module in modules.items()}
        hooks = [
            outlet.register_forward_hook(_watch(own, ids.shape[1]))
            for part, module in modules.items()
            for outlet, own in zip(_outlets(module), seen[part], strict=True)
        ]
        for states, batch in zip(hidden.split(len(split[0])), split, strict=True):
            states.copy_(skeleton.run(index, states, batch))
        for hook in hooks:
            hook.remove()
        skeleton.release(index)
        means |= {part: torch.cat([torch.cat(own) for own in outlets], 1) for part, outlets in seen.items()}
        journal.save(index + 1, means | {"hidden": hidden})
    return dict(sorted(means.items()))  # in one order, whether or not they come from the journal


def _outlets(module: nn.Module) -> list[nn.Module]:
    """The modules whose outputs, side by side, are a part's state."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _watch(seen: list[Tensor], length: int):  # type: ignore[no-untyped-def]
    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        seen.append(_mean(states.reshape(-1, length, states.shape[-1])))

    return hook


def _mean(states: Tensor) -> Tensor:
    """Mean over tokens of states [n, T, d]: float32 [n, d]."""
    return states.float().mean(1).cpu()
