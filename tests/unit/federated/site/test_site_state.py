"""States, from whole tensors and from changes; and what earlier rounds added to layers."""

import numpy as np
import pytest
import torch
from tiny_sites import FEDERATED, LORA, TinyCoordinator, make_model, make_plan, make_silo, make_site

from mutirao.errors import UpdateError
from mutirao.federated.codec import CodecConfig, encode_tensors
from mutirao.federated.messages import StateFields, tensor_payloads
from mutirao.federated.parcel import COORDINATOR, Parcel
from mutirao.federated.plan import Plan
from mutirao.federated.site.refusal import Refused
from mutirao.federated.site.replica import hash_tensors
from mutirao.federated.site.state import decode_any, has_basis, take_state
from mutirao.federated.site.trainer import LocalTrainer

PLAN = Plan(model_sha256="0" * 64)
STATE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
SHAPES = {"a": (2, 3), "b": (4,)}


def request(tensors, codec):
    payloads = tensor_payloads(encode_tensors(tensors, codec))
    return Parcel("train", "ab" * 32, 1, COORDINATOR, {}, payloads)


def whole(state):
    return StateFields(form="whole", state_sha256=hash_tensors(state))


@pytest.mark.parametrize("form", ["fp32", "bf16"])
def test_a_whole_state_comes_in_either_form(form):
    came = request(STATE, CodecConfig(format=form))
    taken = take_state(came, whole(STATE), None, PLAN, SHAPES)
    assert hash_tensors(taken) == hash_tensors(STATE)


def test_a_whole_state_that_is_another_is_refused():
    with pytest.raises(UpdateError, match="do not lead to the state"):
        take_state(request(STATE, CodecConfig(format="fp32")), whole({}), None, PLAN, SHAPES)


def test_a_form_that_was_not_agreed_is_refused():
    payloads = encode_tensors(STATE, CodecConfig(format="int2"))
    with pytest.raises(UpdateError, match="payload of tensor 'a'"):
        decode_any(payloads, SHAPES, PLAN)
    with pytest.raises(UpdateError, match="no tensor 'b'"):
        decode_any({"a": payloads["a"]}, SHAPES, PLAN)


def test_a_change_needs_its_basis_and_is_taken_once():
    change = {name: np.full(shape, 0.5, np.float32) for name, shape in SHAPES.items()}
    after = {name: STATE[name] + change[name] for name in STATE}
    fields = StateFields(
        form="change", based_on=hash_tensors(STATE), state_sha256=hash_tensors(after)
    )
    came = request(change, PLAN.federated.download)
    held = (hash_tensors(STATE), STATE)
    taken = take_state(came, fields, held, PLAN, SHAPES)
    assert hash_tensors(taken) == fields.state_sha256
    again = take_state(came, fields, (fields.state_sha256, taken), PLAN, SHAPES)
    assert hash_tensors(again) == fields.state_sha256
    assert not has_basis(fields, ("e" * 64, STATE))
    for wrong in (None, ("e" * 64, STATE)):
        with pytest.raises(Refused):
            take_state(came, fields, wrong, PLAN, SHAPES)


def test_a_history_adds_its_product_to_the_layer_s_weight(tiny_model_directory, tmp_path):
    federated = FEDERATED.model_copy(update={"aggregation": "stacked", "keeps_optimizer": False})
    lora = LORA.model_copy(update={"freeze_a": False})
    model = make_model(tiny_model_directory, tmp_path / "model")
    plan, start = make_plan(model, lora=lora, federated=federated)
    TinyCoordinator(tmp_path / "coordinator", plan, start)
    trainer = LocalTrainer(make_site(tmp_path, model, make_silo(tmp_path / "silo")), plan)
    trainer.model.float()
    name = next(name for name in start if "q_proj.lora_B" in name)
    module = name.partition(".lora_B")[0]
    generator = np.random.default_rng(0)
    history = {
        f"{module}.history_B": generator.normal(size=(64, 3)).astype(np.float32) / 10,
        f"{module}.history_A": generator.normal(size=(3, 64)).astype(np.float32) / 10,
    }
    ids = torch.arange(20)[None]
    adapter = trainer.start_round(history, 2)
    assert all(not np.any(each) for name, each in adapter.items() if "lora_B" in name)
    with torch.no_grad():
        hooked = trainer.model(input_ids=ids).logits
        trainer.start_round({}, 2)
        plain = trainer.model(input_ids=ids).logits
        layer = dict(trainer.model.named_modules())[module]
        product = history[f"{module}.history_B"] @ history[f"{module}.history_A"]
        layer.base_layer.weight += torch.from_numpy(product)
        merged = trainer.model(input_ids=ids).logits
    assert torch.allclose(hooked, merged, atol=1e-4)
    assert not torch.allclose(plain, merged, atol=1e-2)
