"""python -m flows.serve: server, worker and the nightly deployment, offline, and nothing left after it."""

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from flows import server
from tests.flows.test_flow import nobody_left, processes_of, wait_for
from tests.flows.workspace import CACHED, Workspace


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """The server's answer. 503 means its database was busy: tried again, as Prefect's own client does."""
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    for _ in range(10):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            if error.code != 503:
                pytest.fail(f"{url}: {error} {text}")
            time.sleep(1)
    raise AssertionError(f"{url}: always busy: {text}")


@pytest.mark.timeout(300)
def test_the_schedule_is_served(tmp_path: Path, finished: Workspace) -> None:
    shutil.copytree(finished.root, tmp_path / "project", symlinks=True)
    workspace = Workspace(tmp_path / "project", finished.own)
    del workspace.variables["PREFECT_API_URL"]
    port = server.free_port()
    api = server.api(port)
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.serve", "--port", str(port)],
        cwd=workspace.root,
        env=workspace.variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line, line + process.stdout.read()

        deployment = ask(f"{api}/deployments/name/compress/nightly")
        (schedule,) = deployment["schedules"]
        assert schedule["schedule"]["cron"] == "0 2 * * *"
        assert schedule["schedule"]["timezone"] == "UTC"
        assert deployment["global_concurrency_limit"]["limit"] == 1

        workspace.param("left.value", 2)
        run = ask(f"{api}/deployments/{deployment['id']}/create_flow_run", {})
        deadline = time.monotonic() + 120
        while (state := ask(f"{api}/flow_runs/{run['id']}")["state"])["type"] in (
            "SCHEDULED",
            "PENDING",
            "RUNNING",
        ):
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        assert state["type"] == "COMPLETED", state
        assert (workspace.root / "data/left.txt").read_text() == "left 2\nsource 1\n"
        tasks = ask(f"{api}/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
        states = {found["name"]: found["state"]["name"] for found in tasks}
        ran = {"left", "join", "speed@left"}
        assert states == {name: "Completed" if name in ran else "Cached" for name in CACHED}
        deadline = time.monotonic() + 60  # lines are sent in batches, the last of them after the run has ended
        while not any(
            entry["message"] == "hello from left"
            for entry in ask(f"{api}/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
        ):
            assert time.monotonic() < deadline
            time.sleep(0.5)

        workspace.param("left.value", 3)
        workspace.knobs(left={"sleep": 600, "child": True})
        workspace.forget()
        run = ask(f"{api}/deployments/{deployment['id']}/create_flow_run", {})
        wait_for(workspace.work / "left.started")
        ask(f"{api}/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING"}})  # the button of the pages
        deadline = time.monotonic() + 60
        while ask(f"{api}/flow_runs/{run['id']}")["state"]["type"] != "CANCELLED":
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert not [command for command in processes_of(workspace) if "step.py" in command or "sleep" in command]
        workspace.knobs()
        workspace.param("left.value", 2)

        by_hand = workspace.flow()  # finds this server by itself
        assert by_hand.states == CACHED, by_hand
        flows = ask(f"{api}/flow_runs/count", {})
        assert flows == 3
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert nobody_left(workspace, seconds=2)
    assert not server.port_taken(port)
    assert not (workspace.root / ".prefect/server.json").exists()


def test_a_taken_port_is_told(workspace: Workspace, api: str) -> None:
    port = api.rpartition(":")[2].partition("/")[0]
    ended = subprocess.run(
        [sys.executable, "-m", "flows.serve", "--port", port],
        cwd=workspace.root,
        env=workspace.variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert ended.stderr == f"error: something listens on port {port} already; choose another with --port\n"
