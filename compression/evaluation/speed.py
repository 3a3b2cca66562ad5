"""How fast a checkpoint runs as transformers loads it, by anyone's script."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from compression.core.checkpoint import ADAPTER


@torch.no_grad()
def measure_speed(
    folder: Path, prefill: int, decode: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float | str]:
    """Loads the checkpoint with `from_pretrained` and times it; the medians of `repeats` count.

    Args:
        prefill: tokens of the prompt.
        decode: tokens generated greedily after it, one at a time.

    Returns:
        load_seconds; prefill_tokens_per_second; decode_tokens_per_second; peak_memory_bytes, of this whole
        process, or of the GPU where there is one.
    """
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    if (folder / ADAPTER).exists():
        model = PeftModel.from_pretrained(model, str(folder / ADAPTER), autocast_adapter_dtype=False)
    model = model.to(device).eval()
    loaded = time.perf_counter() - start
    prompt = torch.arange(prefill, device=device)[None] % model.config.vocab_size

    def fill() -> None:
        model(input_ids=prompt, use_cache=True)

    def generate() -> None:
        model.generate(prompt, max_new_tokens=decode, min_new_tokens=decode, do_sample=False)

    fill()  # the first pass unpacks quantised weights and fills caches
    filling = _median_seconds(fill, repeats, device)
    generating = _median_seconds(generate, repeats, device)
    # generate() fills the prompt, too, and its first token comes from there.
    decoding = max(generating - filling, 1e-9)
    return {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "load_seconds": loaded,
        "prefill_tokens_per_second": prefill / filling,
        "decode_tokens_per_second": max(decode - 1, 1) / decoding,
        "peak_memory_bytes": _peak_memory(device),
    }


def _median_seconds(work: Callable[[], None], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
