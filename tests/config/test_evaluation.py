import pytest

from bcd.config.evaluation import EvaluateConfig
from bcd.errors import ConfigError


def test_forced_numbers_do_not_replace_honest_ones():
    with pytest.raises(ConfigError, match="--force needs --output"):
        EvaluateConfig(model="m", data="d", force=True)
