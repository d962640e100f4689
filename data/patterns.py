"""Finds the files that paths and globs name."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm.errors import DataError


def matching_files(key: str, patterns: Sequence[str]) -> list[str]:
    """List the files that each pattern matches, in order and once.

    Args:
        key: the setting that errors name.
        patterns: paths or globs, in which `**` crosses folders and `~` is the home folder.

    Raises:
        DataError: a file is missing or empty, a path is a folder, a glob matches nothing, or every file is empty.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        found |= dict.fromkeys(_matches(key, os.path.expanduser(pattern)))
    if not found:
        raise DataError(f"{key}={list(patterns)}: names no file; give a path or a glob")
    if not any(os.path.getsize(path) for path in found):
        raise DataError(f"{key}={', '.join(patterns)}: every file is empty; check the path")
    return list(found)


def _matches(key: str, pattern: str) -> list[str]:
    if os.path.isfile(pattern):
        if not os.path.getsize(pattern):
            raise DataError(f"{key}={pattern}: the file is empty; check the path")
        return [os.path.abspath(pattern)]
    if os.path.isdir(pattern):
        raise DataError(f"{key}={pattern}: is a folder; name its files with a glob such as {pattern}/**/*.txt")
    if not glob.has_magic(pattern):
        raise DataError(f"{key}={pattern}: no such file; check the path (relative to {os.getcwd()})")
    found = sorted({os.path.abspath(path) for path in _expand(pattern) if os.path.isfile(path)})
    if not found:
        raise DataError(f"{key}={pattern}: the glob matches no file; check it (relative to {os.getcwd()})")
    return found


def _expand(pattern: str) -> Iterator[str]:
    """Yield the paths that a glob matches; `**` enters each folder once, also where links lead back to it."""
    before, recursive, after = _split_at_recursion(pattern)
    if not recursive:
        yield from glob.iglob(pattern)
        return
    visited: set[tuple[int, int]] = set()
    for root in glob.iglob(before) if before else [os.curdir]:
        for folder in _folders(root, visited):
            yield from _expand(os.path.join(glob.escape(folder), after or "*"))


def _split_at_recursion(pattern: str) -> tuple[str, bool, str]:
    parts = Path(pattern).parts
    if "**" not in parts:
        return pattern, False, ""
    at = parts.index("**")
    return os.path.join("", *parts[:at]), True, os.path.join("", *parts[at + 1 :])


def _folders(root: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    """Yield a folder and those below it, except hidden ones, each (device, inode) once."""
    if not os.path.isdir(root):
        return
    status = os.stat(root)
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    yield root
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        yield from _folders(os.path.join(root, name), visited)
