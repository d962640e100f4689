"""Quotes a value for Hydra's override grammar."""

import re


def quote(value: str) -> str:
    """Return `value` in single quotes, so that Hydra reads exactly this text, whatever characters it has.

    Quotes and interpolations are escaped. Hydra and OmegaConf read a backslash as itself, except before a quote, before
    an interpolation and at the end, where it is doubled.
    """
    escaped = re.sub(r"(\\*)(\$\{)", lambda match: f"{match[1] * 2}\\{match[2]}", value)
    escaped = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), escaped)
    return f"'{escaped}'"
