"""The stages: each reads its section of params.yaml, opens its inputs, calls `compression`, writes its output.

`python -m tasks.<stage>` runs one by hand, without DVC and without Prefect.
"""

import os
import sys

# Bars belong on a terminal; in a log they are noise. Set before any library is imported that reads it.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
