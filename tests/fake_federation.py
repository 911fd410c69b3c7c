"""Sites that need no model: an update follows from site, round and state alone.

``FakeSite`` answers as a real one does, journal included, so that a coordinator may die and
come back; ``FakeNetwork`` loses, delays and forges what it is told to, on a clock of its own.
"""

import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mutirao.federated.codec import CodecConfig, decode_tensor, decode_tensors, encode_tensors
from mutirao.federated.codec.layout import FORMATS
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.coordinator.rounds import run_rounds
from mutirao.federated.identity import public_hex
from mutirao.federated.messages import (
    DoneAnswer,
    EvaluateRequest,
    FinishRequest,
    LossesAnswer,
    Refusal,
    SecureAnswer,
    SecureRequest,
    TrainRequest,
    UpdateAnswer,
    payload_tensors,
    read_fields,
    tensor_payloads,
)
from mutirao.federated.network import Lost
from mutirao.federated.parcel import COORDINATOR, Parcel
from mutirao.federated.plan import Coordinator, FederatedConfig, Plan, SecureConfig
from mutirao.federated.secure.keys import Identity
from mutirao.federated.secure.site import SiteSession
from mutirao.federated.secure.terms import CohortPolicy, RoundTerms
from mutirao.federated.site.replica import add_change, hash_tensors

SHAPES = {"b.weight": (3, 7), "a.weight": (11,), "c.bias": ()}
NAMES = ("north", "south", "east", "west")
KEYS = {
    name: Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"."))
    for name in (*NAMES, *(f"s{i:02d}" for i in range(32)))
}
RUN_ID = "ab" * 32


def make_start(shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in sorted(shapes.items())}


def make_coordinator(work, *, sites=NAMES, start=None, plan=None, **federated):
    settings = {"num_rounds": 3, "round_timeout_s": 60.0, "connect_timeout_s": 20.0, **federated}
    plan = plan or Plan(
        model_sha256="0" * 64, frozen_sha256="1" * 64, federated=FederatedConfig(**settings)
    )
    keys = {name: public_hex(KEYS[name]) for name in sites}
    journal = CoordinatorJournal(work)
    if not journal.has_start():
        start = make_start() if start is None else start
        shapes = {name: values.shape for name, values in start.items()}
        journal.write_start(shapes, lambda name: start[name], plan.federated.outer)
    return Coordinator(plan=plan, sites=keys, work=work, run_id=RUN_ID)


def secure_config(**changes):
    return {
        "secure": SecureConfig(clip=1.0, value_bits=16, **changes),
        "weighting": "equal",
    }


class FakeSite:
    """One site, which keeps its state, its sessions and its answers whatever happens."""

    def __init__(self, name, cohort=NAMES, shapes=SHAPES):
        self.name, self.cohort, self.shapes = name, cohort, shapes
        self.key = KEYS[name]
        self.num_tokens = 100 + 10 * sorted(KEYS).index(name)
        self.replica = None
        self.trained = {}
        self.sessions = {}
        self.answers = {}
        self.num_trained = 0
        self.asked = []

    def answer(self, request):
        assert request.sender == COORDINATOR
        self.asked.append(request)
        if request.sha256 not in self.answers:
            answer = getattr(self, f"_{request.kind}")(request)
            self.answers[request.sha256] = Parcel.from_bytes(answer.to_bytes())
        return self.answers[request.sha256]

    def sign(self, kind, request, fields, payloads=None):
        return Parcel(
            kind=kind,
            run=request.run,
            round=request.round,
            sender=self.name,
            fields=fields.model_dump(mode="json"),
            payloads=payloads or {},
        ).signed(self.key)

    def receive_state(self, request, fields):
        """Take over a state, or None where the state it is based on is not here."""
        state, plan = fields.state, fields.plan
        payloads = payload_tensors(request)
        if self.replica is not None and hash_tensors(self.replica) == state.state_sha256:
            return self.replica
        if state.form == "whole":
            codec = CodecConfig(format=FORMATS[next(iter(payloads.values()))[3]])
            self.replica = decode_tensors(payloads, self.shapes, codec)
        elif self.replica is not None and hash_tensors(self.replica) == state.based_on:
            sizes = {name: values.shape for name, values in self.replica.items()}
            change = decode_tensors(payloads, sizes, plan.federated.download)
            self.replica = add_change(self.replica, change)
        else:
            return None
        assert hash_tensors(self.replica) == state.state_sha256
        return self.replica

    def refuse(self, request, reason, sentence="no"):
        fields = Refusal(request_sha256=request.sha256, reason=reason, sentence=sentence)
        return self.sign("refusal", request, fields)

    def draw_update(self, request):
        """What training gives: noise of this site and round, and a pull of the state to zero."""
        seed = [request.round, *self.name.encode()]
        rng = np.random.default_rng(seed)
        return {
            name: (rng.normal(scale=0.1, size=values.shape) - 0.1 * values).astype(np.float32)
            for name, values in sorted(self.replica.items())
        }

    def update_fields(self, request, fields):
        self.num_trained += 1
        return UpdateAnswer(
            request_sha256=request.sha256,
            state_sha256=fields.state.state_sha256,
            num_tokens=self.num_tokens,
            num_steps=3,
            train_loss=2.0,
            seconds=0.5,
        )

    def _train(self, request):
        fields = read_fields(TrainRequest, request)
        if self.receive_state(request, fields) is None:
            return self.refuse(request, "needs_state")
        update = self.draw_update(request)
        self.trained[request.round] = update
        answer = self.update_fields(request, fields)
        if fields.plan.federated.secure is None:
            payloads = encode_tensors(update, fields.plan.federated.upload)
            return self.sign("update", request, answer, tensor_payloads(payloads))
        invitation = request.payloads["terms"].tobytes()
        terms = RoundTerms.from_bytes(invitation)
        vector = np.concatenate([update[name].reshape(-1) for name in sorted(update)])
        identities = {name: KEYS[name].public_key().public_bytes_raw() for name in self.cohort}
        assert request.round not in self.sessions, "a second update in one round"
        session = SiteSession(
            Identity(self.name, self.key),
            identities,
            invitation,
            terms.fixed_point.encode(vector).codes,
            policy=CohortPolicy(max_colluding=0),
        )
        self.sessions[request.round] = session
        return self.sign("ready", request, answer, {"advert": _bytes(session.advertise())})

    def _secure(self, request):
        fields = read_fields(SecureRequest, request)
        session, message = self.sessions[request.round], request.payloads["message"].tobytes()
        answer = SecureAnswer(request_sha256=request.sha256, step=fields.step)
        if fields.step == "mask":
            chunks = enumerate(session.mask_input(message))
            payloads = {f"chunk/{number}": _bytes(chunk) for number, chunk in chunks}
            return self.sign("secure", request, answer, payloads)
        step = {
            "share_keys": session.share_keys,
            "survivors": session.sign_survivors,
            "unmask": session.unmask,
        }[fields.step]
        return self.sign("secure", request, answer, {"message": _bytes(step(message))})

    def _evaluate(self, request):
        """The loss is the mean square of the state, so that it can be computed elsewhere."""
        fields = read_fields(EvaluateRequest, request)
        state = self.replica
        if fields.state.form == "change":
            assert hash_tensors(state) == fields.state.based_on
            change = {
                name: decode_tensor(
                    name, payload, state[name].shape, fields.plan.federated.download
                )
                for name, payload in payload_tensors(request).items()
            }
            state = add_change(state, change)
        assert hash_tensors(state) == fields.state.state_sha256
        answer = LossesAnswer(
            request_sha256=request.sha256,
            label=fields.label,
            loss=mean_square(state) + 0.01 * len(self.name),
            num_tokens=50,
        )
        return self.sign("losses", request, answer)

    def _finish(self, request):
        fields = read_fields(FinishRequest, request)
        if self.receive_state(request, fields) is None:
            return self.refuse(request, "needs_state")
        return self.sign("done", request, DoneAnswer(request_sha256=request.sha256))


def mean_square(state):
    total = sum(float(np.square(values, dtype=np.float64).sum()) for values in state.values())
    return total / sum(values.size for values in state.values())


def _bytes(data):
    return np.frombuffer(data, np.uint8)


class FakeNetwork:
    """Delivers answers in an order of its own; ``distort`` may change, delay or drop each.

    Args:
        sites: by name.
        distort: (site, request, answer, network) -> what arrives: None for nothing, or a list.
        order: draws who answers next; None for first asked, first answered.
    """

    def __init__(self, sites, distort=None, order=None):
        self.sites, self.distort, self.order = dict(sites), distort, order
        self.now = 0.0
        self.down = set()
        self.waiting = []
        self.arrived = []

    def clock(self):
        return self.now

    def reachable(self):
        return set(self.sites) - self.down

    def send(self, site, request):
        self.waiting = [(name, each) for name, each in self.waiting if name != site]
        self.waiting.append((site, request))

    def receive(self, timeout_s):
        if not self.arrived and self.waiting:
            place = 0 if self.order is None else int(self.order.integers(len(self.waiting)))
            site, request = self.waiting.pop(place)
            if site in self.down:
                self.arrived.append(Lost(site, "the line is dead"))
            else:
                answer = self.sites[site].answer(request)
                came = [answer]
                if self.distort is not None:
                    came = self.distort(site, request, answer, self)
                self.arrived += came if isinstance(came, list) else [came]
        if self.arrived:
            self.now += 0.1
            return self.arrived.pop(0)
        self.now += timeout_s
        return None


def run(coordinator, network, **options):
    return run_rounds(coordinator, network, clock=network.clock, **options)


class KilledError(BaseException):
    """A process dies here."""


def check_death_at_each_write(monkeypatch, make):
    """Cut a run at each of its writes to disk: begun again, it ends at the same bytes.

    Args:
        monkeypatch: pytest's.
        make: name of a new folder -> coordinator and sites.
    """
    replace_file = os.replace
    coordinator, sites = make("whole")
    writes = []
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *names: (writes.append(names), replace_file(*names)))
        run(coordinator, FakeNetwork(sites))
    expected = final_bytes(coordinator.work)
    for place in range(len(writes)):
        coordinator, sites = make(str(place))
        seen = []

        def die(source, target, seen=seen, place=place):
            seen.append(target)
            if len(seen) == place + 1:
                raise KilledError
            replace_file(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", die)
            with pytest.raises(KilledError):
                run(coordinator, FakeNetwork(sites))
        run(coordinator, FakeNetwork(sites))
        assert final_bytes(coordinator.work) == expected, seen[-1]


def final_bytes(work):
    """All that a finished run leaves as its states, by relative path."""
    return {
        str(path.relative_to(work)): path.read_bytes()
        for path in sorted((work / "state").rglob("*.safetensors"))
    }
