"""Rounds of every rule for adapters with real sites: the mean is the true one, to the end."""

from collections import deque

import numpy as np
import pytest
import torch
from tiny_sites import FEDERATED, LORA, RUN, TRAIN, make_model, make_silo, make_site

from mutirao.federated.aggregation.low_rank_state import (
    shapes_at_rank,
    split_state,
    start_adapter,
)
from mutirao.federated.aggregation.updates import ParcelFile
from mutirao.federated.codec import CodecConfig, decode_tensors
from mutirao.federated.coordinator.adapter import write_result, write_start
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.coordinator.next_low_rank import trained_shapes
from mutirao.federated.coordinator.rounds import run_rounds
from mutirao.federated.identity import open_identity, public_hex
from mutirao.federated.messages import TENSOR_PREFIX
from mutirao.federated.plan import Coordinator
from mutirao.federated.site.models import ModelCache
from mutirao.federated.site.worker import SiteWorker

FLOAT32 = CodecConfig(format="fp32")
BOTH = LORA.model_copy(update={"freeze_a": False})


class Loopback:
    """Sites in this process, which answer at once."""

    def __init__(self, workers):
        self.workers, self.answers, self.forms = workers, deque(), []

    def reachable(self):
        return set(self.workers)

    def send(self, site, request):
        self.forms.append((request.round, request.fields["state"]["form"]))
        self.answers.append(self.workers[site].answer(request))

    def receive(self, timeout_s):
        return self.answers.popleft() if self.answers else None


@pytest.fixture(scope="module")
def model(tiny_model_directory, tmp_path_factory):
    return make_model(tiny_model_directory, tmp_path_factory.mktemp("low-rank") / "model")


def _federate(folder, model, rule, ranks, *, num_rounds=3):
    config = FEDERATED.model_copy(
        update={
            "aggregation": rule,
            "num_rounds": num_rounds,
            "keeps_optimizer": False,
            "upload": FLOAT32,
            "download": FLOAT32,
        }
    )
    work = folder / "coordinator"
    plan = write_start(model, work, config, BOTH, TRAIN, 0)
    sites = {
        name: make_site(
            folder, model, make_silo(folder / f"{name}-data", seed=number), name, rank=rank
        )
        for number, (name, rank) in enumerate(ranks.items())
    }
    keys = {n: public_hex(open_identity(each.work / "identity")) for n, each in sites.items()}
    coordinator = Coordinator(plan=plan, sites=keys, work=work, run_id=RUN)
    cache = ModelCache()
    network = Loopback({n: SiteWorker(each, public_models=cache) for n, each in sites.items()})
    records = run_rounds(coordinator, network)
    return plan, CoordinatorJournal(work), records, network


def _state(journal, number):
    file = journal.open_state(number, "replica")
    return {name: file.read(name) for name in file.names}


def _product(tensors, module, scale):
    b = tensors[f"{module}.lora_B.default.weight"].astype("f8")
    return scale * b @ tensors[f"{module}.lora_A.default.weight"].astype("f8")


def _effect(state, module, scale):
    """What a state adds to a layer's weight."""
    adapter, history = split_state(state)
    total = _product(adapter, module, scale) if adapter else 0.0
    if module in history:
        total = total + history[module].b.astype("f8") @ history[module].a.astype("f8")
    return total


@pytest.mark.parametrize(
    ("rule", "ranks"),
    [
        ("stacked", {"north": None, "south": 3, "west": 1}),
        ("fedex", {"north": None, "south": None}),
        ("separate", {"north": None, "south": None}),
    ],
)
def test_each_round_adds_the_mean_of_what_the_sites_trained(tmp_path, model, rule, ranks):
    plan, journal, records, network = _federate(tmp_path, model, rule, ranks)
    assert [len(record.sites) for record in records] == [len(ranks)] * 3
    assert network.forms[-1] == (3, "change")
    shapes = trained_shapes(journal, 0, plan.federated)
    modules = sorted({name.rpartition(".lora_")[0] for name in shapes})
    for record in records:
        before, after = _state(journal, record.round - 1), _state(journal, record.round)
        total = sum(each.num_tokens for each in record.sites.values())
        for module in modules:
            mean = 0.0
            for site, each in record.sites.items():
                rank = ranks[site] or BOTH.rank
                own = shapes_at_rank(shapes, rank)
                start = split_state(before)[0]
                if rule == "stacked":
                    start = start_adapter(own, seed=0, round_number=record.round)
                file = ParcelFile(journal.update_path(record.round, site))
                payloads = {name: file.payload(TENSOR_PREFIX + name) for name in own}
                update = decode_tensors(payloads, own, FLOAT32)
                trained = {name: start[name].astype("f8") + update[name] for name in own}
                scale = BOTH.alpha / rank
                mean = mean + each.num_tokens / total * _product(trained, module, scale)
            scale = BOTH.alpha / BOTH.rank
            old = _effect(before, module, scale)
            if rule != "stacked":
                old = old - _product(split_state(before)[0], module, scale)
            gap = np.linalg.norm(_effect(after, module, scale) - old - mean)
            error = gap / np.linalg.norm(mean)
            assert error < 1e-5 if rule != "separate" else error > 1e-4


@pytest.mark.parametrize("rule", ["stacked", "fedex"])
def test_the_result_is_one_adapter_that_does_what_the_sites_hold(tmp_path, model, rule):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plan, journal, _, network = _federate(
        tmp_path, model, rule, {"north": None, "south": None}, num_rounds=2
    )
    out = tmp_path / "result"
    write_result(journal.folder, out, plan, model=model, data={}, extra_files={}, metrics={})
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    originals = {name: each.detach().clone() for name, each in base.named_parameters()}
    loaded = PeftModel.from_pretrained(base, str(out))
    rank = loaded.peft_config["default"].r
    assert rank == loaded.peft_config["default"].lora_alpha
    assert BOTH.rank < rank <= 4 * BOTH.rank + 2 * BOTH.rank
    merged = loaded.merge_and_unload()
    state = _state(journal, 2)
    adapted = {name.rpartition(".lora_")[0] for name in trained_shapes(journal, 0, plan.federated)}
    assert len(adapted) == 2
    for name, parameter in merged.named_parameters():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        difference = (parameter.detach().double() - originals[name].double()).numpy()
        if module in adapted:
            expected = _effect(state, module, BOTH.alpha / BOTH.rank)
            assert np.abs(expected).max() > 1e-4
            np.testing.assert_allclose(difference, expected, atol=1e-6)
        else:
            assert not difference.any()
    assert {form for _, form in network.forms} == {"whole", "change"}
