import socket

from bcd.training.task import interface


def test_an_interface_is_found_by_its_address():
    """Workers on several hosts use it: see `tests/cluster`."""
    names = {name for _, name in socket.if_nameindex()}
    assert interface("127.0.0.1") in names
    assert interface("192.0.2.1") is None
