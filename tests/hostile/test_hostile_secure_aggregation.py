"""Secure aggregation with a lying server, a lying site, and messages that were altered.

Whatever is sent is answered or refused with one of our errors, and a site never gives away
both shares of a peer.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutirao.errors import MutiraoError, ProtocolError
from mutirao.federated.secure import messages
from mutirao.federated.secure.agreement import sign_advert
from mutirao.federated.secure.fixed_point import FixedPoint
from mutirao.federated.secure.keys import Identity, RoundKey
from mutirao.federated.secure.messages import (
    Advert,
    Consent,
    Consents,
    Deal,
    Directory,
    MaskedChunk,
    Message,
    Reveal,
    Shares,
    Survivors,
)
from mutirao.federated.secure.server import AggregationServer, Phase
from mutirao.federated.secure.site import SiteSession
from mutirao.federated.secure.terms import CohortPolicy, RoundTerms
from mutirao.federated.secure.wire import HEADER_BYTES, MAX_CONTROL_BYTES

NAMES = ("east", "mid", "north", "south", "west")
IDENTITIES = {name: Identity.generate(name) for name in NAMES}
KNOWN = {name: identity.public_bytes for name, identity in IDENTITIES.items()}
POLICY = CohortPolicy(min_cohort=3, max_colluding=0)
EAST, MID, NORTH, SOUTH, WEST = range(5)


def terms_of(round_number: int = 1, **changes: Any) -> RoundTerms:
    wanted = {
        "run_id": b"r" * 32,
        "round_number": round_number,
        "sites": NAMES,
        "threshold": 3,
        "modulus_bits": 20,
        "num_values": 6,
        "fixed_point": FixedPoint(clip=100.0, scale=1.0),
        "chunk_values": 4,
    }
    return RoundTerms(**{**wanted, **changes})


class Cohort:
    """Five sites and what an honest server would send each of them, by phase."""

    def __init__(self, terms: RoundTerms | None = None) -> None:
        self.terms = terms or terms_of()
        self.server = AggregationServer(self.terms, KNOWN)
        self.requests = self.server.invite()
        codes = np.arange(6) - 3
        self.sites = {
            name: SiteSession(IDENTITIES[name], KNOWN, request, codes, policy=POLICY)
            for name, request in self.requests.items()
        }

    def replies(self, name: str) -> list[bytes]:
        """What an honest site answers in this phase."""
        site, request = self.sites[name], self.requests[name]
        steps: dict[Phase, Callable[[], Iterable[bytes]]] = {
            Phase.ADVERTS: lambda: [site.advertise()],
            Phase.DEALS: lambda: [site.share_keys(request)],
            Phase.MASKED: lambda: site.mask_input(request),
            Phase.CONSENTS: lambda: [site.sign_survivors(request)],
            Phase.REVEALS: lambda: [site.unmask(request)],
        }
        return [*steps[self.server.phase]()]

    def until(self, phase: Phase, drops: dict[str, Phase] | None = None) -> "Cohort":
        """Play honestly up to a phase; those who drop are silent from their own on."""
        while self.server.phase < phase:
            for name in self.requests:
                if (drops or {}).get(name, Phase.DONE) > self.server.phase:
                    for reply in self.replies(name):
                        self.server.receive(name, reply)
            self.requests = self.server.advance()
        return self

    def sent(self, kind: type[Message], name: str = "north") -> Any:
        """The honest server's message for a site, taken apart."""
        return kind.from_bytes(self.requests[name], self.terms)

    def reply(self, kind: type[Message], name: str) -> Any:
        """An honest site's reply, taken apart."""
        return kind.from_bytes(self.replies(name)[0], self.terms)

    def pack(self, message: Message) -> bytes:
        return message.to_bytes(self.terms)


def refused(message: str) -> Any:
    return pytest.raises(ProtocolError, match=message)


def reheaded(data: bytes, terms: RoundTerms) -> bytes:
    """A message with the header of another round."""
    return data[: HEADER_BYTES - 32] + terms.digest + data[HEADER_BYTES:]


# --- a server that lies: the invitation ------------------------------------------------------


def open_site(invitation: bytes) -> SiteSession:
    return SiteSession(IDENTITIES["north"], KNOWN, invitation, np.zeros(6, np.int64), policy=POLICY)


def test_an_invitation_that_could_overflow():
    data = terms_of().to_bytes()
    bits_at = HEADER_BYTES + 32 + 4 + 2
    assert data[bits_at] == 20
    with refused(r"terms message is malformed: modulus_bits=9 could overflow"):
        open_site(data[:bits_at] + b"\x09" + data[bits_at + 1 :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ("east", "north"), "threshold": 2}, "name 2 sites"),
        ({"threshold": 2}, "must be at least 3"),
        ({"sites": ("east", "mid", "north", "spy")}, "site spy, whose identity is not known"),
        ({"sites": ("east", "mid", "south")}, "site north is not among the sites"),
    ],
)
def test_an_invitation_that_would_not_hide_enough(changes, message):
    with refused(message):
        open_site(terms_of(**changes).to_bytes())


# --- a server that lies: the directory -------------------------------------------------------


def directory_with(cohort: Cohort, *adverts: Advert, without: tuple[int, ...] = ()) -> bytes:
    """The honest directory, some adverts replaced or left out."""
    honest = cohort.sent(Directory).adverts
    by_sender = {advert.sender: advert for advert in (*honest, *adverts)}
    kept = (by_sender[sender] for sender in sorted(by_sender) if sender not in without)
    return cohort.pack(Directory(tuple(kept)))


def spy_keys() -> tuple[RoundKey, RoundKey]:
    return RoundKey(b"a" * 32), RoundKey(b"b" * 32)


def test_keys_of_the_server_in_a_site_s_place():
    cohort = Cohort().until(Phase.DEALS)
    seal_key, mask_key = spy_keys()
    forged = replace(
        cohort.sent(Directory).adverts[SOUTH],
        seal_key=seal_key.public_bytes,
        mask_key=mask_key.public_bytes,
    )
    with refused("keys of site south are not signed by its known identity for this round"):
        cohort.sites["north"].share_keys(directory_with(cohort, forged))


@pytest.mark.parametrize("changes", [{"round_number": 2}, {"run_id": b"o" * 32}])
def test_keys_replayed_from_another_round_or_run(changes):
    cohort, other = Cohort().until(Phase.DEALS), Cohort(terms_of(**changes)).until(Phase.DEALS)
    with refused("belongs to another run, round or terms"):
        cohort.sites["north"].share_keys(other.requests["north"])
    replayed = other.sent(Directory).adverts[SOUTH]
    with refused("keys of site south are not signed"):
        cohort.sites["north"].share_keys(directory_with(cohort, replayed))


def test_keys_of_one_site_under_the_name_of_another():
    cohort = Cohort().until(Phase.DEALS)
    borrowed = replace(cohort.sent(Directory).adverts[WEST], sender=SOUTH)
    with refused("keys of site south are not signed"):
        cohort.sites["north"].share_keys(directory_with(cohort, borrowed))


def test_a_key_that_two_sites_advertise():
    """South helps the server and signs west's key as its own."""
    cohort = Cohort().until(Phase.DEALS)
    west = cohort.sent(Directory).adverts[WEST]
    unsigned = Advert(SOUTH, west.seal_key, RoundKey(b"b" * 32).public_bytes, bytes(64))
    parts = (cohort.terms.digest, SOUTH.to_bytes(2, "little"), unsigned.seal_key, unsigned.mask_key)
    signed = replace(unsigned, signature=IDENTITIES["south"].sign(b"advert", *parts))
    with refused("site west advertised a key of site south"):
        cohort.sites["north"].share_keys(directory_with(cohort, signed))
    twin = sign_advert(IDENTITIES["south"], cohort.terms, *[RoundKey(b"c" * 32)] * 2)
    with refused("site south advertised one key for both purposes"):
        cohort.sites["north"].share_keys(directory_with(cohort, twin))


@pytest.mark.parametrize("which", [0, 1])
def test_keys_of_low_order(which):
    class LowOrder(RoundKey):
        def __init__(self) -> None:
            super().__init__(b"a" * 32)
            self.public_bytes = bytes(32)

    keys = [RoundKey(b"a" * 32), RoundKey(b"b" * 32)]
    keys[which] = LowOrder()
    weak = sign_advert(IDENTITIES["south"], terms_of(), *keys)
    cohort = Cohort()
    with refused("site south: site south advertised a key with which no secret can be agreed"):
        cohort.server.receive("south", cohort.pack(weak))
    cohort.until(Phase.DEALS)
    with refused("site south advertised a key with which no secret can be agreed"):
        cohort.sites["north"].share_keys(directory_with(cohort, weak))


def test_a_directory_of_too_few_or_without_oneself():
    cohort = Cohort().until(Phase.DEALS)
    with refused("only 2 sites are in the directory .east, north.; at least 3"):
        cohort.sites["north"].share_keys(directory_with(cohort, without=(MID, SOUTH, WEST)))
    with refused("does not have this site's own keys"):
        cohort.sites["north"].share_keys(directory_with(cohort, without=(NORTH,)))
    own = sign_advert(IDENTITIES["north"], cohort.terms, *spy_keys())
    with refused("does not have this site's own keys"):
        cohort.sites["north"].share_keys(directory_with(cohort, own))


def test_a_second_directory():
    cohort = Cohort().until(Phase.DEALS)
    first = cohort.sites["north"].share_keys(cohort.requests["north"])
    with refused("sent the directory of round 1 a second time and differently"):
        cohort.sites["north"].share_keys(directory_with(cohort, without=(WEST,)))
    assert cohort.sites["north"].share_keys(cohort.requests["north"]) == first


# --- a server that lies: the shares ----------------------------------------------------------


def shares_with(cohort: Cohort, change: Callable[[Any], Any], dealer: int = SOUTH) -> bytes:
    shares = cohort.sent(Shares)
    items = [change(item) if item.peer == dealer else item for item in shares.items]
    return cohort.pack(replace(shares, items=tuple(item for item in items if item)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: replace(i, sealed=bytes(len(i.sealed))), "from site south were altered"),
        (lambda i: replace(i, sealed=i.sealed[:-1] + b"\0"), "from site south were altered"),
        (lambda i: replace(i, key_digest=bytes(32)), "site south announced other shares"),
        (lambda i: replace(i, seed_digest=i.key_digest), "site south announced other shares"),
    ],
)
def test_altered_shares(change, message):
    cohort = Cohort().until(Phase.MASKED)
    if shares_with(cohort, change) == cohort.requests["north"]:
        pytest.skip("the last byte happened to be zero")
    with refused(message):
        cohort.sites["north"].mask_input(shares_with(cohort, change))


def test_shares_that_were_dealt_to_another():
    cohort = Cohort().until(Phase.MASKED)
    with refused("the shares are for another site"):
        cohort.sites["north"].mask_input(cohort.requests["east"])
    stolen = cohort.sent(Shares, "east").items[SOUTH]
    with refused("from site south were altered on their way, or are not meant"):
        cohort.sites["north"].mask_input(shares_with(cohort, lambda _: stolen))
    swapped = cohort.sent(Shares).items[WEST]
    with refused("from site south were altered on their way, or are not meant"):
        cohort.sites["north"].mask_input(
            shares_with(cohort, lambda item: replace(swapped, peer=item.peer))
        )


def test_shares_of_too_few_of_strangers_or_without_oneself():
    cohort = Cohort().until(Phase.MASKED, {"west": Phase.ADVERTS})
    shares, site = cohort.sent(Shares), cohort.sites["north"]
    stranger = replace(shares.items[0], peer=WEST)
    with refused("the server says that west dealt shares, whom it left out before"):
        site.mask_input(cohort.pack(replace(shares, items=(*shares.items, stranger))))
    with refused("only 2 sites dealt shares"):
        site.mask_input(cohort.pack(replace(shares, items=shares.items[1:3])))
    with refused("this site is not among those that dealt shares"):
        site.mask_input(shares_with(cohort, lambda _: None, dealer=NORTH))


# --- a server that lies: survivors and signatures --------------------------------------------


def list_of(survivors: Iterable[int], dropped: Iterable[int]) -> Survivors:
    return Survivors(tuple(survivors), tuple(dropped))


@pytest.mark.parametrize(
    ("survivors", "dropped", "message"),
    [
        ((0, 1, 2, 3, 4), (1,), "lists mid as survivor and as dropped"),
        ((0, 1, 2, 3), (), "not those who dealt shares"),
        ((0, 2), (1, 3, 4), "only 2 sites sent their updates"),
        ((0, 1, 3, 4), (2,), "this site is not among those that sent their updates"),
        ((), (), "only 0 sites sent their updates"),
    ],
)
def test_lists_of_survivors_that_would_reveal_too_much(survivors, dropped, message):
    cohort = Cohort().until(Phase.CONSENTS)
    with refused(message):
        cohort.sites["north"].sign_survivors(cohort.pack(list_of(survivors, dropped)))


def test_survivors_who_never_dealt_shares():
    cohort = Cohort().until(Phase.CONSENTS, {"west": Phase.DEALS})
    with refused("the server says that west sent their updates, whom it left out before"):
        cohort.sites["north"].sign_survivors(cohort.pack(list_of(range(5), ())))
    with refused("not those who dealt shares"):
        cohort.sites["north"].sign_survivors(cohort.pack(list_of(range(4), (4,))))


def test_two_lists_for_one_site():
    cohort = Cohort().until(Phase.CONSENTS)
    cohort.sites["north"].sign_survivors(cohort.pack(list_of(range(5), ())))
    with refused("sent the survivors of round 1 a second time and differently"):
        cohort.sites["north"].sign_survivors(cohort.pack(list_of(range(4), (4,))))


def test_two_lists_for_two_halves_of_the_cohort():
    """The attack that the round of signatures is there for: nobody reveals a share."""
    cohort = Cohort().until(Phase.CONSENTS)
    lists = {
        name: list_of(range(5), ()) if name in ("east", "mid") else list_of(range(1, 5), (0,))
        for name in ("east", "mid", "north", "south")
    }
    consents = {
        name: Consent.from_bytes(cohort.sites[name].sign_survivors(cohort.pack(each)), cohort.terms)
        for name, each in lists.items()
    }
    for name, shown in lists.items():
        everyone = tuple(consents[signer] for signer in sorted(consents))
        honest = tuple(consents[signer] for signer in sorted(consents) if lists[signer] == shown)
        site = cohort.sites[name]
        with refused("only 2 sites signed the list of survivors"):
            site.unmask(cohort.pack(Consents(shown, honest)))
        with refused("did not sign this list|by sites that are not on it"):
            site.unmask(cohort.pack(Consents(shown, everyone)))
        other = next(each for each in lists.values() if each != shown)
        with refused("another list of survivors than this site signed"):
            site.unmask(cohort.pack(Consents(other, everyone)))


def test_sites_that_saw_different_dealers_do_not_agree():
    """The server hides west's shares from north: their consents differ, nothing is revealed."""
    cohort = Cohort().until(Phase.MASKED)
    split = shares_with(cohort, lambda _: None, dealer=WEST)
    cohort.sites["north"].mask_input(split)
    for name in ("east", "mid", "south"):
        cohort.sites[name].mask_input(cohort.requests[name])
    honest = cohort.pack(list_of(range(4), (4,)))
    consents = [
        Consent.from_bytes(cohort.sites[name].sign_survivors(honest), cohort.terms)
        for name in ("east", "mid", "south")
    ]
    with refused("not those who dealt shares"):
        cohort.sites["north"].sign_survivors(honest)
    smaller = list_of(range(4), ())
    cohort.sites["north"].sign_survivors(cohort.pack(smaller))
    with refused("site east did not sign this list of survivors"):
        cohort.sites["north"].unmask(cohort.pack(Consents(smaller, tuple(consents))))


def test_forged_and_replayed_signatures():
    cohort = Cohort().until(Phase.REVEALS)
    other = Cohort(terms_of(2)).until(Phase.REVEALS)
    honest, site = cohort.sent(Consents), cohort.sites["north"]
    for signature in (bytes(64), other.sent(Consents).consents[SOUTH].signature):
        consents = list(honest.consents)
        consents[SOUTH] = replace(consents[SOUTH], signature=signature)
        with refused("site south did not sign this list"):
            site.unmask(cohort.pack(replace(honest, consents=tuple(consents))))
    with refused("belongs to another run, round or terms"):
        site.unmask(other.requests["north"])
    with refused("site east did not sign this list"):
        site.unmask(reheaded(other.requests["north"], cohort.terms))
    with refused("only 2 sites signed"):
        site.unmask(cohort.pack(replace(honest, consents=honest.consents[:2])))


def test_steps_out_of_order():
    cohort = Cohort().until(Phase.REVEALS)
    fresh, consents = Cohort(), cohort.requests["north"]
    site = fresh.sites["north"]
    with refused("did not send the directory yet"):
        site.unmask(consents)
    with refused("did not send the directory yet"):
        site.masked_chunk(0)
    fresh.until(Phase.MASKED)
    with refused("did not send the shares yet"):
        site.sign_survivors(fresh.pack(list_of(range(5), ())))
    site.mask_input(fresh.requests["north"])
    with refused("did not send the survivors yet"):
        site.unmask(consents)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_site_never_gives_both_shares_of_a_peer(data):
    """Any lists, properly signed by four sites that help the server, in any order and number."""
    cohort = Cohort().until(Phase.CONSENTS)
    site, given_away = cohort.sites["north"], []
    subsets = st.lists(st.integers(0, 4), unique=True).map(lambda each: tuple(sorted(each)))
    for _ in range(data.draw(st.integers(1, 6))):
        survivors = data.draw(subsets)
        rest = tuple(number for number in range(5) if number not in survivors)
        survivors = Survivors(survivors, data.draw(st.just(rest) | subsets))
        try:
            own = Consent.from_bytes(site.sign_survivors(cohort.pack(survivors)), cohort.terms)
            helpers = [sign_as(cohort, name, survivors) for name in NAMES if name != "north"]
            signed = [each for each in (*helpers, own) if each.sender in survivors.survivors]
            signed.sort(key=lambda consent: consent.sender)
            reply = site.unmask(cohort.pack(Consents(survivors, tuple(signed))))
            given_away.append(Reveal.from_bytes(reply, cohort.terms))
        except ProtocolError:
            continue
    seeds = {owner for reveal in given_away for owner, _ in reveal.seed_shares}
    keys = {owner for reveal in given_away for owner, _ in reveal.key_shares}
    assert not seeds & keys
    assert not given_away or (seeds | keys == set(range(5)) and len(seeds) >= 3)


def sign_as(cohort: Cohort, name: str, survivors: Survivors) -> Consent:
    """What a site that helps the server signs: anything."""
    site = cohort.sites[name]
    parts = cohort.terms.digest, site._context, survivors.body()
    return Consent(site.number, IDENTITIES[name].sign(b"consent", *parts))


@pytest.mark.parametrize("phase", [Phase.ADVERTS, Phase.DEALS, Phase.MASKED])
def test_a_site_insists_on_its_cohort_where_the_server_does_not(phase):
    """Three of five are enough for the terms and the server, not for a site that wants four."""
    cohort, strict = Cohort(), CohortPolicy(min_cohort=4, max_colluding=0)
    invitation, codes = cohort.requests["north"], np.arange(6) - 3
    north = SiteSession(IDENTITIES["north"], KNOWN, invitation, codes, policy=strict)
    cohort.sites["north"] = north
    cohort.until(Phase(phase + 1), {"west": phase, "south": phase})
    with refused("only 3 sites .* at least 4 are needed"):
        cohort.replies("north")


# --- a site that lies ------------------------------------------------------------------------


def test_a_site_that_speaks_for_another_or_from_outside():
    cohort = Cohort()
    with refused("site south: it speaks for site north"):
        cohort.server.receive("south", cohort.replies("north")[0])
    with refused("site spy is not among the sites"):
        cohort.server.receive("spy", cohort.replies("north")[0])


def test_a_site_with_two_stories():
    cohort = Cohort()
    for keys in (spy_keys(), [RoundKey(b"c" * 32), RoundKey(b"d" * 32)]):
        advert = cohort.pack(sign_advert(IDENTITIES["south"], cohort.terms, *keys))
        if cohort.server.answered():
            with refused("site south: it sent two different messages for one step"):
                cohort.server.receive("south", advert)
        else:
            cohort.server.receive("south", advert)
    assert cohort.server.answered() == ("south",)


def test_a_site_that_copies_a_key():
    cohort = Cohort()
    cohort.server.receive("north", cohort.replies("north")[0])
    north = cohort.reply(Advert, "north")

    class Copied(RoundKey):
        def __init__(self) -> None:
            super().__init__(b"a" * 32)
            self.public_bytes = north.mask_key

    copied = sign_advert(IDENTITIES["south"], cohort.terms, RoundKey(b"b" * 32), Copied())
    with refused("site south: site south advertised a key of site north"):
        cohort.server.receive("south", cohort.pack(copied))


def test_a_site_that_dropped_and_comes_back():
    cohort = Cohort().until(Phase.DEALS, {"west": Phase.ADVERTS})
    with refused("site west: a message of kind advert came where deal was expected"):
        cohort.server.receive("west", cohort.sites["west"].advertise())
    deal = replace(cohort.reply(Deal, "north"), sender=WEST)
    with refused("site west: it dropped out of this round before"):
        cohort.server.receive("west", cohort.pack(deal))
    over = Cohort().until(Phase.DONE)
    with refused("site north: the round is over"):
        over.server.receive("north", b"")


def test_shares_dealt_to_other_sites_than_the_directory_has():
    cohort = Cohort().until(Phase.DEALS)
    deal = cohort.reply(Deal, "south")
    with refused("site south: it dealt shares to other sites than the directory has"):
        cohort.server.receive("south", cohort.pack(replace(deal, items=deal.items[:4])))


def test_a_dealer_that_announces_other_shares_is_named_by_the_recipient():
    cohort = Cohort().until(Phase.DEALS)
    deal = cohort.reply(Deal, "south")
    items = tuple(replace(item, seed_digest=bytes(32)) for item in deal.items)
    deliver(cohort, "south", [cohort.pack(replace(deal, items=items))])
    with refused("site south announced other shares than it dealt to this site"):
        cohort.sites["north"].mask_input(cohort.requests["north"])


def deliver(cohort: Cohort, liar: str, lies: list[bytes]) -> None:
    """Play one phase in which one site says something else."""
    for name in cohort.requests:
        for reply in lies if name == liar else cohort.replies(name):
            cohort.server.receive(name, reply)
    cohort.requests = cohort.server.advance()


def test_a_dealer_whose_shares_fit_no_secret_is_named_by_the_server(monkeypatch):
    for victim_drops in (False, True):
        cohort = Cohort().until(Phase.DEALS)
        site = cohort.sites["south"]
        honest = SiteSession._split_secrets

        def split(self, honest=honest, site=site):
            pairs = honest(self)
            if self is site:  # each share is well dealt, but they lie on no polynomial
                pairs[EAST] = type(pairs[EAST])(pairs[MID].seed_share, pairs[MID].key_share)
            return pairs

        with monkeypatch.context() as patch:
            patch.setattr(SiteSession, "_split_secrets", split)
            cohort.until(Phase.MASKED)
        cohort.until(Phase.REVEALS, {"south": Phase.MASKED} if victim_drops else {})
        with refused("site south dealt shares that do not fit what it announced"):
            cohort.until(Phase.DONE)


@pytest.mark.parametrize("kind", ["seed_shares", "key_shares"])
def test_a_wrong_share_is_refused_by_name_and_the_sum_stays_exact(kind):
    cohort = Cohort().until(Phase.REVEALS, {"west": Phase.MASKED})
    reveal = cohort.reply(Reveal, "south")
    owner, _ = getattr(reveal, kind)[0]
    wrong = replace(reveal, **{kind: ((owner, bytes(33)), *getattr(reveal, kind)[1:])})
    with refused(f"site south: its share for {NAMES[owner]} is not the real one"):
        cohort.server.receive("south", cohort.pack(wrong))
    swapped = replace(reveal, seed_shares=reveal.key_shares, key_shares=reveal.seed_shares)
    with refused("site south: it reveals shares of other sites"):
        cohort.server.receive("south", cohort.pack(swapped))
    cohort.until(Phase.DONE, {"south": Phase.REVEALS})
    total = np.concatenate([*cohort.server.sum_chunks()])
    assert (total == 4 * (np.arange(6) - 3)).all()


def test_a_signature_under_another_list():
    cohort = Cohort().until(Phase.CONSENTS)
    other = cohort.sites["south"].sign_survivors(cohort.pack(list_of(range(4), (4,))))
    with refused("site south: site south did not sign this list"):
        cohort.server.receive("south", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, chunk=2), r"it has chunk 2 \(expected 0 to 1\)"),
        (lambda c: replace(c, chunk=1), r"4 bytes follow|6 bytes follow"),
        (lambda c: replace(c, packed=c.packed[:-1]), "ends 1 bytes early"),
        (lambda c: replace(c, packed=c.packed + b"\0"), "has 57 bytes"),
        (lambda c: replace(c, packed=b"\xff" * 12), "values of more than 20 bits"),
        (lambda c: replace(c, sender=7), r"site number 7 \(expected 0 to 4\)"),
    ],
)
def test_malformed_masked_values(change, message):
    cohort = Cohort().until(Phase.MASKED)
    with refused(f"site south: the masked chunk message is malformed: .*{message}"):
        cohort.server.receive("south", cohort.pack(change(cohort.reply(MaskedChunk, "south"))))


def test_other_masked_values_the_second_time():
    cohort = Cohort().until(Phase.MASKED)
    first, _ = cohort.replies("south")
    cohort.server.receive("south", first)
    cohort.server.receive("south", first)
    other = replace(cohort.reply(MaskedChunk, "south"), packed=bytes(12))
    with refused("site south: it sent two different messages"):
        cohort.server.receive("south", cohort.pack(other))


# --- altered bytes ---------------------------------------------------------------------------

RECORDED: list[tuple[type[Message], bytes]] = []


def record() -> list[tuple[type[Message], bytes]]:
    """One honest message of each kind but the invitation, all of one round."""
    if not RECORDED:
        cohort = Cohort()
        pairs = [
            (None, Advert),
            (Directory, Deal),
            (Shares, MaskedChunk),
            (Survivors, Consent),
            (Consents, Reveal),
        ]
        for phase, (request, reply) in enumerate(pairs):
            cohort.until(Phase(phase), {"west": Phase.MASKED})
            RECORDED.append((reply, cohort.replies("north")[0]))
            if request is not None:
                RECORDED.append((request, cohort.requests["north"]))
    return RECORDED


def parse(kind: type[Message] | None, data: Any) -> str | None:
    """Why a message is refused; anything but a ProtocolError fails the test."""
    try:
        if kind is None:
            RoundTerms.from_bytes(data)
        else:
            message = kind.from_bytes(data, terms_of())
            assert message.to_bytes(terms_of()) == data  # one form for one meaning
    except ProtocolError as error:
        refusal = str(error)
    else:
        return None
    assert "\n" not in refusal
    assert len(refusal) < 400
    return refusal


def test_every_kind_is_recorded():
    kinds = {value for value in vars(messages).values() if isinstance(value, type)}
    drawn = {kind for kind in kinds if issubclass(kind, Message) and "kind" in vars(kind)}
    assert {kind for kind, _ in record()} == drawn


def test_truncations_and_additions_of_every_message():
    for kind, data in [*record(), (None, terms_of().to_bytes())]:
        assert parse(kind, data) is None
        for length in range(len(data)):
            assert parse(kind, data[:length]), (kind, length)
        assert "follow" in (parse(kind, data + b"\0") or "") or kind is MaskedChunk
        assert parse(kind, data + bytes(MAX_CONTROL_BYTES))


def test_what_is_no_message_of_ours():
    for kind, data in [*record(), (None, terms_of().to_bytes())]:
        assert "does not begin with the mark" in (parse(kind, b"PK\x03\x04" + data[4:]) or "")
        assert "speaks version 2" in (parse(kind, data[:4] + b"\x02" + data[5:]) or "")
        assert "of kind number 99" in (parse(kind, data[:5] + b"\x63" + data[6:]) or "")
        assert "of kind snapshot" in (parse(kind, data[:5] + b"\x0b" + data[6:]) or "")
        for odd in (None, "text", 7, bytearray(data), memoryview(data), [data]):
            assert "expected bytes" in (parse(kind, odd) or "")


@pytest.mark.parametrize("change", [lambda rows: rows[::-1], lambda rows: (rows[0], *rows[:-1])])
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (Directory, "adverts"),
        (Deal, "items"),
        (Shares, "items"),
        (Survivors, "survivors"),
        (Consents, "consents"),
        (Reveal, "seed_shares"),
    ],
)
def test_lists_with_a_site_twice_or_out_of_order(kind, field, change):
    honest: Any = kind.from_bytes(dict(record())[kind], terms_of())
    altered = replace(honest, **{field: change(getattr(honest, field))})
    assert "twice or out of order" in (parse(kind, altered.to_bytes(terms_of())) or "")


def test_more_entries_than_sites():
    many = Survivors(tuple(range(6)), ()).to_bytes(terms_of())
    assert "announces 6 entries (expected at most 5)" in (parse(Survivors, many) or "")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_altered_messages_are_refused_or_well_formed(data):
    kind, honest = data.draw(st.sampled_from([*record(), (None, terms_of().to_bytes())]))
    altered = bytearray(honest)
    for _ in range(data.draw(st.integers(1, 8))):
        position = data.draw(st.integers(0, len(altered) - 1))
        altered[position] = data.draw(st.integers(0, 255))
    parse(kind, bytes(altered))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_bodies_are_refused_or_well_formed(data):
    kind, honest = data.draw(st.sampled_from([*record(), (None, terms_of().to_bytes())]))
    parse(kind, honest[:HEADER_BYTES] + data.draw(st.binary(max_size=300)))
    parse(kind, data.draw(st.binary(max_size=100)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_round_of_altered_messages_ends_in_an_exact_sum_or_a_refusal(data):
    """Altered on the way to either side; masked values have no seal of their own, so spared."""
    phase = Phase(data.draw(st.integers(0, 4)))
    cohort = Cohort().until(phase)
    name = data.draw(st.sampled_from(NAMES))
    flips = data.draw(
        st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)
    )

    def alter(message: bytes) -> bytes:
        altered = bytearray(message)
        for position, bits in flips:
            altered[position % len(altered)] ^= bits
        return bytes(altered)

    try:
        if phase > Phase.ADVERTS and data.draw(st.booleans()):
            cohort.requests = {**cohort.requests, name: alter(cohort.requests[name])}
            cohort.replies(name)
        elif phase != Phase.MASKED:
            cohort.server.receive(name, alter(cohort.replies(name)[0]))
        cohort.until(Phase.DONE)
    except MutiraoError:
        return
    total = np.concatenate([*cohort.server.sum_chunks()])
    assert (total == len(cohort.server.summed) * (np.arange(6) - 3)).all()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_snapshots_are_refused_or_speak_as_before(data):
    cohort = Cohort().until(Phase.MASKED)
    snapshot = bytearray(cohort.sites["north"].snapshot())
    if data.draw(st.booleans()):
        snapshot = snapshot[: data.draw(st.integers(0, len(snapshot) - 1))]
    else:
        position = data.draw(st.integers(0, len(snapshot) - 1))
        snapshot[position] ^= data.draw(st.integers(1, 255))
    codes = np.arange(6) - 3
    try:
        resumed = SiteSession.resume(
            IDENTITIES["north"], KNOWN, bytes(snapshot), codes, policy=POLICY
        )
    except MutiraoError:
        return
    # cut after a whole request: a younger snapshot of the same session
    assert cohort.sites["north"].snapshot().startswith(resumed.snapshot())
