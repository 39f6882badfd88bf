"""Runs somebody else's training script with some of its lines changed, in memory: their file stays as it is."""

import linecache
import sys
from pathlib import Path


def edited(path: Path, edits: dict[str, str], version: str) -> str:
    """The script's text with every key of `edits` replaced by its value.

    Raises:
        ValueError: a key that is not in the script exactly once; the message names `version`, the one that was expected.
    """
    text = path.read_text()
    for old in edits:
        if (times := text.count(old)) != 1:
            raise ValueError(f"{path} has {times} times, and must have once, as {version} has:\n{old}")
    for old, new in edits.items():
        text = text.replace(old, new)
    return text


def run(path: Path, edits: dict[str, str], version: str, arguments: list[str]) -> None:
    """Run the edited script as `python path *arguments` would run the original."""
    text = edited(path, edits, version)
    linecache.cache[str(path)] = len(text), None, text.splitlines(keepends=True), str(path)  # for tracebacks
    sys.argv, sys.path[0] = [str(path), *arguments], str(path.parent)
    exec(compile(text, str(path), "exec"), {"__name__": "__main__", "__file__": str(path)})
