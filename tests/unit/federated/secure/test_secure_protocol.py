"""The whole protocol: exact sums whoever drops out and when, bytes that stay the same."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from secure_cohort import IDENTITIES, KNOWN, STAYS, SmallCohort, draw_codes, make_terms

from mutirao.errors import FederationError, InputError, ProtocolError, UpdateError
from mutirao.federated.secure.fixed_point import FixedPoint
from mutirao.federated.secure.keys import Identity
from mutirao.federated.secure.masks import add_mask
from mutirao.federated.secure.messages import MaskedChunk, unpack_values
from mutirao.federated.secure.register import RoundRegister
from mutirao.federated.secure.server import AggregationServer, Phase
from mutirao.federated.secure.site import SiteSession
from mutirao.federated.secure.terms import CohortPolicy, default_threshold

STOPS = range(STAYS + 1)
"""The phase in which a site falls silent: 0 never advertises … 4 does not reveal, 5 stays."""


def check_pattern(terms, stops: dict[str, int]) -> bool:
    """Play a round; whether it had a sum, which is then compared with the plain one."""
    cohort = SmallCohort(terms)
    enough = [
        sum(stop > phase for stop in stops.values()) >= least
        for phase, least in enumerate([max(3, terms.threshold)] * 3 + [terms.threshold] * 2)
    ]
    if not all(enough):
        with pytest.raises(FederationError, match=r"only \d+ of \d+ sites"):
            cohort.run(stops)
        assert cohort.server.phase == enough.index(False)
        return False
    cohort.run(stops)
    survivors = tuple(name for name in terms.sites if stops[name] > Phase.MASKED)
    assert cohort.server.summed == survivors
    assert cohort.sum() == cohort.plain_sum(survivors)
    return True


def test_all_patterns_of_four_sites():
    terms = make_terms(4, threshold=3, num_values=5)
    patterns = [
        dict(zip(terms.sites, stops, strict=True)) for stops in itertools.product(STOPS, repeat=4)
    ]
    num_exact = sum(check_pattern(terms, pattern) for pattern in patterns)
    assert num_exact == 1 + 4 * 5  # all stay, or one of four stops in one of five phases


def test_all_patterns_of_two_drops_among_five_sites():
    terms = make_terms(5, threshold=3, num_values=5)
    stay = dict.fromkeys(terms.sites, STAYS)
    for pair in itertools.combinations(terms.sites, 2):
        for stops in itertools.product(range(STAYS), repeat=2):
            assert check_pattern(terms, {**stay, **dict(zip(pair, stops, strict=True))})


def test_a_cohort_at_the_threshold_in_every_phase():
    terms = make_terms(10, threshold=6, num_values=5)
    stops = dict(zip(terms.sites, [0, 1, 2, 3, 5, 5, 5, 5, 5, 5], strict=True))
    assert check_pattern(terms, stops)
    assert not check_pattern(terms, {**stops, terms.sites[5]: 4})


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sums_are_exact_for_every_width_and_chunk(data):
    num_sites, bits = data.draw(st.integers(3, 6)), data.draw(st.integers(4, 64))
    most = min((2 ** (bits - 1) - 1) // num_sites, 2**53)
    num_values = data.draw(st.integers(1, 40))
    terms = make_terms(
        num_sites,
        largest_code=max(most, 1),
        modulus_bits=bits,
        num_values=num_values,
        chunk_values=data.draw(st.integers(1, 45)),
    )
    stop = {data.draw(st.sampled_from(terms.sites)): data.draw(st.integers(0, 5))}
    stops = {**dict.fromkeys(terms.sites, STAYS), **(stop if num_sites > 3 else {})}
    cohort = SmallCohort(terms, draw_codes(terms, data.draw(st.integers(0, 99))))
    if sum(value > 0 for value in stops.values()) >= terms.threshold:
        cohort.run(stops)
        assert cohort.sum() == cohort.plain_sum(cohort.server.summed)


def test_floats_go_through_to_half_a_step():
    grid = FixedPoint(clip=0.5, scale=2.0**20)
    terms = make_terms(5, fixed_point=grid, modulus_bits=24, num_values=1000, chunk_values=300)
    rng = np.random.default_rng(0)
    updates = {name: rng.normal(0, 0.05, 1000).astype(np.float32) for name in terms.sites}
    cohort = SmallCohort(terms, {name: grid.encode(u).codes for name, u in updates.items()})
    cohort.run({terms.sites[1]: 2})
    total = grid.decode(np.concatenate([*cohort.server.sum_chunks()]))
    plain = sum(updates[name].astype(np.float64) for name in cohort.server.summed)
    assert np.abs(total - plain).max() <= 4 * 0.5 / grid.scale


# --- hiding ----------------------------------------------------------------------------------


def masked_by(cohort: SmallCohort, name: str) -> np.ndarray:
    """What the server got from one site."""
    number = cohort.terms.number_of(name)
    chunks = [cohort.server._masked[(number, c)] for c in range(cohort.terms.num_chunks)]
    return np.concatenate([unpack_values(chunk, cohort.terms) for chunk in chunks])


def flat_terms(num_sites: int):
    return make_terms(num_sites, num_values=60_000, chunk_values=2**16, threshold=3)


def is_uniform(values: np.ndarray) -> bool:
    octets = values.astype("<u4").view(np.uint8)
    return bool(chisquare(np.bincount(octets, minlength=256)).pvalue > 1e-6)


def test_a_masked_update_cannot_be_predicted_without_the_others():
    """A server with its own view, one colluding site and all seeds still sees noise."""
    terms = flat_terms(4)
    codes = {name: np.zeros(terms.num_values, np.int64) for name in terms.sites}
    target, honest, colluding, _ = terms.sites
    codes[target] += 1000
    cohort = SmallCohort(terms, codes)
    cohort.run(until=Phase.CONSENTS)
    view = masked_by(cohort, target)
    assert is_uniform(view)
    site = cohort.sites[target]
    others = [number for number in range(4) if number != site.number]
    by_peer = dict(zip(others, site._masks[1:], strict=True))
    known = [site._masks[0], by_peer[terms.number_of(colluding)]]
    for mask in known:
        add_mask(view, mask.opposite, 0)
    assert is_uniform(view)  # the pairwise masks with the honest sites still hide it
    add_mask(view, by_peer[terms.number_of(honest)].opposite, 0)
    assert is_uniform(view)  # and one of them alone does
    add_mask(view, by_peer[3].opposite, 0)
    assert (view == 1000).all()  # control: with all of them nothing is hidden


def test_pairwise_keys_of_a_site_do_not_unmask_it_without_its_seed():
    """A site declared dropped whose update came late stays hidden by its self mask."""
    terms = flat_terms(4)
    codes = {name: np.zeros(terms.num_values, np.int64) for name in terms.sites}
    cohort = SmallCohort(terms, codes)
    cohort.run(until=Phase.CONSENTS)
    late = terms.sites[0]
    view = masked_by(cohort, late)
    for mask in cohort.sites[late]._masks[1:]:
        add_mask(view, mask.opposite, 0)
    assert is_uniform(view)
    add_mask(view, cohort.sites[late]._masks[0].opposite, 0)
    assert (view == 0).all()


def test_the_same_update_looks_different_in_every_round():
    first, second = (SmallCohort(flat_terms(4)) for _ in range(2))
    for cohort in (first, second):
        cohort.run(until=Phase.CONSENTS)
    name = first.terms.sites[0]
    assert (first.codes[name] == second.codes[name]).all()
    assert is_uniform(masked_by(first, name) - masked_by(second, name))


# --- the same bytes --------------------------------------------------------------------------


def test_a_site_says_the_same_again():
    cohort = SmallCohort(make_terms(4))
    requests = cohort.server.invite()
    name = cohort.terms.sites[0]
    while cohort.server.phase < Phase.DONE:
        once, again = (cohort.answer(name, requests[name]) for _ in range(2))
        assert [*once] == [*again]
        for reply in once:  # the server takes what comes twice as the same
            cohort.server.receive(name, reply)
        requests = cohort.step(requests)
    assert cohort.sum() == cohort.plain_sum(cohort.terms.sites)


def resumed(cohort: SmallCohort, name: str, codes=None) -> SiteSession:
    return SiteSession.resume(
        IDENTITIES[name],
        KNOWN,
        cohort.sites[name].snapshot(),
        cohort.codes[name] if codes is None else codes,
        policy=cohort.policy,
    )


def test_sites_that_die_in_every_phase_go_on_with_the_same_bytes():
    cohort = SmallCohort(make_terms(4))
    requests = cohort.server.invite()
    while cohort.server.phase < Phase.DONE:
        before = {name: [*cohort.answer(name, requests[name])] for name in requests}
        cohort.sites = {name: resumed(cohort, name) for name in requests}
        assert before == {name: [*cohort.answer(name, requests[name])] for name in requests}
        requests = cohort.step(requests)
    assert cohort.sum() == cohort.plain_sum(cohort.terms.sites)


def test_another_update_is_not_masked_with_the_same_keys():
    cohort = SmallCohort(make_terms(4))
    cohort.run(until=Phase.CONSENTS)
    name = cohort.terms.sites[0]
    with pytest.raises(UpdateError, match="another update"):
        resumed(cohort, name, cohort.codes[name] // 2)
    cohort.codes[name][5] ^= 1
    with pytest.raises(UpdateError, match="changed during the round"):
        cohort.sites[name].masked_chunk(1)


def test_a_register_has_one_session_for_a_round():
    terms = make_terms(4)
    name = terms.sites[0]
    codes = draw_codes(terms)[name]
    register = RoundRegister(IDENTITIES[name], KNOWN, policy=CohortPolicy(max_colluding=0))
    session = register.open(terms.to_bytes(), codes)
    assert register.open(terms.to_bytes(), codes.astype(np.int32)) is session
    with pytest.raises(UpdateError, match="another update already"):
        register.open(terms.to_bytes(), codes // 2)
    with pytest.raises(ProtocolError, match="a second time with other terms"):
        register.open(make_terms(4, chunk_values=5).to_bytes(), codes)
    assert register.open(make_terms(4, round_number=2).to_bytes(), codes) is not session
    with pytest.raises(ProtocolError, match="open already"):
        register.restore(session.snapshot(), codes)
    fresh = RoundRegister(IDENTITIES[name], KNOWN, policy=CohortPolicy(max_colluding=0))
    assert fresh.restore(session.snapshot(), codes).advertise() == session.advertise()


def test_the_server_gives_the_same_sum_from_a_journal_of_what_it_got():
    cohort = SmallCohort(make_terms(4))
    copy, requests = AggregationServer(cohort.terms, KNOWN), cohort.server.invite()
    while cohort.server.phase < Phase.DONE:
        for name, request in requests.items():
            for reply in cohort.answer(name, request):
                copy.receive(name, reply)
        requests = cohort.step(requests)
        assert copy.advance() == requests
    assert [int(v) for chunk in copy.sum_chunks() for v in chunk] == cohort.sum()


# --- what sites and servers insist on --------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1}, r"threshold=1 \(expected 2 to 5\)"),
        ({"threshold": 6}, r"threshold=6"),
        ({"modulus_bits": 65}, r"modulus_bits=65 \(expected 2 to 64\)"),
        ({"modulus_bits": 13}, r"could overflow: 5 sites"),
        ({"num_values": 0}, r"num_values=0"),
        ({"num_values": 2**35 + 1}, r"num_values="),
        ({"num_values": 2**34, "chunk_values": 1}, r"number of chunks="),
        ({"chunk_values": 2**23}, r"chunk_values="),
        ({"round_number": 0}, r"round_number=0"),
        ({"run_id": b"short"}, r"run_id has 5 bytes"),
        ({"sites": ("a",)}, r"number of sites=1"),
        ({"sites": ("b", "a", "c")}, r"twice or unsorted"),
        ({"sites": ("a", "a", "b")}, r"twice or unsorted"),
        ({"sites": ("a", "b\n", "c")}, r"site name 'b\\n'"),
    ],
)
def test_terms_that_cannot_work_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_terms(5, **changes)


@pytest.mark.parametrize(
    ("num_sites", "threshold", "policy", "message"),
    [
        (2, 2, {}, r"name 2 sites \(expected at least min_cohort=3\)"),
        (4, 4, {"min_cohort": 5}, r"at least min_cohort=5"),
        (5, 3, {}, r"threshold 3 for 5 sites; with max_colluding=1 it must be at least 4"),
        (4, 2, {"max_colluding": 0}, r"must be at least 3"),
    ],
)
def test_a_site_refuses_terms_that_are_too_weak(num_sites, threshold, policy, message):
    terms = make_terms(num_sites, threshold=threshold)
    name = terms.sites[0]
    with pytest.raises(ProtocolError, match=message):
        SiteSession(
            IDENTITIES[name],
            KNOWN,
            terms.to_bytes(),
            draw_codes(terms)[name],
            policy=CohortPolicy(**policy),
        )


@pytest.mark.parametrize("num_sites", range(3, 60))
def test_the_default_threshold_bears_a_third_that_colludes(num_sites):
    threshold, num_colluding = default_threshold(num_sites), (num_sites - 1) // 3
    assert 2 * threshold > num_sites + num_colluding
    assert threshold <= num_sites
    policy = CohortPolicy(max_colluding=num_colluding)
    names = tuple(sorted(f"s{number}" for number in range(num_sites)))
    policy.check(make_terms(sites=names, threshold=threshold), dict.fromkeys(names, b""))


def test_unknown_sites_are_refused_by_name():
    terms, name = make_terms(4), "north"
    known = {each: key for each, key in KNOWN.items() if each != "south"}
    with pytest.raises(ProtocolError, match="site south, whose identity is not known"):
        SiteSession(IDENTITIES[name], known, terms.to_bytes(), draw_codes(terms)[name])
    with pytest.raises(InputError, match="identity of site south is not known"):
        AggregationServer(terms, known)
    stranger = Identity.generate("moon")
    with pytest.raises(ProtocolError, match="site moon is not among the sites"):
        SiteSession(stranger, KNOWN, terms.to_bytes(), draw_codes(terms)[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: codes[:-1], r"shape \(9,\)"),
        (lambda codes: codes.reshape(2, 5), r"shape \(2, 5\)"),
        (lambda codes: codes.astype(np.float64), "float64"),
        (lambda codes: codes.astype(np.uint64), "uint64"),
        (lambda codes: codes + 1, r"beyond ± 1000"),
        (lambda codes: codes - 1, r"beyond ± 1000"),
    ],
)
def test_an_update_that_does_not_fit_does_not_leave(change, message):
    terms = make_terms(4)
    name = terms.sites[0]
    with pytest.raises(UpdateError, match=message):
        SiteSession(IDENTITIES[name], KNOWN, terms.to_bytes(), change(draw_codes(terms)[name]))


def test_the_sum_waits_for_the_last_phase():
    cohort = SmallCohort(make_terms(3))
    cohort.run(until=Phase.REVEALS)
    with pytest.raises(FederationError, match="not known before"):
        cohort.server.sum_chunks()
    with pytest.raises(FederationError, match="not known before"):
        _ = cohort.server.summed
    assert cohort.server.answered() == ()
    cohort = SmallCohort(make_terms(3))
    cohort.run()
    with pytest.raises(FederationError, match="is over"):
        cohort.server.advance()


def test_one_may_wait_for_more_after_too_few():
    cohort = SmallCohort(make_terms(3))
    late = cohort.terms.sites[2]
    with pytest.raises(FederationError, match=f"only 2 of 3 sites advertised .*missing: {late}"):
        cohort.step(cohort.server.invite(), silent=[late])
    cohort.server.receive(late, cohort.sites[late].advertise())
    requests = cohort.server.advance()
    while cohort.server.phase < Phase.DONE:
        requests = cohort.step(requests)
    assert cohort.sum() == cohort.plain_sum(cohort.terms.sites)


# --- costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_sites", "bits", "num_values"), [(3, 32, 1000), (10, 23, 5000)])
def test_bytes_are_those_of_the_documentation(num_sites, bits, num_values):
    """The table of docs/explanation/secure-aggregation.md."""
    terms = make_terms(num_sites, modulus_bits=bits, num_values=num_values, chunk_values=512)
    cohort = SmallCohort(terms)
    cohort.run()
    header = 38
    masked = num_values * -(-bits // 8) + terms.num_chunks * (header + 6)
    sent = (header + 130) + (header + 36 + 148 * num_sites) + (header + 66)
    sent += header + 6 + 35 * num_sites
    assert set(cohort.sent_bytes.values()) == {sent + masked}
    assert sent == 390 + 183 * num_sites
    names = sum(len(name) + 1 for name in terms.sites)
    received = (header + 69 + names) + (header + 2 + 130 * num_sites)
    received += (header + 4 + 148 * num_sites) + (header + 4 + 2 * num_sites)
    received += header + 6 + 68 * num_sites
    assert set(cohort.received_bytes.values()) == {received}
    assert received == 275 + 348 * num_sites + names


def test_a_long_update_is_masked_in_little_memory(tmp_path):
    """A memory map of 32 MB of codes; what Python and numpy allocate stays below 4 chunks."""
    import tracemalloc

    terms = make_terms(3, num_values=4_000_000, chunk_values=2**16)
    codes = np.memmap(tmp_path / "codes", np.int64, "w+", shape=(terms.num_values,))
    codes[:] = 7
    cohort = SmallCohort(terms, dict.fromkeys(terms.sites, codes))
    requests = cohort.run(until=Phase.MASKED)
    name = terms.sites[0]
    tracemalloc.start()
    num_bytes = sum(len(chunk) for chunk in cohort.sites[name].mask_input(requests[name]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_bytes > 16_000_000
    assert peak < 4 * 2**16 * 8


def test_chunks_can_be_kept_elsewhere_than_in_memory():
    kept: dict[tuple[int, int], bytes] = {}
    cohort = SmallCohort(make_terms(4))
    cohort.server = AggregationServer(cohort.terms, KNOWN, masked=kept)
    cohort.run({cohort.terms.sites[1]: Phase.MASKED})
    assert {number for number, _ in kept} == {0, 2, 3}
    assert cohort.sum() == cohort.plain_sum(cohort.server.summed)


def test_the_protocol_needs_no_framework():
    code = (
        "import sys, mutirao.federated.secure.server, mutirao.federated.secure.register; "
        "print([m for m in ('torch', 'flwr', 'transformers', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_masked_chunk_has_as_many_bytes_as_the_modulus_needs():
    terms = make_terms(3, modulus_bits=20, num_values=4)
    cohort = SmallCohort(terms)
    requests = cohort.run(until=Phase.MASKED)
    name = terms.sites[0]
    [chunk] = cohort.sites[name].mask_input(requests[name])
    assert len(MaskedChunk.from_bytes(chunk, terms).packed) == 4 * 3
