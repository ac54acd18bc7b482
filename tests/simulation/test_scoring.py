"""Scoring jobs survive whatever a seed does to them; and the simulator finds faults that are planted."""

import pyarrow as pa
import pytest

from tests.simulation.jobs import live_through
from tests.simulation.planted import PLANTED
from tests.simulation.scoring import history

# Seconds of simulated processes, which `make check` leaves out.
pytestmark = pytest.mark.process
BATCH, FEW = 25, 100
# Of the others to 10,000, in each trial.
MORE = 495
# The rarest of the planted faults shows in one of some hundred seeds.
MOST_SEEDS = 2_000
# With kills, errors and pauses.
EVENTFUL = 29


@pytest.mark.parametrize(
    ("first", "n"),
    [
        *((first, BATCH) for first in range(0, FEW, BATCH)),
        *(pytest.param(first, MORE, marks=pytest.mark.trial) for first in range(FEW, 10_000, MORE)),
    ],
)
def test_whatever_happens_the_same_command_ends_with_the_whole_table(first, n, tmp_path):
    live_through(history, range(first, first + n), tmp_path)


def test_a_seed_always_does_the_same(tmp_path):
    traces = []
    for name in "ab":
        (tmp_path / name).mkdir()
        traces.append(history(EVENTFUL, tmp_path / name).world.trace)
    assert traces[0] == traces[1] != []


@pytest.mark.trial
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name, tmp_path):
    for seed in range(MOST_SEEDS):
        (root := tmp_path / str(seed)).mkdir()
        try:
            history(seed, root, PLANTED[name])
        except (AssertionError, LookupError, OSError, pa.ArrowInvalid):
            return
    pytest.fail(f"{name}: not found in {MOST_SEEDS:,} seeds")
