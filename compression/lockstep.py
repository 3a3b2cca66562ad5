"""One pass through a block, in which every layer is changed as soon as all of its input is known.

The usual way needs two passes a block: one to collect the inputs, one to go on with the changed weights.
Here the batches walk through the block in step: each stops in front of every linear, and when the last one
has arrived, the layer is changed and all go on with its new output. Since each batch is a greenlet, it keeps
no more than its own live activations while it waits, and temporaries are those of one batch.
"""

from collections.abc import Callable, Mapping

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from compression.core.errors import Problem


def walk_in_step(
    batches: int,
    run: Callable[[int], None],
    linears: Mapping[str, nn.Module],
    see: Callable[[int, str, Tensor], None],
    change: Callable[[str], None],
) -> None:
    """Runs all batches through a block in step.

    Args:
        batches: how many there are.
        run: pushes one batch through the block.
        linears: the layers to stop at, by name.
        see: is given (batch, layer, input [..., in]) when a batch arrives at a layer.
        change: is given the layer's name once every batch has arrived there, before any goes on.

    Raises:
        Problem: the batches do not visit the same layers in the same order, as with routed experts.
    """
    scheduler = getcurrent()

    def stop_before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            scheduler.switch((name, inputs[0]))

        return hook

    hooks = [module.register_forward_pre_hook(stop_before(name)) for name, module in linears.items()]
    walkers = [greenlet(run) for _ in range(batches)]
    try:
        arrived = [_arrive(batch, walker.switch(batch), see) for batch, walker in enumerate(walkers)]
        while not all(walker.dead for walker in walkers):
            if len(set(arrived)) != 1:
                raise Problem(
                    str(next(iter(linears))),
                    f"batches part ways in this block ({sorted({str(name) for name in arrived})})",
                    "routed experts are not supported by one-pass pruning yet",
                )
            change(str(arrived[0]))
            arrived = [_arrive(batch, walker.switch(), see) for batch, walker in enumerate(walkers)]
    finally:
        for hook in hooks:
            hook.remove()


def _arrive(batch: int, news: tuple[str, Tensor] | None, see: Callable[[int, str, Tensor], None]) -> str | None:
    """The layer in front of which the batch stands; None once it has left the block."""
    if news is None:
        return None
    name, inputs = news
    see(batch, name, inputs)
    return name
