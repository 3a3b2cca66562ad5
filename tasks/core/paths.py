"""Where things lie, from the project's root."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = Path("data")  # what DVC keeps
WORK = Path(".work")  # journals and fetched sources, kept by nobody
