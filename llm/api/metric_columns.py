"""Arranges the lines of metrics.jsonl as one array per metric."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llm.errors import ConfigError


class MetricColumns(dict[str, np.ndarray]):
    """One array per metric, each with one entry per line of metrics.jsonl; NaN where a line lacks the metric.

    A metric with several numbers per line, such as the load of each expert, is an array of two dimensions.
    """

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps at which a metric was recorded, and its values there.

        Raises:
            ConfigError: the run has no metric of this name.
        """
        values = self[name]
        is_known = ~np.isnan(values.reshape(len(values), -1)).all(axis=1)
        return self["step"][is_known], values[is_known]

    def to_pandas(self) -> Any:
        """Return a DataFrame with the steps as its index. Metrics of several numbers have one column per number.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ConfigError("to_pandas: pandas is not installed; pip install pandas") from error
        columns = {}
        for name, values in self.items():
            parts = {name: values} if values.ndim == 1 else {f"{name}.{i}": part for i, part in enumerate(values.T)}
            columns |= parts
        return pd.DataFrame(columns).set_index("step")

    def __missing__(self, name: str) -> np.ndarray:
        raise ConfigError(f"metrics[{name!r}]: not recorded; the run has {', '.join(self) or 'no metrics yet'}")

    def __repr__(self) -> str:
        lines = [f"  {name}  {'x'.join(map(str, values.shape))}" for name, values in self.items()]
        return "\n".join([f"{len(self)} metrics by name:", *lines])


def metric_columns(lines: Iterable[Mapping[str, Any]]) -> MetricColumns:
    """Return the lines of metrics.jsonl as columns, in the order in which their names first appear."""
    lines = list(lines)
    names = dict.fromkeys(name for line in lines for name in line)
    return MetricColumns({name: _column([line.get(name) for line in lines]) for name in names})


def _column(values: list[Any]) -> np.ndarray:
    width = max((len(value) for value in values if isinstance(value, list)), default=0)
    if width:
        rows = [_padded(value if isinstance(value, list) else [], width) for value in values]
        return np.array(rows, dtype=np.float64)
    if all(isinstance(value, int) for value in values):
        return np.array(values, dtype=np.int64)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _padded(values: list[Any], width: int) -> list[float]:
    return [np.nan if value is None else float(value) for value in [*values, *[None] * (width - len(values))]]
