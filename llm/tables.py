"""Formats tables, byte counts, large numbers and durations as plain text."""

from collections.abc import Sequence


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, indent: str = "  ", underlined: bool = True
) -> str:
    """Return an aligned table, with a line under its header. Numbers are right-aligned, except in the first column."""
    table = [list(map(str, header)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    numbers = {i for i in range(1, len(header)) if any(_is_number(row[i]) for row in table[1:])}
    lines = [
        "  ".join(_align(cell, width, i in numbers) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]
    if underlined:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(f"{indent}{line.rstrip()}" for line in lines)


def _is_number(cell: str) -> bool:
    return cell.lstrip("+-−")[:1].isdigit()


def _align(cell: str, width: int, is_of_numbers: bool) -> str:
    return cell.rjust(width) if is_of_numbers and (_is_number(cell) or cell == "–") else cell.ljust(width)


def format_bytes(count: float) -> str:
    """Return bytes in the largest binary unit that leaves at least 1."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def format_count(count: float) -> str:
    """Return a large number with a decimal suffix: 1.23 G."""
    for suffix in ("", " K", " M", " G", " T", " P"):
        if count < 1000:
            return f"{count:.3g}{suffix}"
        count /= 1000
    return f"{count:.3g} E"


def format_seconds(seconds: float) -> str:
    """Return a duration: 42 s, 12 min 5 s, 3 h 20 min, 4.2 days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 172800:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds / 86400:.1f} days"
