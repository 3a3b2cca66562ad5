"""The flow on a small pipeline: source -> left, right -> join, and speed@left, speed@right that run alone."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.flows.workspace import CACHED, COMPLETED, STAGES, Workspace


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def wait_for(path: Path, seconds: float = 60) -> int:
    """Waits for a stage to start; its process id."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.05)
    return int(path.read_text())


def processes_of(workspace: Workspace) -> list[str]:
    """Command lines of living processes that work for this workspace."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                variables = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if f"STEP_WORK={workspace.work}\0".encode() in variables + b"\0" and command:
                found.append(command)
    return found


def nobody_left(workspace: Workspace, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while left := processes_of(workspace):
        if time.monotonic() > deadline:
            print(left)
            return False
        time.sleep(0.1)
    return True


def test_nothing_changed_means_nothing_runs(workspace: Workspace) -> None:
    ended = workspace.flow()
    assert ended.code == 0, ended
    assert ended.states == CACHED
    assert workspace.times() == {}
    size = (workspace.root / "data/join.txt").stat().st_size
    assert ended.sizes["join"] == f"{size} B"


def test_a_changed_parameter_runs_what_depends_on_it(workspace: Workspace) -> None:
    workspace.param("left.value", 2)
    ended = workspace.flow()
    assert ended.code == 0, ended
    changed = {"left", "join", "speed@left"}
    assert ended.states == {name: "Completed" if name in changed else "Cached" for name in STAGES}
    assert set(workspace.times()) == changed
    workspace.forget()
    workspace.param("left.value", 1)
    back = workspace.flow()  # DVC has seen this value before
    assert back.states == CACHED, back
    assert workspace.times() == {}
    assert (workspace.root / "data/left.txt").read_text() == "left 1\nsource 1\n"


def test_same_bytes_spare_the_stages_downstream(workspace: Workspace) -> None:
    workspace.param("source.value", 1.4)  # the stage writes the whole number only
    ended = workspace.flow()
    assert ended.states == {**CACHED, "source": "Completed"}, ended
    assert set(workspace.times()) == {"source"}


def test_a_deleted_output_comes_back(workspace: Workspace) -> None:
    (workspace.root / "data/left.txt").unlink()
    ended = workspace.flow()
    assert ended.states == CACHED, ended
    assert (workspace.root / "data/left.txt").exists()


def test_a_failure_stops_only_what_needs_it(workspace: Workspace) -> None:
    workspace.param("source.value", 5)
    workspace.knobs(left={"fail": "the left weights are not finite"})
    ended = workspace.flow()
    assert ended.code == 1
    assert ended.states == {
        **COMPLETED,
        "left": "Failed",
        "join": "NotRun",
        "speed@left": "NotRun",
    }, ended
    told = ended.out.partition("left failed:")[2]
    assert "the left weights are not finite" in told
    assert "Traceback" not in ended.out + ended.err
    workspace.knobs()
    again = workspace.flow()
    assert again.code == 0
    done = {"left", "join", "speed@left"}
    assert again.states == {name: "Completed" if name in done else "Cached" for name in STAGES}, again


def test_target_runs_what_it_needs_and_no_more(workspace: Workspace) -> None:
    workspace.param("source.value", 6)
    ended = workspace.flow("--target", "left")
    assert ended.code == 0
    assert ended.states == {"source": "Completed", "left": "Completed"}, ended
    assert set(workspace.times()) == {"source", "left"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "lift"], "no stage is called `lift`; did you mean `left`?"),
        (["--set", "left.vlaue=2"], "params.yaml has no key `left.vlaue`; did you mean `left.value`?"),
        (["--set", "left.value"], "--set takes key=value"),
        (["--params", "gone.yaml"], "gone.yaml: "),
        (["--set", "left;rm=2"], "--set takes key=value"),
        (["--set", "left.value=100"], "`left.value` is 100: it has to be below 100"),
    ],
)
def test_a_typo_is_told_in_one_line(workspace: Workspace, words: list[str], message: str) -> None:
    ended = workspace.flow(*words)
    assert ended.code == 1
    assert message in ended.out + ended.err, ended
    assert "Traceback" not in ended.out + ended.err
    assert workspace.times() == {}


def test_bad_params_fail_before_anything_runs(workspace: Workspace) -> None:
    workspace.param("left.value", 120)
    ended = workspace.flow()
    assert ended.code == 1
    assert "params.yaml: `left.value` is 120: it has to be below 100" in ended.out + ended.err
    assert "Traceback" not in ended.out + ended.err
    assert workspace.times() == {}


def test_an_experiment_leaves_params_alone(workspace: Workspace) -> None:
    before = (workspace.root / "params.yaml").read_bytes()
    workspace.write(".work/mine.yaml", "left: {value: 7}\nright: {pattern: unknown}\n")
    ended = workspace.flow("--params", ".work/mine.yaml", "--set", "right.pattern='2:4, a [b]'")
    assert ended.code == 0, ended
    assert (workspace.root / "params.yaml").read_bytes() == before
    assert (workspace.root / "data/left.txt").read_text() == "left 1\nsource 1\n"
    assert ended.states == {**COMPLETED, "source": "Cached", "speed@right": "Cached"}, ended
    name = ended.out.partition("dvc exp apply ")[2].split()[0]
    shown = subprocess.run(
        ["git", "show", f"refs/exps/{_reference(workspace, name)}:params.yaml"],
        cwd=workspace.root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "value: 7" in shown
    assert "2:4, a [b]" in shown
    workspace.forget()
    workspace.param("left.value", 7)
    after = workspace.flow()
    assert after.states == CACHED, after  # what the experiment computed is not computed again
    assert workspace.times() == {}


def _reference(workspace: Workspace, name: str) -> str:
    listing = subprocess.run(
        ["git", "for-each-ref", "--format=%(refname)", "refs/exps"],
        cwd=workspace.root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return next(line.removeprefix("refs/exps/") for line in listing.split() if line.endswith("/" + name))


def test_a_failing_experiment_says_why(workspace: Workspace) -> None:
    workspace.knobs(left={"fail": "no room left for a 3"})
    ended = workspace.flow("--set", "left.value=3")
    assert ended.code == 1
    assert ended.states["left"] == "Failed", ended
    assert ended.states["join"] == "NotRun"
    assert "no room left for a 3" in ended.out.partition("left failed:")[2]
    assert "Traceback" not in ended.out + ended.err


def test_independent_stages_overlap_on_gpus_of_their_own_and_speed_runs_alone(workspace: Workspace) -> None:
    workspace.param("source.value", 8)
    workspace.param("compute.device", "auto")
    workspace.variables["CUDA_VISIBLE_DEVICES"] = "3,5"
    slow: dict[str, object] = {"sleep": 1}
    workspace.knobs(**{name: slow for name in STAGES if name != "source"})
    ended = workspace.flow()
    assert ended.states == COMPLETED, ended
    times = workspace.times()
    assert overlap(times["left"], times["right"])
    for name in ("speed@left", "speed@right"):
        others = [other for other in STAGES if other != name and overlap(times[name], times[other])]
        assert others == [], (name, times)
    assert "left | hello from left" in ended.out  # who says what stays clear
    seen = [ended.out.partition(f"{name} | visible ")[2].split()[0] for name in ("left", "right")]
    assert sorted(seen) == ["3", "5"]


def test_a_second_flow_is_refused(workspace: Workspace) -> None:
    workspace.param("source.value", 10)
    workspace.knobs(source={"sleep": 600})
    first = workspace.start()
    try:
        wait_for(workspace.work / "source.started")
        began = time.monotonic()
        second = workspace.flow()
        assert time.monotonic() - began < 5
        assert second.code == 1
        holder = f"another flow is running in this workspace (process {first.pid})"
        assert second.err == f"error: {holder}; wait for it or stop it\n"
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    assert nobody_left(workspace)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_flow_leaves_nobody_behind(workspace: Workspace, number: signal.Signals) -> None:
    workspace.param("left.value", 11)
    workspace.knobs(left={"sleep": 600, "child": True})
    process = workspace.start()
    wait_for(workspace.work / "left.started")
    assert processes_of(workspace)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 130, out + err
        assert "Cancelled" in out
        assert "Traceback" not in out + err
        assert processes_of(workspace) == []
    workspace.knobs()
    ended = workspace.flow()  # also at once after a kill: it waits until the old stages are gone
    assert ended.code == 0, ended
    assert ended.states["join"] == "Completed"
    assert nobody_left(workspace)


def test_a_stopped_experiment_leaves_nobody_behind(workspace: Workspace) -> None:
    workspace.knobs(left={"sleep": 600})
    process = workspace.start("--set", "left.value=12")
    wait_for(workspace.work / "left.started")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert processes_of(workspace) == []
    workspace.knobs()
    assert workspace.flow("--set", "left.value=12").code == 0


def test_without_a_server_the_flow_brings_its_own(workspace: Workspace) -> None:
    workspace.variables.pop("PREFECT_API_URL")
    ended = workspace.flow()
    assert ended.code == 0, ended
    assert ended.states == CACHED
    assert ended.err == ""
    assert nobody_left(workspace, seconds=1)
