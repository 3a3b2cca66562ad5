"""Environment of the flow and of all it starts: quiet, offline, a Prefect home in the workspace."""

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from flows.locks import alive

SERVER_FILE = Path("server.json")  # below the Prefect home; written by flows.serve

DEFAULTS = {
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # DVC is the only cache, and a stage that failed is not tried again behind the user's back.
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    "PREFECT_FLOWS_DEFAULT_RETRIES": "0",
    "PREFECT_TASKS_DEFAULT_RETRIES": "0",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_CLI_COLORS": "false",
}


def prepare(root: Path) -> None:
    """Sets what the user has not set. To be called before prefect is imported, which reads it then."""
    for key, value in DEFAULTS.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("PREFECT_HOME", str(root / ".prefect"))
    here = str(Path(sys.executable).parent)  # `python -m tasks.x` in dvc.yaml means this interpreter
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != here:
        os.environ["PATH"] = here + os.pathsep + path


def quiet_console() -> None:
    """Keeps Prefect's own log lines off the console, where stages speak; its server has them."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


def server_file() -> Path:
    """Where a running flows.serve leaves its address."""
    return Path(os.environ["PREFECT_HOME"]) / SERVER_FILE


def running_server() -> str | None:
    """API address to use: PREFECT_API_URL, or that of a living flows.serve of this workspace; else None."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    try:
        note = json.loads(server_file().read_text(encoding="utf-8"))
        url, pid = str(note["api"]), int(note["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return url if alive(pid) and healthy(url) else None


def healthy(api: str, seconds: float = 2.0) -> bool:
    """Does a Prefect server answer at this address within `seconds`?"""
    if not api.startswith(("http://", "https://")):
        return False
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/health", timeout=seconds) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False
