"""Workers on several hosts find each other by the addresses that Ray knows: see `tests/cluster`."""

import socket

from bcd.training import process_group


def test_an_interface_is_found_by_its_address():
    names = {name for _, name in socket.if_nameindex()}
    assert process_group.interface("127.0.0.1") in names
    assert process_group.interface("192.0.2.1") is None
