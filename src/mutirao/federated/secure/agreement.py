"""What the signatures of secure aggregation say, and the checks that both sides make.

A site's identity signs twice in a round: its keys, and the list of survivors. Both
signatures cover the hash of the terms, so none is worth anything in another round. The
second also covers the keys that the site saw and, as survivors and dropped together are
those who dealt shares, whose shares it got; sites to which the server told different things
never agree (the consistency check of Bonawitz et al. 2017).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from mutirao.errors import ProtocolError
from mutirao.federated.secure.keys import Identity, RoundKey, verify_signature
from mutirao.federated.secure.messages import Advert, Consent, Directory, Survivors
from mutirao.federated.secure.terms import RoundTerms
from mutirao.federated.secure.wire import pack_index

_ADVERT = b"advert"
_CONSENT = b"consent"


def sign_advert(
    identity: Identity, terms: RoundTerms, seal_key: RoundKey, mask_key: RoundKey
) -> Advert:
    """Return a site's keys of a round under its signature."""
    sender = terms.number_of(identity.name)
    keys = seal_key.public_bytes, mask_key.public_bytes
    signature = identity.sign(_ADVERT, terms.digest, pack_index(sender), *keys)
    return Advert(sender, *keys, signature)


def check_advert(advert: Advert, terms: RoundTerms, identities: Mapping[str, bytes]) -> None:
    """Refuse keys that the named site did not sign for this round, or that are no keys.

    Args:
        advert: from the site or through the server; not trusted.
        terms: of this round.
        identities: public identity of each site, by name, known from elsewhere.

    Raises:
        ProtocolError: the signature is wrong or the keys are unusable; names the site.
    """
    name = terms.sites[advert.sender]
    keys = advert.seal_key, advert.mask_key
    parts = terms.digest, pack_index(advert.sender), *keys
    if not verify_signature(identities[name], advert.signature, _ADVERT, *parts):
        raise ProtocolError(
            f"the keys of site {name} are not signed by its known identity for this round"
        )
    if keys[0] == keys[1]:
        raise ProtocolError(f"site {name} advertised one key for both purposes")
    probe = RoundKey(secrets.token_bytes(32))
    for key in keys:
        probe.agree(key, name)


def check_distinct(adverts: tuple[Advert, ...], terms: RoundTerms) -> None:
    """Refuse a key that two sites advertise.

    Raises:
        ProtocolError: names both.
    """
    owners: dict[bytes, int] = {}
    for advert in adverts:
        for key in (advert.seal_key, advert.mask_key):
            owner = owners.setdefault(key, advert.sender)
            if owner != advert.sender:
                raise ProtocolError(
                    f"site {terms.sites[advert.sender]} advertised a key of site "
                    f"{terms.sites[owner]}"
                )


def check_directory(
    directory: Directory, terms: RoundTerms, identities: Mapping[str, bytes]
) -> None:
    """Check every advert and that no key comes twice.

    Raises:
        ProtocolError: names the site whose keys are refused.
    """
    for advert in directory.adverts:
        check_advert(advert, terms, identities)
    check_distinct(directory.adverts, terms)


def check_enough(members: tuple[int, ...], terms: RoundTerms, least: int, what: str) -> None:
    """Refuse a list of fewer sites than are needed to hide each of them.

    Raises:
        ProtocolError: there are too few.
    """
    if len(members) < least:
        raise ProtocolError(
            f"only {len(members)} sites {what} ({terms.names(members)}); at least {least} are "
            "needed"
        )


def sign_consent(
    identity: Identity, terms: RoundTerms, context: bytes, survivors: Survivors
) -> Consent:
    """Return a site's signature under the survivors, and the keys it was told before."""
    parts = (terms.digest, context, survivors.body())
    return Consent(terms.number_of(identity.name), identity.sign(_CONSENT, *parts))


def check_consent(
    consent: Consent,
    terms: RoundTerms,
    context: bytes,
    survivors: Survivors,
    identities: Mapping[str, bytes],
) -> None:
    """Refuse a signature that is not this site's under this list.

    Args:
        consent: from the site or through the server; not trusted.
        terms: of this round.
        context: hash of the directory.
        survivors: the list.
        identities: public identity of each site, by name.

    Raises:
        ProtocolError: names the site.
    """
    name = terms.sites[consent.sender]
    parts = (terms.digest, context, survivors.body())
    if not verify_signature(identities[name], consent.signature, _CONSENT, *parts):
        raise ProtocolError(
            f"site {name} did not sign this list of survivors; it was told another one, or "
            "other keys"
        )
