"""HOST:PORT, as people type it."""

from __future__ import annotations

import socket

from fedpeft.errors import Problem, UserError

LOOPBACK = "127.0.0.1"


def parsed(address: str, where: str) -> tuple[str, int]:
    """Host and port. Raises UserError that names `where` it was typed."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(Problem(where, f'"{address}" is no address', "HOST:PORT, such as fed.example.org:9092 or [::]:9092"))
    return host.strip("[]"), int(port)


def joined(host: str, port: int) -> str:
    """HOST:PORT again, in brackets where the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_port() -> int:
    """A port on loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
