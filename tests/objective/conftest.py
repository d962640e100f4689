import pytest
from objective_tables import Table


@pytest.fixture
def table() -> Table:
    """A decoder of arbitrary conditionals."""
    return Table()
