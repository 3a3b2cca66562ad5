"""The Prefect flow `compress`: one task per DVC stage, side by side where the graph allows it."""

import os
import queue
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Task, flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events.worker import EventsWorker
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.logging.handlers import APILogWorker
from prefect.states import Cancelled, Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import check, experiment, graph, locks, order, overrides, stage, table
from flows.console import Console
from flows.errors import Problem
from flows.lease import Lease, lease, visible_gpus
from flows.table import Result

LOGGED = 200  # lines of a stage that go to Prefect's log; the console has them all
NO_GPU = ("download", "corpus", "allocate", "export", "report")  # stages that need none


@dataclass(frozen=True)
class Plan:
    """What holds for every stage of a flow run."""

    root: Path
    graph: graph.Graph
    workers: int
    gpus: list[str]
    pinned: bool  # does params.yaml name one GPU by number?
    processes: dict[str, int]  # stages that may use more than one GPU, and how many
    lock: int  # file that holds the workspace
    console: Console
    cancelled: threading.Event


@flow(
    name="compress",
    task_runner=ThreadPoolTaskRunner(),
    persist_result=False,
    retries=0,
    validate_parameters=False,
)
def compress(
    target: str | None = None,
    workers: int | None = None,
    params: str | None = None,
    changes: list[str] | None = None,
) -> State[Any]:
    """Brings the pipeline of the current folder up to date.

    Args:
        target: run only this stage and what it needs.
        workers: most stages side by side; by default what the machine has room for.
        params: a file whose keys are put over those of params.yaml; the run is then an experiment of DVC.
        changes: `key=value` pairs put over both, with the same consequence.
    """
    logger = get_run_logger()
    root = Path.cwd()
    try:
        with locks.workspace(root) as lock:
            return _compress(root, lock, target, workers, Path(params) if params else None, changes or [])
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        logger.error(str(problem))
        return Failed(message=str(problem))
    except Exception:
        traceback.print_exc()  # a fault of ours; Prefect's own report of it goes to its server only
        raise


def deliver(seconds: float = 10.0) -> None:
    """Sends what Prefect still holds back to its server; without one it would try for a minute at exit."""
    EventsWorker.drain_all(timeout=seconds)
    APILogWorker.drain_all(timeout=seconds)


def _compress(
    root: Path, lock: int, target: str | None, workers: int | None, file: Path | None, changes: list[str]
) -> State[Any]:
    params, values = overrides.read(root / "params.yaml", file, changes)
    checking = check.start(root, params, values)
    try:
        stages = graph.read(root, target)
    finally:
        check.finish(checking)
    gpus = _gpus(params)
    plan = Plan(
        root=root,
        graph=stages,
        workers=workers or _workers(params, gpus),
        gpus=gpus,
        pinned=":" in _device(params),
        processes={"retrain": int(params.get("retrain", {}).get("processes", 1))},
        lock=lock,
        console=Console(),
        cancelled=threading.Event(),
    )
    if values:
        return _experiment(plan, values, target)
    results = _run_all(plan)
    return _told(plan, results, graph.outputs(root / graph.LOCK), table.metrics(root / table.METRICS))


def _workers(params: dict[str, Any], gpus: list[str]) -> int:
    """On GPUs one stage each; on a CPU as many as have their threads."""
    if gpus:
        return len(gpus)
    threads = params.get("compute", {}).get("threads", 1)
    return max(1, (os.cpu_count() or 1) // max(1, int(threads)))


def _gpus(params: dict[str, Any]) -> list[str]:
    """GPUs to lease: none when params.yaml wants another device, one when it names one."""
    kind, _, number = _device(params).partition(":")
    if kind not in ("auto", "cuda"):
        return []
    return visible_gpus()[int(number) : int(number) + 1] if number else visible_gpus()


def _device(params: dict[str, Any]) -> str:
    return str(params.get("compute", {}).get("device", "cpu"))


def alone(name: str) -> bool:
    """Stages that measure time: anything beside them would be measured too."""
    return name.partition("@")[0] == "speed"


def _run_all(plan: Plan) -> dict[str, Result]:
    """Runs stages as soon as what they need is done; returns how each ended.

    On Ctrl-C or SIGTERM the running stages are ended, and all results so far are returned.
    """
    needs = plan.graph.needs
    results: dict[str, Result] = {}
    same: set[str] = set()  # stages whose outputs are what they were when the status was read
    running: set[str] = set()
    futures: dict[str, PrefectFuture[Any]] = {}
    answers: dict[str, Answer] = {}
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def settled(name: str) -> bool:
        """Is it known without asking DVC that this stage is up to date?"""
        return name not in plan.graph.changed and all(other in same for other in needs[name])

    def collect(name: str) -> None:
        running.discard(name)
        futures[name].wait()
        failed = Result("Failed", errors=[futures[name].state.message or "Prefect did not run its task"])
        results[name], unchanged = answers.get(name, (failed, False))
        if unchanged:
            same.add(name)

    try:
        while True:
            states = {name: result.state for name, result in results.items()}
            for name in order.unreachable(needs, states):
                results[name] = Result("NotRun")
                states[name] = "NotRun"
            for name in order.startable(
                needs, states, running, plan.workers, lambda name: alone(name) and not settled(name)
            ):
                job = _up_to_date if settled(name) else _bring_up_to_date
                upstream = [futures[other] for other in needs[name]]
                futures[name] = _as_task(plan, name, job, answers).submit(wait_for=upstream)
                running.add(name)
                # The future's own end, not the job's: a task that Prefect could not even start ends too.
                futures[name].add_done_callback(lambda _, name=name: ended.put(name))
            if not running:
                return results
            collect(ended.get())
    except BaseException as reason:
        plan.cancelled.set()
        for name in tuple(running):
            collect(name)
        if isinstance(reason, Exception):
            raise
        return results


Answer = tuple[Result, bool]  # how a stage ended, and whether its outputs stayed what they were
Job = Callable[[Plan, str, Any], Answer]


def _as_task(plan: Plan, name: str, job: Job, answers: dict[str, Answer]) -> Task[[], State[Any]]:
    """A Prefect task for one stage. A closure, because Prefect copies and records arguments."""

    def run() -> State[Any]:
        began = time.monotonic()
        try:
            result, unchanged = job(plan, name, get_run_logger())
        except Exception as error:
            result, unchanged = Result("Failed", errors=[f"internal error: {error!r}"]), False
        result.seconds = time.monotonic() - began
        answers[name] = result, unchanged
        return _state(result)

    return task(run, name=name, task_run_name=name, retries=0, persist_result=False, cache_policy=NO_CACHE)


def _state(result: Result) -> State[Any]:
    if result.state == "Cached":
        return Completed(name="Cached")
    if result.state == "Cancelled":
        return Cancelled()
    if result.state == "Failed":
        return Failed(message="\n".join(result.errors))
    return Completed()


def _up_to_date(plan: Plan, name: str, logger: Any) -> Answer:
    return Result("Cached"), True


def _bring_up_to_date(plan: Plan, name: str, logger: Any) -> Answer:
    """Lets DVC decide and run. Returns the result, and whether the stage's outputs stayed what they were."""
    states: list[str] = []
    before = graph.outputs(plan.root / graph.LOCK).get(name)
    gpus = [] if name.partition("@")[0] in NO_GPU else plan.gpus
    with lease(gpus, plan.cancelled, count=plan.processes.get(name, 1)) as held:
        if plan.cancelled.is_set():
            return Result("Cancelled"), False
        outcome = stage.run(
            name,
            stage.repro(name),
            plan.root,
            plan.console,
            plan.cancelled,
            _listener(logger, lambda line: states.extend(state for _, state in filter(None, [stage.said(line)]))),
            *_leased(plan, held),
        )
    if plan.cancelled.is_set():
        return Result("Cancelled"), False
    if outcome.code != 0:
        return Result("Failed", errors=outcome.errors), False
    after = graph.outputs(plan.root / graph.LOCK).get(name)
    unchanged = before is not None and before == after and name not in plan.graph.meddled
    return Result(states[-1] if states else "Completed"), unchanged


def _leased(plan: Plan, held: Lease | None) -> tuple[dict[str, str], list[int]]:
    """Variables and lock files for a stage that holds this lease."""
    if held is None:
        return {}, [plan.lock]
    # A stage that was told `cuda:1` needs to see GPU 0 as well, or there would be no number 1.
    return {} if plan.pinned else {"CUDA_VISIBLE_DEVICES": ",".join(held.gpus)}, [plan.lock, *held.files]


def _experiment(plan: Plan, values: dict[str, Any], target: str | None) -> State[Any]:
    """One `dvc exp run` in a folder of its own, with the overrides; params.yaml stays as it is."""
    found: list[experiment.Found] = []

    def run() -> State[Any]:
        with lease(plan.gpus, plan.cancelled, count=max(plan.processes.values())) as held:
            logger = get_run_logger()
            found.append(
                experiment.run(
                    plan.root,
                    list(plan.graph.needs),
                    values,
                    target,
                    lambda command, heard: stage.run(
                        "experiment",
                        command,
                        plan.root,
                        plan.console,
                        plan.cancelled,
                        _listener(logger, heard),
                        *_leased(plan, held),
                    ),
                )
            )
        failed = any(result.state == "Failed" for result in found[0].results.values())
        return Failed(message="a stage failed") if failed else Completed()

    future = task(run, name="experiment", task_run_name="experiment", cache_policy=NO_CACHE).submit()
    try:
        future.wait()
    except BaseException as reason:
        plan.cancelled.set()
        future.wait()
        if isinstance(reason, Exception):
            raise
    if not found:
        return future.state
    experiment.told(found[0])
    return _told(plan, found[0].results, graph.outputs(found[0].lock), found[0].metrics)


def _listener(logger: Any, heard: Callable[[str], None]) -> Callable[[str], None]:
    """Passes lines on, the first ones of them to Prefect's log too."""
    count = 0

    def listen(line: str) -> None:
        nonlocal count
        heard(line)
        count += 1
        if count <= LOGGED:
            logger.info(line)
        elif count == LOGGED + 1:
            logger.info("more lines are on the console only")

    return listen


def _told(
    plan: Plan,
    results: dict[str, Result],
    outputs: dict[str, dict[str, tuple[str, int]]],
    metrics: list[dict[str, Any]],
) -> State[Any]:
    """Prints the table, stores it and the metrics as artifacts; returns the flow's own state."""
    sizes = {name: sum(count for _, count in outs.values()) for name, outs in outputs.items()}
    names = list(plan.graph.needs)
    table.show(results, sizes, names)
    counts = Counter(results[name].state if name in results else "NotRun" for name in names)
    message = ", ".join(f"{count} {state}" for state, count in counts.items())
    if plan.cancelled.is_set():
        return Cancelled(message=message)
    create_table_artifact(
        [
            {"stage": name, "state": results[name].state, "seconds": round(results[name].seconds, 1)}
            | {"bytes": sizes.get(name)}
            for name in names
            if name in results
        ],
        key="stages",
    )
    if metrics:
        create_table_artifact(metrics, key="metrics")
    return Failed(message=message) if counts["Failed"] else Completed(message=message)
