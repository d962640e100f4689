"""Any command line either trains or is refused with one line per mistake."""

import random

import pytest
from catalogue import options

SHORT = ("max_steps=1", "val_every=1", "callbacks.samples=null", "hydra.run.dir=run", "compile=false")
VALUES = ("null", "-1", "0", "1", "2", "3", "7", "0.5", "1.5", "-0.1", "1e-9", "nan", "inf", "true", "false", "abc",
          "auto", "''", "[]", "[1]", "[1,2]", "{}", "{a: 1}", "1e3", "../x", "none")  # fmt: skip
LEFT_ALONE = ("max_steps", "max_tokens", "name", "compile", "trainer.devices", "trainer.num_nodes")
"""Keys with values that are neither wrong nor short, or that start processes."""
GROUPS = ("model", "model/attention", "model/position", "model/ffn", "model/ffn/balance", "model/ffn/router",
          "model/norm", "optimizer", "schedule", "scaling", "batch_schedule", "rates", "spikes")  # fmt: skip
CHOICES = {group: tuple(options(group)) for group in GROUPS} | {
    "logger": ("csv", "tensorboard"),
    "eval": ("[]", "loss", "attention"),
    "averaging": ("[]", "ema"),
}


def keys_of(node, at=""):
    """Every key of a configuration, dotted."""
    for key, value in node.items():
        path = f"{at}.{key}" if at else key
        yield path
        if isinstance(value, dict):
            yield from keys_of(value, path)


def some_overrides(chance, composed):
    """Draw options of groups, and odd values for one to three keys of what they compose to."""
    groups = chance.sample(sorted(CHOICES), chance.randint(0, 2))
    chosen = [f"{group}={chance.choice(CHOICES[group])}" for group in groups]
    try:
        keys = [key for key in keys_of(composed(*chosen)) if not key.startswith(LEFT_ALONE)]
    except Exception:  # options that do not go together: the run has to say so
        keys = ["seed"]
    odd = [f"{key}={chance.choice(VALUES)}" for key in chance.sample(keys, chance.randint(1, min(3, len(keys))))]
    return [*chosen, *odd]


def trains_or_says_why(train_here, tiny, overrides):
    given = {override.split("=")[0] for override in overrides}
    status, said, _ = train_here(*(o for o in [*tiny, *SHORT] if o.split("=")[0] not in given), *overrides)
    is_told = status == 2 and "error: " in said and "Traceback" not in said
    assert status == 0 or is_told, f"{overrides} -> {status}: {said[-2000:]}"


@pytest.mark.parametrize("seed", range(8))
def test_a_run_with_odd_values_trains_or_says_why(train_here, tiny, composed, seed):
    trains_or_says_why(train_here, tiny, some_overrides(random.Random(seed), composed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10_000, 11_000))
def test_a_thousand_runs_with_odd_values_train_or_say_why(train_here, tiny, composed, seed):
    trains_or_says_why(train_here, tiny, some_overrides(random.Random(seed), composed))
