"""A stage in several processes on this machine, one GPU each where there are GPUs."""

import os
import socket
import sys
from collections.abc import Callable
from functools import partial

import torch
from accelerate import PartialState
from accelerate.utils import PrepareForLaunch, patch_environment
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from compression.core.errors import Problem
from tasks.core.entry import run_stage

LOOPBACK = "127.0.0.1"


def launch(main: Callable[[], None], processes: int, device: torch.device, where: str) -> bool:
    """Runs `main` in so many new processes and waits for them, unless this is one of them or one is enough.

    Args:
        main: a function at the top of its module.
        device: where the stage computes.
        where: the key that says how many.

    Returns:
        whether it was run; if not, this process has to go on itself. A process that fails ends all, and this one with
        its exit code; what was wrong it has said itself.

    Raises:
        Problem: there are fewer GPUs than processes, or one of them is named.
    """
    if processes == 1 or "LOCAL_RANK" in os.environ:
        return False
    gpu = device.type == "cuda"
    if device.index is not None:
        raise Problem(where, f"{processes} processes cannot share {device}", "valid: 1; or compute.device cuda")
    if gpu and processes > (there := torch.cuda.device_count()):
        raise Problem(where, f"{processes} processes need a GPU each, but {there} can be seen", f"at most {there}")
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    start = PrepareForLaunch(partial(_work, main, not gpu), distributed_type="MULTI_GPU" if gpu else "MULTI_CPU")
    # On Linux `lo` is the loopback: what processes of one machine tell each other is not for the network.
    loopback = {"gloo_socket_ifname": "lo", "nccl_socket_ifname": "lo"} if sys.platform == "linux" else {}
    with patch_environment(world_size=processes, master_addr=LOOPBACK, master_port=port, **loopback):
        try:
            start_processes(start, nprocs=processes, start_method="spawn")
        except ProcessExitedException as failure:
            sys.exit(failure.exit_code)
    return True


def _work(main: Callable[[], None], cpu: bool) -> None:
    PartialState(cpu=cpu)  # meets the others
    run_stage(main)
