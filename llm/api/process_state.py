"""Restores the global state of a Python process after a run: seeds, environment, handlers, loggers and flags."""

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from llm.callbacks.rng_state import get_rng_state, set_rng_state
from llm.distributed.launch import STOPPING


class _State(NamedTuple):
    read: Callable[[], Any]
    write: Callable[[Any], None]


def _write_environment(variables: dict[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def _read_loggers() -> dict[str, tuple[Any, ...]]:
    known = {name: logger for name, logger in logging.root.manager.loggerDict.items() if _is_logger(logger)}
    loggers = {"": logging.root, **known}
    return {name: (x.level, x.disabled, x.propagate, x.handlers[:]) for name, x in loggers.items()}


def _is_logger(entry: Any) -> bool:
    return isinstance(entry, logging.Logger)


def _write_loggers(states: dict[str, tuple[Any, ...]]) -> None:
    for name, (level, disabled, propagate, handlers) in states.items():
        logger = logging.getLogger(name or None)
        logger.setLevel(level)
        logger.disabled, logger.propagate, logger.handlers = disabled, propagate, handlers


def _read_signals() -> dict[signal.Signals, Any]:
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    return {number: signal.getsignal(number) for number in STOPPING} if is_main else {}


def _write_signals(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # None: a handler that Python did not install
            signal.signal(number, handler)


def _read_streams() -> tuple[Any, ...]:
    return sys.stdout, sys.stderr, sys.excepthook


def _write_streams(streams: tuple[Any, ...]) -> None:
    sys.stdout, sys.stderr, sys.excepthook = streams


def _read_deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _write_deterministic(state: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def _read_cudnn() -> tuple[bool, bool]:
    return torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic


def _write_cudnn(state: tuple[bool, bool]) -> None:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = state


STATES = {
    "environment": _State(lambda: dict(os.environ), _write_environment),
    "loggers": _State(_read_loggers, _write_loggers),
    "signal handlers": _State(_read_signals, _write_signals),
    "streams": _State(_read_streams, _write_streams),
    "threads": _State(torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": _State(_read_deterministic, _write_deterministic),
    "cuDNN": _State(_read_cudnn, _write_cudnn),
    "fp32 products": _State(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "default dtype": _State(torch.get_default_dtype, torch.set_default_dtype),
    "gradients": _State(torch.is_grad_enabled, lambda enabled: torch._C._set_grad_enabled(enabled)),
}
"""Global state that training, Lightning or a logger changes, with what reads and writes each part.

Random states are restored as well, always, because two of them cannot be compared by `==`.
"""


@contextlib.contextmanager
def process_state_restored() -> Iterator[None]:
    """Restore the global state of the process at the end, also after an exception or an interrupt."""
    before = {name: state.read() for name, state in STATES.items()}
    random_states = get_rng_state()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            yield
    finally:
        for name, state in STATES.items():
            if state.read() != before[name]:
                state.write(before[name])
        set_rng_state(random_states)
