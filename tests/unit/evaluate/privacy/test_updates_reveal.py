"""What an update tells: which tokens, at which site; in the clear, summed, under noise."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from secret_keepers import VOCABULARY, overfit, random_records, small_decoder, train_with_noise

from mutirao.errors import DataError, ShapeError
from mutirao.evaluate.privacy.updates import (
    attribute_sites,
    evaluate_attribution,
    evaluate_presence,
    sole_owners,
    token_deviation,
    token_evidence,
    trained_tokens,
)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NUM_SITES = 4


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def update_of(records, train, *, is_tied=False):
    """Difference that a few local steps make to every parameter."""
    model = small_decoder(is_tied=is_tied)
    before = parameters_of(model)
    train(model, records)
    return {name: after - before[name] for name, after in parameters_of(model).items()}


def plainly(model, records):
    overfit(model, records, num_epochs=3, learning_rate=1e-3, tokens_per_step=32)


def noisily(model, records):
    units = [(record,) for record in records]
    seed = sum(records[0].ids)  # another one at each site: shared noise would cancel
    train_with_noise(
        model, units, noise_multiplier=2.0, num_steps=3, units_per_step=len(units), seed=seed
    )


def tokens_of(records):
    """What was input: the last token of a record is predicted, and predicts nothing."""
    return {token for record in records for token in record.ids[:-1]}


def site_records(site):
    return random_records(3, 8, seed=100 + site)


def test_rows_that_changed_are_the_tokens_that_were_trained_on():
    records = site_records(0)
    update = update_of(records, plainly)[EMBEDDING]
    assert trained_tokens(update) == tokens_of(records)
    assert trained_tokens(update.T, token_axis=1) == tokens_of(records)
    result = evaluate_presence(token_evidence(update), tokens_of(records))
    assert (result.auc, result.precision, result.recall) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("is_tied", [False, True])
def test_where_every_row_changes_those_that_go_their_own_way_tell(is_tied):
    records = site_records(1)
    update = update_of(records, plainly, is_tied=is_tied)[EMBEDDING if is_tied else HEAD]
    learned = {token for record in records for token in record.ids[1:]}
    assert evaluate_presence(token_evidence(update), learned).precision < 0.5
    assert evaluate_presence(token_deviation(update), learned).auc > 0.9


def test_low_rank_factors_of_the_head_tell_as_well():
    records = site_records(2)
    model = get_peft_model(
        small_decoder(), LoraConfig(r=2, lora_alpha=4, target_modules=["lm_head"])
    )
    plainly(model, records)
    (b_VR,) = [p for name, p in model.named_parameters() if "lora_B" in name]
    learned = {token for record in records for token in record.ids[1:]}
    assert evaluate_presence(token_deviation(b_VR), learned).auc > 0.9
    assert evaluate_presence(token_deviation(b_VR.T, token_axis=1), learned).auc > 0.9


def test_noise_hides_the_tokens():
    records = site_records(0)
    evidence = token_evidence(update_of(records, noisily)[EMBEDDING])
    result = evaluate_presence(evidence, tokens_of(records))
    assert (evidence > 0).all()
    assert 0.3 < result.auc < 0.7


def test_evidence_of_nothing_is_a_coin():
    rng = np.random.default_rng(0)
    result = evaluate_presence(rng.random(2000), set(range(0, 2000, 2)))
    assert 0.45 < result.auc < 0.55


def cohort(train):
    records = [site_records(site) for site in range(NUM_SITES)]
    updates = [update_of(each, train)[EMBEDDING] for each in records]
    return updates, sole_owners([tokens_of(each) for each in records])


def test_whose_token_it_was_is_plain_alone_and_chance_in_a_sum():
    updates, owners = cohort(plainly)
    assert len(owners) > 30
    alone = np.stack([token_evidence(update) for update in updates])
    assert evaluate_attribution(alone, owners).accuracy == 1.0
    total = token_evidence(torch.stack(updates).sum(dim=0))
    # That somebody had the token is still to be seen.
    assert set(owners) <= set(np.flatnonzero(total).tolist())
    summed = evaluate_attribution(np.stack([total] * NUM_SITES), owners)
    assert summed.low < summed.chance < summed.high
    assert summed.chance == 1 / NUM_SITES
    # The sum is the same whoever had what: nothing in it could do better.
    swapped = torch.stack(updates[::-1]).sum(dim=0)
    torch.testing.assert_close(swapped, torch.stack(updates).sum(dim=0))


def test_two_sums_that_differ_by_a_site_give_it_away():
    """Secure aggregation protects a sum, not what follows from several of them."""
    updates, owners = cohort(plainly)
    rest = torch.stack(updates[:-1]).sum(dim=0)
    gone = token_evidence(torch.stack(updates).sum(dim=0) - rest)
    theirs = {token for token, site in owners.items() if site == NUM_SITES - 1}
    seen = set(np.flatnonzero(gone > 1e-6).tolist())
    assert theirs <= seen
    assert not seen & (set(owners) - theirs)


def test_noise_hides_the_site_too():
    updates, owners = cohort(noisily)
    found = evaluate_attribution(np.stack([token_evidence(each) for each in updates]), owners)
    assert found.low < found.chance < found.high


def test_ties_are_drawn():
    evidence = np.array([[1.0, 2.0] * 500, [1.0, 1.0] * 500])
    named = attribute_sites(evidence, seed=0)
    assert (named[1::2] == 0).all()
    assert 0.4 < named[::2].mean() < 0.6


def test_owners_are_those_that_nobody_shares():
    assert sole_owners([[1, 2, 2], {2, 3}, []]) == {1: 0, 3: 1}


def test_bad_input():
    with pytest.raises(ShapeError, match="expected a matrix"):
        token_evidence(torch.zeros(3))
    with pytest.raises(DataError, match="none can be attributed"):
        evaluate_attribution(np.ones((2, 3)), {})
    with pytest.raises(DataError):
        evaluate_presence(np.ones(VOCABULARY), set(range(VOCABULARY)))
