import pytest

from llm.config.check import check
from llm.config.decided import DECIDED
from llm.errors import ConfigError

SETTINGS = [(path, key) for path, keys in DECIDED.items() for key in keys]


@pytest.mark.parametrize(("path", "key"), SETTINGS, ids=[f"{path}.{key}" for path, key in SETTINGS])
def test_a_setting_that_another_key_decides_is_refused_with_that_key(composed, path, key):
    cfg = composed()
    node = cfg
    for part in path.split("."):
        node = node[part]
    node[key] = 2
    with pytest.raises(ConfigError) as error:
        check(cfg)
    assert f"{path}.{key}=2: has no effect here; {DECIDED[path][key]}" in str(error.value).splitlines()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(composed, seed):
    with pytest.raises(ConfigError, match=rf"seed={seed}: must lie in \[0, 4294967296\)"):
        check(composed(f"seed={seed}"))
