"""How the coordinator reaches the sites, whoever carries the parcels.

``flower`` carries them over a network, ``simulation`` within one machine; tests have a
network of their own. The coordinator's rounds know nothing else of transport.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mutirao.federated.parcel import Parcel


@dataclass(frozen=True)
class Lost:
    """A request will not be answered: the site or the way to it is gone."""

    site: str
    """Whose answer will not come."""
    sentence: str
    """Why, for people."""


class Network(Protocol):
    """The sites, as far as they can be reached."""

    def reachable(self) -> set[str]:
        """Return the names of the sites that can be asked now."""
        ...

    def send(self, site: str, request: Parcel) -> None:
        """Ask a site; returns at once. An earlier request to it counts as withdrawn."""
        ...

    def receive(self, timeout_s: float) -> Parcel | Lost | None:
        """Return one answer, as it came, or word that one will not come.

        One at a time, so that only one answer lies in memory. Its sender's name is what it
        says: the caller checks the signature.

        Args:
            timeout_s: longest wait, in seconds; None is returned after it.
        """
        ...
