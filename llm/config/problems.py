"""Describes one mistake in a configuration: its message and its key."""


class Problem(str):
    """The line `<key>=<value>: <rule>; <remedy>` about one mistake, with its key as data.

    Args:
        key: dotted path of the setting.
        rule: the rule that it breaks, and what to do.
        value: the value as text, None where the mistake lies in the key alone.
        is_unknown_key: whether nothing has this key, so that the rest can be checked without it.
    """

    key: str
    is_unknown_key: bool

    def __new__(cls, key: str, rule: str, *, value: object = None, is_unknown_key: bool = False) -> "Problem":
        line = super().__new__(cls, f"{key}: {rule}" if value is None else f"{key}={value}: {rule}")
        line.key, line.is_unknown_key = key, is_unknown_key
        return line

    @property
    def group(self) -> str:
        """The first part of the key: `model` of `model.ffn.d_ff`."""
        return self.key.partition(".")[0].partition("[")[0]
