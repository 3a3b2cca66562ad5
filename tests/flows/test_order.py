"""Which stages may start, on a diamond: a -> b, c -> d, with speed@b and speed@d measuring time."""

from flows.order import startable, unreachable

NEEDS: dict[str, tuple[str, ...]] = {
    "a": (),
    "b": ("a",),
    "c": ("a",),
    "speed@b": ("b",),
    "d": ("b", "c"),
    "speed@d": ("d",),
}


def alone(name: str) -> bool:
    return name.startswith("speed")


def start(done: str, running: str = "", workers: int = 4) -> list[str]:
    states = dict.fromkeys(done.split(), "Completed")
    return startable(NEEDS, states, set(running.split()), workers, alone)


def test_a_stage_starts_once_all_it_needs_is_done() -> None:
    assert start("") == ["a"]
    assert start("a") == ["b", "c"]
    assert start("a b", "c") == []
    assert start("a c", "b") == []


def test_no_more_than_workers_run() -> None:
    assert start("a", workers=1) == ["b"]
    assert start("a", "b", workers=2) == ["c"]
    assert start("a", "b c", workers=2) == []


def test_timing_waits_until_nothing_else_can_run_and_then_runs_alone() -> None:
    assert start("a b", "c") == []
    assert start("a b c") == ["d"]
    assert start("a b c d") == ["speed@b"]
    assert start("a b c d", "speed@b") == []
    assert start("a b c d speed@b") == ["speed@d"]


def test_only_what_needs_a_failed_stage_is_given_up() -> None:
    states = {"a": "Completed", "c": "Failed"}
    assert unreachable(NEEDS, states) == ["d", "speed@d"]
    assert startable(NEEDS, states, set(), 4, alone) == ["b"]
