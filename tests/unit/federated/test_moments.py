"""Second moments beside the base model: measured against a plain loop, and where AdamW starts."""

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_road import write_silo
from tiny_sites import (
    FEDERATED,
    LORA,
    TRAIN,
    TinyCoordinator,
    make_model,
    make_packed,
    make_plan,
    make_silo,
    make_site,
)

from mutirao.artifact import open_artifact, read_manifest, write_artifact
from mutirao.errors import DataError, DiskFullError, InputError
from mutirao.federated import moments as moments_module
from mutirao.federated.aggregation.compatibility import check_plan
from mutirao.federated.coordinator.adapter import write_start
from mutirao.federated.moments import measure_moments
from mutirao.federated.plan import PrivacyConfig
from mutirao.federated.recipe import FederationRecipe, open_plan, write_moments
from mutirao.federated.site.models import ModelCache
from mutirao.federated.site.personal import personalise
from mutirao.federated.site.trainer import LocalTrainer
from mutirao.federated.site.worker import SiteWorker
from mutirao.formats.huggingface import load_causal_lm
from mutirao.train.config import PrivateConfig
from mutirao.train.loop import learning_rate_at
from mutirao.train.moments import MOMENTS_PATH, start_optimizer
from mutirao.train.packed import read_packed, take_windows, train_packed

STEPS = 5
STARTED = FEDERATED.model_copy(update={"second_moments": True})
FLOAT = TRAIN.model_copy(update={"compute_dtype": "float32"})


@pytest.fixture(scope="module")
def measured(tmp_path_factory, tiny_model_directory):
    """The tiny model, a public text, and the model with its moments."""
    folder = tmp_path_factory.mktemp("moments")
    model = make_model(tiny_model_directory, folder / "model")
    public = make_packed(folder / "public", seed=9)
    out = folder / "with-moments"
    measure_moments(model, public, out, FLOAT, num_steps=STEPS, seed=3)
    return model, public, out


def begin(trainer):
    model, config = trainer.site.model, trainer.plan.train
    return start_optimizer(trainer.model, model, config, fused=trainer.silo.is_packed)


def with_file(source, folder, moments):
    """Copy a model with other moments."""
    with write_artifact(folder, "model") as writer:
        for name in read_manifest(source).files:
            if name != str(MOMENTS_PATH):
                (writer.path / name).write_bytes((source / name).read_bytes())
        (writer.path / MOMENTS_PATH).parent.mkdir()
        save_file(moments, writer.path / MOMENTS_PATH)
    return folder


def make_trainer(tmp_path, model, data, **changes):
    plan, start = make_plan(model, lora=None, federated=STARTED, train=FLOAT)
    trainer = LocalTrainer(make_site(tmp_path, model, data), plan, ModelCache())
    trainer.start_round(start, 1)
    return trainer, plan, start


def test_moments_are_the_mean_squared_gradient_of_a_step(measured):
    model, public, out = measured
    loaded, _ = load_causal_lm(model, dtype="float32")
    loaded.requires_grad_(True).train()
    tokens = read_packed(public / "train.npy")
    sums = {name: torch.zeros_like(each).double() for name, each in loaded.named_parameters()}
    for step in range(STEPS):
        ids = take_windows(tokens, 2, 33, seed=3, name="public", step=step)
        loaded.zero_grad()
        logits = loaded(ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(loaded.parameters(), FLOAT.max_gradient_norm)
        for name, each in loaded.named_parameters():
            sums[name] += each.grad.double() ** 2
    found = load_file(out / MOMENTS_PATH)
    assert found.keys() == sums.keys()
    for name, total in sums.items():
        expected = (total + 0.3 * total.mean()) / STEPS
        torch.testing.assert_close(found[name].double(), expected, rtol=2e-3, atol=1e-14)


def test_the_model_is_as_it_was_and_has_its_lineage(measured):
    model, _, out = measured
    manifest = open_artifact(out, "model")
    assert manifest.parents["base"].sha256 == read_manifest(model).sha256
    assert manifest.metrics["second_moment_steps"] == STEPS
    for name in read_manifest(model).files:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert manifest.sha256 != read_manifest(model).sha256  # so a plan names the moments, too


def test_the_first_step_is_scaled_by_them(measured, tmp_path):
    """AdamW written out, with bias corrections of 1."""
    _, _, model = measured
    trainer, plan, start = make_trainer(tmp_path, model, make_packed(tmp_path / "data"))
    state, config = begin(trainer), plan.train
    loaded, _ = load_causal_lm(model, dtype="float32")
    loaded.requires_grad_(True).train()
    tokens = read_packed(tmp_path / "data" / "train.npy")
    ids = take_windows(tokens, 2, 33, seed=0, name="north", step=0)
    logits = loaded(ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(loaded.parameters(), config.max_gradient_norm)
    train_packed(
        trainer.model, tokens, config, seed=0, name="north", num_steps=1, total_steps=100,
        optimizer_state=state,
    )  # fmt: skip
    rate = learning_rate_at(config, config.tokens_per_step, 100 * config.tokens_per_step)
    moments, trained = load_file(model / MOMENTS_PATH), dict(trainer.model.named_parameters())
    for name, each in loaded.named_parameters():
        second = config.beta2 * moments[name] + (1 - config.beta2) * each.grad**2
        step = rate * (1 - config.beta1) * each.grad / (second.sqrt() + 1e-8)
        expected = torch.tensor(start[name]) - step
        torch.testing.assert_close(trained[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_site_starts_from_them_and_goes_on_from_its_own(measured, tmp_path, is_packed):
    _, _, model = measured
    data = (make_packed if is_packed else make_silo)(tmp_path / "data")
    updates = {}
    for name, federated in {
        "zero": FEDERATED,
        "moments": STARTED,
        "stateless": STARTED.model_copy(update={"keeps_optimizer": False}),
    }.items():
        plan, start = make_plan(model, lora=None, federated=federated, train=FLOAT)
        coordinator = TinyCoordinator(tmp_path / name, plan, start)
        worker = SiteWorker(make_site(tmp_path / name, model, data))
        answers = [worker.answer(coordinator.whole(number)) for number in (1, 2)]
        assert [each.kind for each in answers] == ["update", "update"], answers[0].fields
        updates[name] = [coordinator.decode(each) for each in answers]

    def is_equal(one, two):
        return all(np.array_equal(one[name], two[name]) for name in one)

    assert not is_equal(updates["zero"][0], updates["moments"][0])
    assert is_equal(updates["stateless"][0], updates["moments"][0])
    assert not is_equal(updates["stateless"][1], updates["moments"][1])


def test_a_model_without_them_is_refused_on_both_sides(measured, tmp_path):
    model, _, _ = measured
    with pytest.raises(InputError, match=r"has no second moments.*federate moments"):
        write_start(model, tmp_path / "work", STARTED, None, FLOAT, 0)
    plan, start = make_plan(model, lora=None, federated=STARTED, train=FLOAT)
    coordinator = TinyCoordinator(tmp_path / "coordinator", plan, start)
    site = make_site(tmp_path, model, make_packed(tmp_path / "data"))
    answer = SiteWorker(site).answer(coordinator.whole(1))
    assert answer.kind == "refusal"
    assert "has no second moments" in answer.fields["sentence"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda each: each[..., :-1].contiguous(), "is not of this model"),
        (lambda each: each.double(), "is not of this model"),
        (lambda each: -each - 1, "has no mean square"),
        (lambda each: each * torch.nan, "has no mean square"),
    ],
)
def test_moments_that_cannot_be_are_refused(measured, tmp_path, change, sentence):
    _, _, source = measured
    moments = load_file(source / MOMENTS_PATH)
    name = sorted(moments)[1]
    moments[name] = change(moments[name])
    model = with_file(source, tmp_path / "model", moments)
    trainer, _, _ = make_trainer(tmp_path, model, make_packed(tmp_path / "data"))
    with pytest.raises(InputError, match=sentence):
        begin(trainer)


def test_a_damaged_file_is_refused(measured, tmp_path):
    _, _, source = measured
    model = with_file(source, tmp_path / "model", load_file(source / MOMENTS_PATH))
    trainer, _, _ = make_trainer(tmp_path, model, make_packed(tmp_path / "data"))
    (model / MOMENTS_PATH).write_bytes(b"\x08" + bytes(40))
    with pytest.raises(InputError, match="is damaged; measure the second moments anew"):
        begin(trainer)


def test_plans_that_they_do_not_go_with_are_refused(measured):
    _, _, model = measured
    with_adapter, _ = make_plan(model, lora=LORA, federated=STARTED)
    with pytest.raises(InputError, match="this plan trains an adapter"):
        check_plan(with_adapter, 3)
    training = PrivateConfig(num_units=12, units_per_step=6.0, noise_multiplier=1.0)
    privacy = PrivacyConfig(epsilon=9.0, delta=1e-3, training=training)
    noisy = STARTED.model_copy(update={"privacy": privacy})
    private, _ = make_plan(model, lora=None, federated=noisy)
    with pytest.raises(InputError, match="without the noise of differential privacy"):
        check_plan(private, 3)
    check_plan(make_plan(model, lora=None, federated=STARTED)[0], 3)


def test_a_plan_that_is_not_sound_is_refused_before_a_dry_run_praises_it(measured, tmp_path):
    model, _, _ = measured
    recipe = FederationRecipe(
        model=model, sites={"a": "x", "b": "y"}, work=tmp_path / "work", federated=STARTED
    )
    with pytest.raises(InputError, match="this plan trains an adapter"):
        open_plan(recipe)
    assert not (tmp_path / "work").exists()


def test_what_cannot_be_measured_is_told_before_anything_is_written(tmp_path, measured):
    model, public, out = measured
    recipe = FederationRecipe(model=model, sites={"a": "x"}, work=tmp_path / "work")
    full = recipe.model_copy(update={"full_weights": True})
    for asked, text, folder, sentence in (
        (recipe, public, tmp_path / "out", "this recipe trains an adapter"),
        (full, tmp_path / "none", tmp_path / "out", "is not a folder of text"),
        (full, public, out, "exists; name a new folder"),
    ):
        with pytest.raises(InputError, match=sentence):
            write_moments(asked, text, folder, num_steps=1)
    assert not (tmp_path / "work").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        write_moments(full, tmp_path / "empty", tmp_path / "out", num_steps=1)
    assert not (tmp_path / "out").exists()


def test_another_text_gives_other_moments_and_no_site_gets_it(tmp_path, measured):
    """Prepared text is kept for sites; the public text of an earlier call must not be."""
    model, _, _ = measured
    recipe = FederationRecipe(
        model=model,
        sites={"public": "x"},
        work=tmp_path / "work",
        full_weights=True,
        train=FLOAT,
    )
    found = []
    for number in (0, 500):
        write_silo(tmp_path / f"text-{number}", number)
        write_moments(recipe, tmp_path / f"text-{number}", tmp_path / f"out-{number}", num_steps=2)
        found.append(load_file(tmp_path / f"out-{number}" / MOMENTS_PATH))
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not (tmp_path / "work" / "data").exists()


def test_a_full_disk_or_a_stop_leaves_nothing(tmp_path, measured, monkeypatch):
    model, public, _ = measured

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(moments_module, "save_file", full)
    with pytest.raises(DiskFullError, match="no room left to write"):
        measure_moments(model, public, tmp_path / "out", FLOAT, num_steps=1)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_moments(model, public, tmp_path / "out", FLOAT, num_steps=9, on_tokens=stop)
    assert list(tmp_path.iterdir()) == []


def test_every_value_has_some_of_the_mean_of_its_tensor_added():
    seen = torch.tensor([[4.0, 0.0], [2.0, 0.0]]) * (1 - moments_module._NEARLY_ONE**7)
    state = {"exp_avg_sq": seen, "step": torch.tensor(7.0)}
    expected = torch.tensor([[4.45, 0.45], [2.45, 0.45]])
    torch.testing.assert_close(moments_module._mean_square(state), expected)


def test_a_personal_model_goes_on_from_them(measured, tmp_path):
    """As a round does: from zero, the first step of a fresh AdamW would be as large as any."""
    _, _, model = measured
    changes = {}
    for name, federated in {"zero": FEDERATED, "moments": STARTED}.items():
        once = federated.model_copy(update={"num_rounds": 1})
        plan, start = make_plan(model, lora=None, federated=once, train=FLOAT)
        coordinator = TinyCoordinator(tmp_path / name, plan, start)
        data = make_packed(tmp_path / name / "data")
        site = make_site(tmp_path / name, model, data)
        SiteWorker(site).answer(coordinator.whole(1))
        personalise(site, tmp_path / name / "personal")
        trained = load_file(tmp_path / name / "personal" / "model.safetensors")
        changes[name] = {each: trained[each] - torch.tensor(start[each]) for each in start}
    assert any(
        not torch.equal(changes["zero"][each], changes["moments"][each]) for each in changes["zero"]
    )
