"""Trainings survive whatever a seed does to them."""

import pytest

from tests.simulation.jobs import live_through
from tests.simulation.training import history

# Seconds of simulated processes, which `make check` leaves out.
pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.trial) for n in range(500, 3_000, 500))]
)
def test_whatever_happens_the_same_command_ends_with_a_finished_run(first, tmp_path):
    live_through(history, range(first, first + (500 if first else 50)), tmp_path)
