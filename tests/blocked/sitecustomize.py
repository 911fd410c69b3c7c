"""Imported by every Python started with this folder on its path: no network but loopback.

An attempt to reach or to look up any other host fails, and is written to the file that
MUTIRAO_TEST_ATTEMPTS names, so that a test can tell that there was none.
"""

import os
import socket

_connect, _connect_ex, _lookup = (
    socket.socket.connect,
    socket.socket.connect_ex,
    socket.getaddrinfo,
)


def _is_local(host):
    return host in (None, "", "localhost", "::1", "0.0.0.0") or str(host).startswith("127.")


def _refuse(host):
    with open(os.environ["MUTIRAO_TEST_ATTEMPTS"], "a") as file:
        file.write(f"{host}\n")
    raise OSError(101, f"the network is unreachable in this test: {host}")


def _check(address):
    if isinstance(address, tuple) and not _is_local(address[0]):
        _refuse(address[0])


def connect(self, address):
    _check(address)
    return _connect(self, address)


def connect_ex(self, address):
    _check(address)
    return _connect_ex(self, address)


def getaddrinfo(host, *arguments, **options):
    if not _is_local(host.decode() if isinstance(host, bytes) else host):
        _refuse(host)
    return _lookup(host, *arguments, **options)


socket.socket.connect = connect
socket.socket.connect_ex = connect_ex
socket.getaddrinfo = getaddrinfo
