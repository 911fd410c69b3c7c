"""The rounds that one site took part in: one set of terms and one update for each.

Asked again for a round it knows, a site gets the session it has, whatever the server calls
the second asking. Sessions stay for as long as the register does; to keep them longer, keep
their snapshots.
"""

from __future__ import annotations

from collections.abc import Mapping

from mutirao.errors import ProtocolError, UpdateError
from mutirao.federated.secure.keys import Identity
from mutirao.federated.secure.payload import Integers, Payload
from mutirao.federated.secure.site import SiteSession
from mutirao.federated.secure.terms import CohortPolicy, RoundTerms


class RoundRegister:
    """A site's sessions, by run and round.

    Args:
        identity: the site's own.
        identities: public identity of each site, by name, from the site's own file.
        policy: what the site insists on.
    """

    def __init__(
        self,
        identity: Identity,
        identities: Mapping[str, bytes],
        *,
        policy: CohortPolicy | None = None,
    ) -> None:
        self._identity, self._identities = identity, dict(identities)
        self._policy = policy or CohortPolicy()
        self._sessions: dict[tuple[bytes, int], SiteSession] = {}

    def open(self, invitation: bytes, codes: Integers) -> SiteSession:
        """Return the session of the round that the invitation names, a new one if need be.

        Args:
            invitation: the server's terms; not trusted.
            codes: (N,) signed integers, the site's update.

        Raises:
            ProtocolError: the terms are refused, or differ from those of the same round.
            UpdateError: the update is refused, or differs from that of the same round.
        """
        terms = RoundTerms.from_bytes(invitation)
        known = self._sessions.get((terms.run_id, terms.round_number))
        if known is None:
            return self._keep(
                SiteSession(
                    self._identity, self._identities, invitation, codes, policy=self._policy
                )
            )
        if known.terms.digest != terms.digest:
            raise ProtocolError(
                f"the server proposes round {terms.round_number} of this run a second time with "
                "other terms; the first stand"
            )
        if known.payload_digest != Payload(codes, terms).digest:
            raise UpdateError(
                f"round {terms.round_number} of this run has another update already; only one "
                "can be masked in a round"
            )
        return known

    def restore(self, snapshot: bytes, codes: Integers) -> SiteSession:
        """Go on with a session that was kept; see ``SiteSession.resume``.

        Raises:
            ProtocolError: the snapshot is refused, or its round is open already.
            UpdateError: this is another update.
        """
        session = SiteSession.resume(
            self._identity, self._identities, snapshot, codes, policy=self._policy
        )
        if (session.terms.run_id, session.terms.round_number) in self._sessions:
            raise ProtocolError(f"round {session.terms.round_number} of this run is open already")
        return self._keep(session)

    def _keep(self, session: SiteSession) -> SiteSession:
        self._sessions[(session.terms.run_id, session.terms.round_number)] = session
        return session
