import pytest

from llm.errors import ConfigError
from llm.scaling.rules import linear, none, sqrt


@pytest.mark.parametrize("rule", [none, linear, sqrt])
def test_every_rule_is_one_at_the_base_batch(rule):
    assert rule(8192, base_batch_tokens=8192) == 1.0


def test_four_times_the_batch_gives_four_twice_or_the_same_rate():
    assert linear(32768, base_batch_tokens=8192) == 4.0
    assert sqrt(32768, base_batch_tokens=8192) == 2.0
    assert none(32768, base_batch_tokens=8192) == 1.0


@pytest.mark.parametrize("rule", [none, linear, sqrt])
def test_a_base_batch_below_one_is_refused_by_name(rule):
    with pytest.raises(ConfigError, match=r"scaling\.base_batch_tokens=0"):
        rule(8192, base_batch_tokens=0)
