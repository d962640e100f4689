import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.errors import ConfigError
from llm.scaling.trade import fit_trade, past_useful_batch, tokens_over_minimum, updates_over_minimum

sizes = st.floats(1, 1e9)


@given(sizes, sizes)
def test_updates_and_tokens_lie_on_the_hyperbola(batch, scale):
    updates = updates_over_minimum(batch_tokens=batch, noise_scale=scale)
    tokens = tokens_over_minimum(batch_tokens=batch, noise_scale=scale)
    # 1 + tiny loses digits of tiny: sizes differ by up to 1e9, fp64 keeps 1e-16
    assert (updates - 1) * (tokens - 1) == pytest.approx(1.0, rel=1e-6)


def test_at_the_noise_scale_both_are_twice_their_least():
    assert updates_over_minimum(batch_tokens=4096, noise_scale=4096) == 2.0
    assert tokens_over_minimum(batch_tokens=4096, noise_scale=4096) == 2.0


@given(st.floats(10, 1e5), st.floats(1e5, 1e9))
def test_the_fit_finds_the_hyperbola_that_made_the_runs(min_updates, min_tokens):
    critical = min_tokens / min_updates
    batches = [critical / 8, critical, critical * 8]
    updates = [min_updates * (1 + critical / b) for b in batches]
    fitted = fit_trade(updates, [s * b for s, b in zip(updates, batches, strict=True)])
    assert fitted.min_updates == pytest.approx(min_updates, rel=1e-6)
    assert fitted.min_tokens == pytest.approx(min_tokens, rel=1e-6)
    assert fitted.critical_batch_tokens == pytest.approx(critical, rel=1e-6)


def test_a_sentence_states_on_which_side_of_the_useful_batch_a_batch_lies():
    assert past_useful_batch(batch_tokens=4000, noise_scale=1000) == (
        "4 x the useful batch, past it: 5 x the fewest tokens, 1.25 x the fewest updates"
    )
    assert "1 x the useful batch, at it: 2 x the fewest tokens" in past_useful_batch(batch_tokens=100, noise_scale=100)
    assert "0.1 x the useful batch, below it" in past_useful_batch(batch_tokens=100, noise_scale=1000)


def test_one_batch_size_or_runs_on_no_hyperbola_are_refused():
    with pytest.raises(ConfigError, match="needs two batch sizes"):
        fit_trade([10, 10], [100, 100])
    with pytest.raises(ConfigError, match="no hyperbola"):
        fit_trade([10, 20], [100, 1000])  # more updates and more tokens at the smaller... larger batch alike
