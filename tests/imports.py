"""Which files of this project a module needs: the closure of its import statements, wherever they stand."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def needed_files(*modules: str) -> set[str]:
    """Non-empty files of the project that importing `modules` loads, as paths from its root."""
    found: set[Path] = set()
    queue = [file for module in modules for file in _files(module)]
    while queue:
        file = queue.pop()
        if file not in found:
            found.add(file)
            queue += [needed for name in _imports(file) for needed in _files(name)]
    return {file.relative_to(ROOT).as_posix() for file in found if file.stat().st_size}


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports are not followed"
            # `from a import b`: b may be a module of its own.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(module: str) -> Iterator[Path]:
    """The files that importing a dotted name runs: every package on the way, and the module itself."""
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        base = ROOT.joinpath(*parts[:length])
        if (base / "__init__.py").exists():
            yield base / "__init__.py"
        elif base.with_suffix(".py").exists():
            yield base.with_suffix(".py")
