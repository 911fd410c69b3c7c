"""A small cohort and its server, in one process, with sites that stop answering when told."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mutirao.federated.secure.fixed_point import FixedPoint
from mutirao.federated.secure.keys import Identity
from mutirao.federated.secure.server import AggregationServer, Phase
from mutirao.federated.secure.site import SiteSession
from mutirao.federated.secure.terms import CohortPolicy, RoundTerms, default_threshold

NAMES = ("north", "south", "east", "west", "mid", "hill", "lake", "moor", "reef", "vale")
IDENTITIES = {name: Identity.generate(name) for name in NAMES}
KNOWN = {name: identity.public_bytes for name, identity in IDENTITIES.items()}
STAYS = int(Phase.DONE)


def make_terms(num_sites=5, *, largest_code=1000, **changes) -> RoundTerms:
    settings = {
        "run_id": bytes(range(32)),
        "round_number": 1,
        "sites": tuple(sorted(NAMES[:num_sites])),
        "threshold": default_threshold(num_sites),
        "modulus_bits": 32,
        "num_values": 10,
        "fixed_point": FixedPoint(clip=float(largest_code), scale=1.0),
        "chunk_values": 4,
    }
    return RoundTerms(**{**settings, **changes})


def draw_codes(terms: RoundTerms, seed=0) -> dict[str, NDArray[np.int64]]:
    """Updates with the largest magnitudes in them."""
    rng, most = np.random.default_rng(seed), terms.fixed_point.largest_code
    codes = {
        name: rng.integers(-most, most, terms.num_values, endpoint=True) for name in terms.sites
    }
    for drawn in codes.values():
        drawn[0], drawn[-1] = most, -most
    return codes


class SmallCohort:
    """Sites, their updates and a server; ``run`` plays a round."""

    def __init__(
        self, terms: RoundTerms, codes=None, *, policy: CohortPolicy | None = None
    ) -> None:
        self.terms = terms
        self.codes = codes or draw_codes(terms)
        self.policy = policy or CohortPolicy(max_colluding=0)
        self.server = AggregationServer(terms, KNOWN)
        self.sites = {
            name: SiteSession(
                IDENTITIES[name], KNOWN, invitation, self.codes[name], policy=self.policy
            )
            for name, invitation in self.server.invite().items()
        }
        self.sent_bytes = dict.fromkeys(terms.sites, 0)
        self.received_bytes = dict.fromkeys(terms.sites, len(terms.to_bytes()))

    def answer(self, name: str, request: bytes) -> Sequence[bytes]:
        """What a site says in the server's present phase."""
        site = self.sites[name]
        match self.server.phase:
            case Phase.ADVERTS:
                return [site.advertise()]
            case Phase.DEALS:
                return [site.share_keys(request)]
            case Phase.MASKED:
                return [*site.mask_input(request)]
            case Phase.CONSENTS:
                return [site.sign_survivors(request)]
        return [site.unmask(request)]

    def step(self, requests: Mapping[str, bytes], silent=()) -> dict[str, bytes]:
        """Play one phase; those who are silent send nothing, or a part of their update."""
        for name, request in requests.items():
            replies = self.answer(name, request)
            if name in silent:
                replies = replies[:-1] if self.server.phase == Phase.MASKED else []
            for reply in replies:
                self.server.receive(name, reply)
            self.sent_bytes[name] += sum(map(len, replies))
        messages = self.server.advance()
        for name, message in messages.items():
            self.received_bytes[name] += len(message)
        return messages

    def run(self, stops: Mapping[str, int] | None = None, until: int = STAYS) -> dict[str, bytes]:
        """Play up to a phase; each site stops answering at its own."""
        requests = self.server.invite()
        while self.server.phase < until:
            phase = int(self.server.phase)
            silent = [name for name, stop in (stops or {}).items() if stop <= phase]
            requests = self.step(requests, silent)
        return requests

    def sum(self) -> list[int]:
        return [int(value) for chunk in self.server.sum_chunks() for value in chunk]

    def plain_sum(self, names) -> list[int]:
        columns = zip(*(map(int, self.codes[name]) for name in names), strict=True)
        return [sum(column) for column in columns]
