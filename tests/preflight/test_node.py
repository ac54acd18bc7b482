from bcd.preflight.node import Attempt, Clock, Disk, Node


def test_a_clock_is_known_between_two_bounds():
    clock = Clock(-3.0, 0.5)
    assert (clock.surely_s, clock.perhaps_s) == (2.5, 3.5)
    assert Clock(0.1, 0.5).surely_s == 0


def test_rates_and_shares():
    assert Attempt("--data", "read", "u", seconds=2.0, n_bytes=8).rate == 4
    assert Disk("/", 200, 50).used == 0.75


def test_a_node_without_cpus_and_gpus_does_no_work():
    assert [Node("n", cpus, gpus, 0).works for cpus, gpus in ((0, 0), (4, 0), (0, 1))] == [False, True, True]
