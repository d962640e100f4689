"""The type checker that runs over llm/ and data/ while tests run: beartype, with an int accepted for a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
