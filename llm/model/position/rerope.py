"""Rotary positions that are exact inside a window, and clamped or slowed beyond it."""

import math

from torch import Tensor

from llm.contracts import PositionView
from llm.errors import ConfigError
from llm.model.position.log_n import LogNMode
from llm.model.position.position_module import Position
from llm.model.position.rotary import AngleMemo, cos_sin, inverse_frequencies, rotate_first, rotated_size


class ReRoPE(Position):
    """Rotary positions whose distances are clamped to a window, so that a model trained with RoPE reads any length.

        score_ij = q_i · R_{−min(i−j, window)} k_j

    Beyond the window the rotation is constant and is applied to the query alone, (R_window q)·k, so far keys carry no
    position. It is meant for evaluation: models trained with it do not extrapolate (kexue.fm/archives/9948).

    Args:
        head_dim: size of a head; even.
        base: wavelength base that the model was trained with.
        window: distance, at least 1, that all longer distances are replaced by; a quarter to a half of the training
            length.
        log_n: see `Position`; clipped helps beyond the training length.
        train_length: see `Position`.
        rotary_share: see `RoPE`.

    Raises:
        ConfigError: window is below 1.

    Source: Su Jianlin, kexue.fm/archives/9708.
    Differs: the source prints the far score with the inverse rotation; the sign here equals RoPE at the window.
    """

    is_for_evaluation = True

    def __init__(
        self,
        *,
        head_dim: int,
        base: float,
        window: int,
        log_n: LogNMode,
        train_length: int | None,
        rotary_share: float = 1.0,
    ) -> None:
        super().__init__(log_n=log_n, train_length=train_length)
        self.window = check_window(window)
        self.far_from = self.bare_keys_from = self.window
        self.frequencies = inverse_frequencies(head_dim=rotated_size(head_dim, rotary_share), base=base)
        self.angles = AngleMemo()

    def cautions(self, *, context_length: int, window: int | None, is_training: bool) -> list[str]:
        """Add a line where no distance reaches the window; see `Position`."""
        lines = super().cautions(context_length=context_length, window=window, is_training=is_training)
        return lines + unreached_window(self.window, context_length=context_length, attention_window=window)

    def reach(self, train_length: int) -> float:
        """Return infinity: no distance is ever unseen."""
        return math.inf

    def views(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[PositionView, ...]:
        """Return RoPE below the window; beyond it, a constant rotation of the query and unrotated keys."""
        cos, sin = self.angles(positions, self.frequencies)
        near = PositionView(q=rotate_first(q, cos, sin), k=rotate_first(k, cos, sin), min_distance=0)
        far_cos, far_sin = cos_sin(positions.new_full((1, 1), self.window), self.frequencies)
        return near, PositionView(q=rotate_first(q, far_cos, far_sin), k=k, min_distance=self.window)


class LeakyReRoPE(Position):
    """Rotary positions whose distances grow more slowly beyond a window, so that far tokens keep their order.

        score_ij = q_i · R_{−ρ(i−j)} k_j,   ρ(r) = r if r < window else window + (r − window) / slowdown

    slowdown = 1 is RoPE, and slowdown → ∞ is ReRoPE. A slowdown below 1 makes far distances grow faster. A model
    trained that way (with log_n=full) reads beyond its training length under plain RoPE (kexue.fm/archives/9728).

    Args:
        head_dim: size of a head; even.
        base: wavelength base.
        window: distance, at least 1, up to which positions are exact.
        slowdown: factor, above 0, by which distances beyond the window grow more slowly.
        log_n: see `Position`.
        train_length: see `Position`.
        rotary_share: see `RoPE`.

    Raises:
        ConfigError: window is below 1, or slowdown is not above 0.

    Source: Su Jianlin, kexue.fm/archives/9708 and 9728.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        base: float,
        window: int,
        slowdown: float,
        log_n: LogNMode,
        train_length: int | None,
        rotary_share: float = 1.0,
    ) -> None:
        super().__init__(log_n=log_n, train_length=train_length)
        if slowdown <= 0:
            raise ConfigError(f"model.position.slowdown={slowdown}: must be above 0; 16 slows far distances 16 times")
        self.window, self.slowdown = check_window(window), slowdown
        self.far_from = self.window
        self.frequencies = inverse_frequencies(head_dim=rotated_size(head_dim, rotary_share), base=base)
        self.angles, self.slow_angles = AngleMemo(), AngleMemo()
        self.is_for_evaluation = slowdown > 1

    def cautions(self, *, context_length: int, window: int | None, is_training: bool) -> list[str]:
        """Add a line where no distance reaches the window, or where it suits another length; see `Position`."""
        lines = super().cautions(context_length=context_length, window=window, is_training=is_training)
        unreached = unreached_window(self.window, context_length=context_length, attention_window=window)
        if unreached or not is_training or self.is_for_evaluation:
            return lines + unreached
        if not context_length <= 8 * self.window <= 4 * context_length:
            lines.append(
                f"model.position.window={self.window}: is not between an eighth and a half of "
                f"context_length={context_length}; set model.position.window={context_length // 4}, a quarter of it"
            )
        return lines

    def reach(self, train_length: int) -> float:
        """Return the length at which slowed distances exceed those of training."""
        return train_length + max(0, train_length - self.window) * max(0.0, self.slowdown - 1)

    def views(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[PositionView, ...]:
        """Return RoPE below the window; beyond it, RoPE of slowed positions, shifted to be continuous at the window."""
        cos, sin = self.angles(positions, self.frequencies)
        near = PositionView(q=rotate_first(q, cos, sin), k=rotate_first(k, cos, sin), min_distance=0)
        # slowed positions have the angles of slowed frequencies; the query's constant shift is a second rotation
        shift = positions.new_full((1, 1), self.window)
        shift_cos, shift_sin = cos_sin(shift, self.frequencies * (1 - 1 / self.slowdown))
        far_cos, far_sin = self.slow_angles(positions, self.frequencies / self.slowdown)
        far_q = rotate_first(rotate_first(q, shift_cos, shift_sin), far_cos, far_sin)
        return near, PositionView(q=far_q, k=rotate_first(k, far_cos, far_sin), min_distance=self.window)


def check_window(window: int) -> int:
    """Return the window, or raise ConfigError where it is below 1."""
    if window < 1:
        raise ConfigError(f"model.position.window={window}: must be at least 1; try a half of the training length")
    return window


def unreached_window(window: int, *, context_length: int, attention_window: int | None) -> list[str]:
    """Return a line where no pair of tokens is as far apart as the window of a position, else nothing."""
    if attention_window is not None and attention_window <= window:
        hider = f"model.attention.window={attention_window} hides every key that far"
    elif context_length <= window:
        hider = f"context_length={context_length} holds no pair of tokens that far apart"
    else:
        return []
    return [f"model.position.window={window}: {hider}, so these layers act as with rope; lower model.position.window"]
