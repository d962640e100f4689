"""Carries the signal that stopped a command through Hydra, which handles exceptions but not exits."""


class CommandStoppedError(Exception):
    """A signal stopped the command.

    Args:
        status: exit status of the process, 128 + n for signal n.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status
