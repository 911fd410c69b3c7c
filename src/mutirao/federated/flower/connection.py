"""How the processes of a federation find each other: an address, keys, names of variables."""

from __future__ import annotations

import ipaddress
from contextlib import suppress

from pydantic import Field, field_validator

from mutirao.config import Config

MAX_PARCEL_BYTES = 64 * 1024**3
"""Payloads of one parcel: the fp32 state of 16 billion parameters. A bound against nonsense;
what a site or a coordinator can hold is less."""
COORDINATOR_VARIABLE = "MUTIRAO_COORDINATOR_FILE"
"""Names the coordinator's file to the ServerApp: a run's configuration goes to the sites."""
SECRET_VARIABLE = "MUTIRAO_CONTROL_SECRET"
"""Gives the SuperLink the secret of those who may start runs."""
SECRET_HEADER = "x-mutirao-control"
"""Where they say it."""


class Connection(Config):
    """Where a site finds its coordinator, and by what it is known there."""

    address: str
    """Host and port of the SuperLink."""
    ca_certificate: str | None = None
    """Certificate of who signed the coordinator's, in PEM; null for a connection without TLS,
    which is accepted on this machine alone."""
    node_key: str | None = None
    """Private key of the node (EC P-384, PEM) that the coordinator has registered; null makes
    one, which a coordinator without node keys takes."""
    max_parcel_bytes: int = Field(default=MAX_PARCEL_BYTES, gt=0)
    """Largest request that is put together in memory, in bytes."""

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        host, separator, port = address.rpartition(":")
        if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65_536:
            raise ValueError(f"{address!r} is not an address (expected host:port)")
        return address

    @property
    def is_local(self) -> bool:
        """Whether the coordinator is on this machine."""
        host = self.address.rpartition(":")[0].strip("[]")
        with suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return host == "localhost"
