"""The model without its blocks: one walker for every family that transformers has.

transformers' own forward pass is used for all that lies before and after the blocks (embeddings, learned
positions, masks, rotary angles, final norm, head), so nothing here knows a family by name. While it runs, each
block is stood in for by a function that hands its hidden states through:

    begin   all blocks stood in for   -> input of block 0, and the arguments that each block is called with
    run     one real block, loaded from its shard
    end     all blocks stood in for, block 0 by the given states   -> logits (or the encoder's last states)

Everything but the block at hand stays on the meta device, so memory does not grow with depth.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from compression.core import attention
from compression.core.errors import Problem
from compression.core.experts import routes, unfuse
from compression.core.norms import by_rows

Call = tuple[tuple[Any, ...], dict[str, Any]]


def empty_model(folder: Path) -> nn.Module:
    """The architecture that config.json describes, weights on the meta device, buffers real, attention ours.

    Experts are a linear for each of their matrices, and GPT-2's transposed layers are linears like all others.

    Raises:
        Problem: transformers does not know the architecture, or its experts are stored in a form that is not handled.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the walker is given weights that are already unpacked
    name = (config.architectures or ["none named"])[0]
    architecture = getattr(transformers, name, None)
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise Problem(str(folder / "config.json"), f"transformers has no architecture `{name}`")
    with init_empty_weights(include_buffers=False):
        model: nn.Module = architecture._from_config(config, dtype=torch.float32)  # type: ignore[attr-defined]
    if model.config._attn_implementation == "sdpa":  # type: ignore[union-attr]
        model.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    unfuse(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            parent, _, child = name.rpartition(".")
            inputs, outputs = module.weight.shape
            setattr(model.get_submodule(parent), child, TurnedLinear(inputs, outputs, device="meta"))
    return model.eval().requires_grad_(False)


class TurnedLinear(nn.Linear):
    """A linear whose weight transformers stores as [in, out] (its Conv1D): checkpoints turn it round."""


def find_blocks(model: nn.Module) -> str:
    """Module path of the list of blocks: the longest-named list that holds most of the parameters.

    Raises:
        Problem: the model has no list of blocks of one class.
    """
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    }
    if not sizes or max(sizes.values()) == 0:
        raise Problem(type(model).__name__, "no list of equal blocks found in this architecture")
    return max(sizes, key=lambda name: sizes[name])


def linears(block: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """The prunable layers of a block by full name, in the order in which they are defined; routers are none.

    Raises:
        Problem: the block stores weights in a form that is not handled: tensors of three dimensions.
    """
    for name, parameter in block.named_parameters():
        if parameter.ndim == 3:
            raise Problem(f"{prefix}.{name}", "fused weights (three dimensions) are not supported yet")
    return {
        f"{prefix}.{name}": module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and not routes(block.get_submodule(name.rpartition(".")[0]))
    }


class Skeleton:
    """See the module's docstring.

    Args:
        folder: where config.json lies.
        outer: tensors outside the blocks, by full name.
        block: gives the tensors of one block, by full name, unpacked.
        device, dtype: where and in which type the model is computed.
    """

    def __init__(
        self,
        folder: Path,
        outer: dict[str, Tensor],
        block: Callable[[int], dict[str, Tensor]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = empty_model(folder)
        self.device, self.dtype = device, dtype
        self.path = find_blocks(self.model)
        self._block = block
        self._blocks = self.model.get_submodule(self.path)
        self._calls: dict[torch.Size, list[Call]] = {}
        by_rows(self._blocks)
        ready = {name: self._place(tensor) for name, tensor in outer.items()}
        self.model.load_state_dict(ready, strict=False, assign=True)
        self.model.tie_weights()  # type: ignore[operator]
        self._buffers_to_device()
        left = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.is_meta and not name.startswith(self.path + ".")
        ]
        if left:
            raise Problem(str(folder), f"the checkpoint lacks `{left[0]}`", "is it a whole model?")
        self._tuple = self._returns_tuple()

    @property
    def depth(self) -> int:
        return len(self._blocks)  # type: ignore[arg-type]

    @property
    def causal(self) -> bool:
        """Whether the model predicts the next token; an encoder does not."""
        return bool(self.model.can_generate())  # type: ignore[operator]

    def begin(self, ids: Tensor) -> Tensor:
        """Token ids [N, T] -> hidden states [N, T, d] that enter block 0, in the computing type."""
        taken: list[Tensor] = []
        calls: list[Call] = []

        def stand_in(index: int, hidden: Tensor, call: Call) -> Tensor:
            if index == 0:
                taken.append(hidden)
            calls.append(call)
            if index == self.depth - 1:
                raise _Stop
            return hidden

        with self._stand_ins(stand_in):
            try:
                self._forward(ids)
            except _Stop:
                self._calls[ids.shape] = calls
        return taken[0].to(self.dtype)

    def load(self, index: int) -> nn.Module:
        """Block `index` with its weights on the device, in the computing type."""
        prefix = f"{self.path}.{index}."
        tensors = {name.removeprefix(prefix): self._place(tensor) for name, tensor in self._block(index).items()}
        block: nn.Module = self._blocks[index]  # type: ignore[index]
        block.load_state_dict(tensors, assign=True, strict=True)
        return block.requires_grad_(False)

    def release(self, index: int) -> None:
        """Lets go of the weights of block `index`."""
        block: nn.Module = self._blocks[index]  # type: ignore[index]
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def run(self, index: int, hidden: Tensor, ids: Tensor) -> Tensor:
        """Hidden states [N, T, d] through the loaded block `index`; `ids` [N, T] went into `begin` before.

        Blocks get the arguments that the model itself would give them; these depend on the shape of the
        batch only, as there is no padding.
        """
        args, kwargs = self._calls[ids.shape][index]
        output = self._blocks[index](hidden, *args, **kwargs)  # type: ignore[index]
        return output[0] if self._tuple else output

    def end(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """States after the last block [N, T, d] -> logits [N, T, vocabulary], or an encoder's last states."""
        with self._stand_ins(lambda index, through, _: hidden if index == 0 else through):
            output = self._forward(ids)
        return output.logits if hasattr(output, "logits") else output.last_hidden_state

    def _forward(self, ids: Tensor) -> Any:
        options = {"use_cache": False} if getattr(self.model.config, "use_cache", None) is not None else {}
        return self.model(input_ids=ids.to(self.device), **options)

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _buffers_to_device(self) -> None:
        # In place of `model.to(device)`, which refuses parameters on the meta device.
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    @contextmanager
    def _stand_ins(self, stand_in: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
        """Stands in for every block; what the model is given back has the form that its blocks return."""

        def forward(index: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                through = stand_in(index, hidden, (args[1:], kwargs))
                return (through,) if self._tuple else through

            return call

        blocks = list(self._blocks.children())
        for index, block in enumerate(blocks):
            block.forward = forward(index)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    @torch.no_grad()
    def _returns_tuple(self) -> bool:
        """Whether this family's blocks return a tuple or the bare states: one short real call tells."""
        self._tuple = False
        first: list[tuple[Tensor, Call]] = []

        def stop(index: int, hidden: Tensor, call: Call) -> Tensor:
            first.append((hidden, call))
            raise _Stop

        with self._stand_ins(stop), suppress(_Stop):
            self._forward(torch.zeros(1, 4, dtype=torch.long))
        hidden, (args, kwargs) = first[0]
        output = self.load(0)(hidden.to(self.dtype), *args, **kwargs)
        self.release(0)
        return isinstance(output, tuple)


class _Stop(Exception):
    pass
