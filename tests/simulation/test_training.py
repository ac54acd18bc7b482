"""Trainings survive whatever a seed does to them."""

import pytest

from tests.simulation.jobs import live_through
from tests.simulation.training import history

# Seconds of simulated processes, which `make check` leaves out.
pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("first", "n"),
    [(0, 50), *(pytest.param(first, 590, marks=pytest.mark.trial) for first in range(50, 3_000, 590))],
)
def test_whatever_happens_the_same_command_ends_with_a_finished_run(first, n, tmp_path):
    live_through(history, range(first, first + n), tmp_path)
