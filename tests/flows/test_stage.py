"""How the output of a stage reaches the console."""

import io
import sys
import threading
from pathlib import Path

import pytest

from flows import stage
from flows.console import Console

BAR = """
import sys
for count in range(3):
    sys.stderr.write(f"\\rblock {count}/3")
    sys.stderr.flush()
print("\\nterminal" if sys.stderr.isatty() else "\\nno terminal", file=sys.stderr)
print("done: ✓")
sys.exit(7)
"""


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def run(tmp_path: Path, code: str, terminal: bool) -> tuple[stage.Outcome, str, list[str]]:
    screen, lines = Screen(terminal), list[str]()
    outcome = stage.run(
        "prune", [sys.executable, "-c", code], tmp_path, Console(screen), threading.Event(), lines.append
    )
    return outcome, screen.getvalue(), lines


def test_progress_bars_are_drawn_on_a_terminal(tmp_path: Path) -> None:
    outcome, screen, lines = run(tmp_path, BAR, terminal=True)
    assert outcome.code == 7
    assert "block 1/3" in screen or "block 2/3" in screen
    assert "terminal" in lines  # the stage sees one, or it would not draw
    assert "done: ✓" in lines


def test_a_log_file_gets_whole_lines_with_the_stage_before_them(tmp_path: Path) -> None:
    _, screen, lines = run(tmp_path, BAR, terminal=False)
    assert "prune | no terminal\n" in screen
    assert "prune | done: ✓\n" in screen
    assert "block 0/3" not in screen
    assert "no terminal" in lines


def test_the_last_error_lines_are_kept_without_dvcs_own(tmp_path: Path) -> None:
    code = "import sys\nfor i in range(500): print('line', i, file=sys.stderr)\n"
    code += "print(\"ERROR: failed to reproduce 'x': failed to run: y\", file=sys.stderr)"
    outcome, _, _ = run(tmp_path, code, terminal=False)
    assert outcome.errors[-1] == "line 499"
    assert len(outcome.errors) <= stage.KEPT


def test_much_output_does_not_block(tmp_path: Path) -> None:
    code = "import sys\nfor _ in range(20000): print('x' * 80); print('y' * 80, file=sys.stderr)"
    outcome, _, lines = run(tmp_path, code, terminal=False)
    assert outcome.code == 0
    assert len(lines) == 40000


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Running stage 'evaluate@dense':", ("evaluate@dense", "Completed")),
        ("Stage 'prune' is cached - skipping run, checking out outputs", ("prune", "Cached")),
        ("Stage 'prune' didn't change, skipping", ("prune", "Cached")),
        ("we are Running stage 'prune':", None),
    ],
)
def test_dvcs_words(line: str, said: tuple[str, str] | None) -> None:
    assert stage.said(line) == said
