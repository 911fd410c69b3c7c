"""A site as the coordinator meets it: a request in, a signed answer out.

``SiteWorker`` lives as long as its process and keeps the model loaded from round to round;
everything that must outlive it is in the journal. A request is answered in this order:

    who asks        the coordinator's signature
    may it          the site's policy
    again?          the journal has the answer: the same bytes leave
    from where      the state that the request leads to is taken and kept
    work            training, evaluation, or a step of secure aggregation
    keep            optimizer, residuals, session; the answer last
    let it out      the gate writes the audit log

Nothing that comes can raise out of here: what cannot be done is answered by a signed refusal with
one sentence. Knows nothing of how parcels travel.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from mutirao.config import Config
from mutirao.errors import FederationError, MutiraoError, RankLostError
from mutirao.federated.aggregation.compatibility import check_plan
from mutirao.federated.codec import Payload
from mutirao.federated.identity import open_identity
from mutirao.federated.messages import (
    DoneAnswer,
    EvaluateRequest,
    FinishRequest,
    LossesAnswer,
    Reason,
    Refusal,
    SecureAnswer,
    SecureRequest,
    StateFields,
    TrainRequest,
    UpdateAnswer,
    payload_tensors,
    printable,
    read_fields,
    tensor_payloads,
)
from mutirao.federated.parcel import COORDINATOR, Parcel
from mutirao.federated.plan import RUN_ID, Plan, Site
from mutirao.federated.secure.terms import MAX_SITES, RoundTerms
from mutirao.federated.site.gate import IDENTITY_FOLDER, Gate
from mutirao.federated.site.journal import Progress, RunJournal, SiteJournal
from mutirao.federated.site.local_round import (
    LocalUpdate,
    base_round,
    encode_update,
    noise_after,
    train_update,
)
from mutirao.federated.site.models import ModelCache, take_turn
from mutirao.federated.site.ranks import MAX_LOSSES
from mutirao.federated.site.refusal import Refused, explain, plan_of
from mutirao.federated.site.session import ADVERT, MESSAGE, SecureRounds
from mutirao.federated.site.state import NO_BASIS, State, has_basis, take_state
from mutirao.federated.site.trainer import LocalTrainer

_MAX_NAME = 64


class SiteWorker:
    """One site, ready to answer.

    Args:
        site: who and where.
        public_models: models that it shares with other sites of this process; None for its own.

    Raises:
        InputError: the site's key or its list of identities is not usable.
    """

    def __init__(self, site: Site, *, public_models: ModelCache | None = None) -> None:
        self.site = site
        self._key = open_identity(site.work / IDENTITY_FOLDER)
        self._journal = SiteJournal(site.work)
        self._cache = ModelCache() if public_models is None else public_models
        self._secure = SecureRounds(site, self._key)
        self._lock = threading.Lock()

    def answer(self, request: Parcel) -> Parcel:
        """Answer a request, whatever it is; the same request gets the same bytes."""
        with self._lock:
            started = time.monotonic()
            try:
                answer = self._answer(request)
            except Exception as error:
                return self._refuse(request, error)
            self._journal.log(
                event="left the site",
                kind=answer.kind,
                round=answer.round,
                bytes_received=request.num_bytes,
                bytes_sent=answer.num_bytes,
                sha256=answer.sha256,
                seconds=round(time.monotonic() - started, 3),
            )
            return answer

    def _answer(self, request: Parcel) -> Parcel:
        if request.sender != COORDINATOR:
            raise Refused("policy", "a request came that is not in the coordinator's name")
        key = self.site.coordinator_key
        if key is not None and not request.is_signed_by(key):
            raise Refused(
                "policy", "a request came that the coordinator known to this site did not sign"
            )
        run = self._journal.run(request.run)
        acts: dict[str, Callable[[Parcel, RunJournal], Parcel]] = {
            "hello": self._hello,
            "train": self._train,
            "secure": self._secure_step,
            "evaluate": self._evaluate,
            "finish": self._finish,
        }
        if (act := acts.get(request.kind)) is None:
            kind = printable(request.kind)[:_MAX_NAME]
            raise FederationError(f"{kind!r} is no request (expected one of {', '.join(acts)})")
        return act(request, run)

    def _hello(self, request: Parcel, run: RunJournal) -> Parcel:
        return self._signed(request, "hello", DoneAnswer(request_sha256=request.sha256))

    def _train(self, request: Parcel, run: RunJournal) -> Parcel:
        fields = read_fields(TrainRequest, request)
        plan, gate = fields.plan, Gate(self.site)
        _check_round(plan, request)
        terms = self._secure.read_terms(plan, request) if plan.federated.secure else None
        mask = self._secure.mask(terms, gate.policy) if terms else None
        kept = run.read_answer(request.round, request.sha256)
        steps = plan.federated.privacy.steps_per_round if plan.federated.privacy else 0
        noise = noise_after(plan, run, more_steps=0 if kept else steps)
        described = gate.describe_update(plan, request, mask=mask, noise=noise)
        gate.admit(described)
        if kept is None:
            check_plan(plan, MAX_SITES)
            run.begin(plan)
            if run.last_round() > request.round:
                raise Refused(
                    "stale",
                    f"round {request.round} was asked for after round {run.last_round()} of this "
                    "run; begin a new run to train again",
                )
            kept = self._make_update(request, run, fields, terms, gate)
            described = gate.describe_update(
                plan, request, mask=mask, noise=noise_after(plan, run, more_steps=0)
            )
        control = "keys of the round; training tokens, losses and seconds" if terms else ""
        names = run.state_names() if terms else tuple(payload_tensors(kept))
        gate.release(described, kept, names, control=control)
        return kept

    def _make_update(
        self,
        request: Parcel,
        run: RunJournal,
        fields: TrainRequest,
        terms: RoundTerms | None,
        gate: Gate,
    ) -> Parcel:
        """Train, keep what the next round needs, and keep the answer."""
        plan, state_sha256 = fields.plan, fields.state.state_sha256
        base = base_round(run, request.round, fields.last_counted)
        if terms and (found := self._secure.kept(run, terms, gate.policy, state_sha256)):
            return self._keep_update(request, run, "ready", *found, state_sha256, base)
        with self._trainer(request, plan, run, fields.state, keep=True) as (trainer, state):
            if terms:
                self._secure.read_terms(plan, request, _count_values(trainer))
            update = self._train_update(trainer, run, request.round, state, base)
            if terms is None:
                payloads = encode_update(trainer, run, request.round, update.tensors, base)
                return self._keep_update(
                    request, run, "update", payloads, update.numbers, state_sha256, base
                )
        begun = self._secure.begin(
            run, terms, gate.policy, state_sha256, update.tensors, update.numbers
        )
        return self._keep_update(request, run, "ready", *begun, state_sha256, base)

    def _train_update(
        self, trainer: LocalTrainer, run: RunJournal, number: int, state: State, base: int
    ) -> LocalUpdate:
        """Train, anew from what is kept where a process that shares the work was lost."""
        progress = Progress(self._journal, number)
        sentence = ""
        for _ in range(MAX_LOSSES):
            try:
                return train_update(trainer, run, number, state, progress, base)
            except RankLostError as error:
                sentence = str(error)
                self._journal.log(event="lost a rank", round=number, sentence=sentence)
        raise FederationError(
            f"of the {self.site.num_processes} processes that share the training one was lost "
            f"{MAX_LOSSES} times in round {number} (the last time: {sentence})"
        )

    def _keep_update(
        self,
        request: Parcel,
        run: RunJournal,
        kind: str,
        content: Mapping[str, Payload] | bytes,
        numbers: Mapping[str, Any],
        state_sha256: str,
        base: int,
    ) -> Parcel:
        """Sign the answer to a training request, and keep it, with the round it goes on from."""
        if isinstance(content, bytes):
            payloads = {ADVERT: np.frombuffer(content, np.uint8)}
        else:
            payloads = tensor_payloads(dict(content))
        fields = UpdateAnswer(request_sha256=request.sha256, state_sha256=state_sha256, **numbers)
        answer = self._signed(request, kind, fields, payloads)
        run.write_update(request.round, request.sha256, answer, base=base)
        return answer

    def _secure_step(self, request: Parcel, run: RunJournal) -> Parcel:
        fields = read_fields(SecureRequest, request)
        plan, gate = fields.plan, Gate(self.site)
        run.begin(plan)
        terms = self._secure.terms_of(run, request.round, gate.policy)
        described = gate.describe_update(
            plan,
            request,
            mask=self._secure.mask(terms, gate.policy),
            noise=noise_after(plan, run, more_steps=0),
        )
        gate.admit(described)
        if MESSAGE not in request.payloads:
            raise FederationError("a step of secure aggregation came without its message")
        message = request.payloads[MESSAGE].tobytes()
        payloads = self._secure.answer(run, request.round, gate.policy, fields.step, message)
        answer = self._signed(
            request,
            "secure",
            SecureAnswer(request_sha256=request.sha256, step=fields.step),
            payloads,
        )
        control = "" if fields.step == "mask" else fields.step.replace("_", " ")
        gate.release(described, answer, run.state_names(), control=control)
        return answer

    def _evaluate(self, request: Parcel, run: RunJournal) -> Parcel:
        fields = read_fields(EvaluateRequest, request)
        plan, gate = fields.plan, Gate(self.site)
        label = printable(fields.label)
        described = gate.describe_losses(plan, request, label)
        gate.admit(described)
        if plan.federated.privacy is not None:
            raise Refused("policy", "losses are not told where differential privacy is agreed")
        answer = run.read_answer(request.round, request.sha256)
        if answer is None:
            run.begin(plan)
            with self._trainer(request, plan, run, fields.state, keep=False) as (trainer, state):
                trainer.start_round(state, request.round)
                measured = trainer.evaluate(fields.max_tokens)
            if measured is None:
                raise FederationError("this site has no held-out text to measure a model on")
            loss, num_tokens = measured
            answer = self._signed(
                request,
                "losses",
                LossesAnswer(
                    request_sha256=request.sha256,
                    label=fields.label,
                    loss=loss,
                    num_tokens=num_tokens,
                ),
            )
            run.write_measured(request.round, request.sha256, answer)
        gate.release(described, answer, ())
        return answer

    def _finish(self, request: Parcel, run: RunJournal) -> Parcel:
        fields = read_fields(FinishRequest, request)
        run.begin(fields.plan)
        with self._trainer(request, fields.plan, run, fields.state, keep=True):
            pass
        return self._signed(request, "done", DoneAnswer(request_sha256=request.sha256))

    @contextmanager
    def _trainer(
        self, request: Parcel, plan: Plan, run: RunJournal, fields: StateFields, *, keep: bool
    ) -> Iterator[tuple[LocalTrainer, State]]:
        """Hold the model, and the state that a request leads to; keep that where it is new."""
        held = run.read_replica()
        if not has_basis(fields, held):  # before a model is loaded
            raise Refused("needs_state", NO_BASIS)
        with take_turn(self.site), self._cache.lock:
            try:
                trainer = LocalTrainer(self.site, plan, self._cache)
                state = take_state(request, fields, held, plan, trainer.shapes)
                if keep and (held is None or held[0] != fields.state_sha256):
                    run.write_replica(state)
                yield trainer, state
            finally:
                if self.site.turn is not None:
                    self._cache.clear()

    def _signed(
        self,
        request: Parcel,
        kind: str,
        fields: Config,
        payloads: Mapping[str, Payload] | None = None,
    ) -> Parcel:
        return Parcel(
            kind=kind,
            run=request.run if RUN_ID.fullmatch(request.run) else "",
            round=request.round,
            sender=self.site.name,
            fields=fields.model_dump(mode="json"),
            payloads=payloads or {},
        ).signed(self._key)

    def _refuse(self, request: Parcel, error: Exception) -> Parcel:
        """Return a signed refusal; what may not be told stays in the site's own log."""
        reason, sentence = explain(self.site.name, error)
        plan = plan_of(request)
        try:
            if not isinstance(error, MutiraoError):
                self._journal.log(
                    event="failed",
                    round=request.round,
                    traceback="".join(traceback.format_exception(error)),
                )
            answer = self._refusal(request, reason, sentence)
            Gate(self.site).release_error(plan, answer, sentence)
            self._journal.log(event="refused", round=request.round, sentence=sentence)
        except Exception:
            with suppress(Exception):  # the disk may be full, which is why we are here
                self._journal.log(event="failed", traceback=traceback.format_exc())
            return self._refusal(
                request,
                "failed",
                f"site {self.site.name} could not write its audit log, so nothing but this "
                "sentence leaves it",
            )
        return answer

    def _refusal(self, request: Parcel, reason: Reason, sentence: str) -> Parcel:
        fields = Refusal(request_sha256=request.sha256, reason=reason, sentence=sentence)
        return self._signed(request, "refusal", fields)


def _check_round(plan: Plan, request: Parcel) -> None:
    if not 1 <= request.round <= plan.federated.num_rounds:
        raise FederationError(
            f"round {request.round} was asked for (expected 1 to {plan.federated.num_rounds})"
        )


def _count_values(trainer: LocalTrainer) -> int:
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in trainer.shapes.values())
