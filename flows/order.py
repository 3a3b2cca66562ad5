"""Which stages may start now: plain rules on names, no Prefect and no DVC."""

from collections.abc import Callable, Mapping, Set

GOOD = ("Completed", "Cached")


def startable(
    needs: Mapping[str, tuple[str, ...]],
    states: Mapping[str, str],
    running: Set[str],
    workers: int,
    alone: Callable[[str], bool],
) -> list[str]:
    """Stages to start now, in the order of `needs`.

    Args:
        needs: what each stage needs directly.
        states: state of each finished stage.
        running: stages that run now.
        workers: most stages at a time.
        alone: is this a stage beside which nothing else may run, such as one that measures time?
    """
    if any(alone(name) for name in running):
        return []
    ready = [
        name
        for name in needs
        if name not in states and name not in running and all(states.get(other) in GOOD for other in needs[name])
    ]
    together = [name for name in ready if not alone(name)]
    if together or running:  # the lonely ones wait until nothing else can be done
        return together[: max(0, workers - len(running))]
    return ready[:1]


def unreachable(needs: Mapping[str, tuple[str, ...]], states: Mapping[str, str]) -> list[str]:
    """Stages that cannot run any more because something upstream did not succeed."""
    lost: set[str] = set()
    for name, others in needs.items():  # upstream first, so one pass is enough
        if name not in states and any(other in lost or states.get(other, "Completed") not in GOOD for other in others):
            lost.add(name)
    return [name for name in needs if name in lost]
