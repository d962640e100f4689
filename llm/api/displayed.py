"""Results that a Python session prints and a notebook displays."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Picture:
    """A picture as PNG, which a notebook displays.

    Args:
        png: contents of the file.
    """

    def __init__(self, png: bytes) -> None:
        self.png = png

    @classmethod
    def read(cls, path: Path) -> "Picture":
        """Return the picture of a file."""
        return cls(path.read_bytes())

    def save(self, path: str | Path) -> None:
        """Write the picture to a file."""
        Path(path).write_bytes(self.png)

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return f"<Picture: PNG of {len(self.png):_} bytes; save(path) writes it>"


class Outcome:
    """The result of an evaluation. It prints as the table that `eval.py` prints, and `outcome[key]` is `figures[key]`.

    Args:
        figures: all figures, as in its JSON file: a mapping by name, or a list with one mapping per layer.
        headline: the few numbers by which models are compared, by name.
        text: the table and the texts of the evaluation.
        picture: its drawing, None for an evaluation without one.
    """

    def __init__(self, *, figures: Any, headline: Mapping[str, float], text: str, picture: Picture | None) -> None:
        self.figures, self.headline, self.text, self.picture = figures, dict(headline), text, picture

    def __getitem__(self, key: Any) -> Any:
        return self.figures[key]

    def __repr__(self) -> str:
        return self.text

    def _repr_png_(self) -> bytes | None:
        return None if self.picture is None else self.picture.png
