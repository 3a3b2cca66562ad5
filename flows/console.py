"""What stages print, on one console: progress bars of one stage alone, prefixed lines of several."""

import re
import sys
import threading
from typing import TextIO

COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
CLEAR = "\r\x1b[2K"


class Console:
    """One lock, one stream, and who is speaking now."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.interactive = self.stream.isatty()
        self._lock = threading.Lock()
        self._speakers: set[str] = set()
        self._bar = False  # does the cursor stand behind an unfinished line?

    def enter(self, name: str) -> None:
        """A stage starts to speak."""
        with self._lock:
            self._speakers.add(name)

    def leave(self, name: str) -> None:
        """A stage has ended."""
        with self._lock:
            self._speakers.discard(name)
            self._wipe()
            self.stream.flush()

    def line(self, name: str, text: str) -> None:
        """A finished line of a stage."""
        with self._lock:
            self._wipe()
            self.stream.write(f"{self._prefix(name)}{text}\n")
            self.stream.flush()

    def bar(self, name: str, text: str) -> None:
        """An unfinished line that will be written over; shown on a terminal while its stage is alone."""
        with self._lock:
            if self.interactive and len(self._speakers) < 2:
                self.stream.write(CLEAR + text)
                self.stream.flush()
                self._bar = True

    def _prefix(self, name: str) -> str:
        return f"{name} | " if len(self._speakers) > 1 or not self.interactive else ""

    def _wipe(self) -> None:
        if self._bar:
            self.stream.write(CLEAR)
            self._bar = False
