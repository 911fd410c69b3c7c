"""Two processes that share each step come to what one comes to, and to the same bytes again."""

import multiprocessing
import os

import numpy as np
import pytest
import torch

from mutirao.data.tokenization import Example
from mutirao.errors import DataError, RankLostError
from mutirao.formats.huggingface import load_causal_lm
from mutirao.train import loop, packed
from mutirao.train.config import TrainConfig
from mutirao.train.loop import train
from mutirao.train.packed import take_windows, train_packed
from mutirao.train.parallel import ALONE, join

TOKENS = ((np.arange(500) * 7) % 20).astype(np.uint16)
CONFIG = TrainConfig(
    learning_rate=1e-2,
    warmup_tokens=0,
    tokens_per_step=48,
    max_tokens_per_example=16,
    compute_dtype="float32",
)
EXAMPLES = [
    Example(tuple(int(i) for i in TOKENS[start : start + length]), context)
    for start, length, context in ((0, 9, 0), (9, 16, 3), (40, 12, 12), (60, 5, 0), (80, 16, 0))
]


def gradients(model, ranks):
    """Return the gradients of one step over packed text, and of one over records."""
    parameters = list(model.parameters())
    found = []
    for backward in (backward_packed, backward_records):
        loss_sum = ranks.sum_gradients(parameters, backward(model, ranks))
        assert loss_sum > 0
        found += [parameter.grad.reshape(-1) for parameter in parameters]
        model.zero_grad(set_to_none=True)
    return torch.cat(found).numpy()


def backward_packed(model, ranks):
    ids = take_windows(TOKENS, 3, 17, seed=0, name="n", step=0)[ranks.share(3)]
    return packed._backward(model, ids, CONFIG, num_learned=48)


def backward_records(model, ranks):
    own = EXAMPLES[ranks.share(len(EXAMPLES))]
    num_learned = sum(loop._count_learned(example) for example in EXAMPLES)
    return loop._backward(model, CONFIG, own, pad_id=0, num_learned=num_learned)


def train_both(model, ranks):
    """Train on packed text, three windows a step, and on records; some steps have one row."""
    result = train_packed(model, TOKENS, CONFIG, seed=0, name="n", num_steps=3, ranks=ranks)
    after = flat(model)
    more = train(model, EXAMPLES, CONFIG, pad_id=0, seed=1, ranks=ranks)
    return after, flat(model), (result.loss, more.loss, more.num_tokens, more.num_steps)


def norm(values):
    return float(np.linalg.norm(values.astype(np.float64)))


def flat(model):
    parts = [parameter.detach().reshape(-1) for parameter in model.parameters()]
    return torch.cat(parts).numpy()


def work(rank, out, model_path):
    """Be one of two ranks, four times over: twice in peace, with a fault, and in a death."""
    torch.set_num_threads(1)
    for name in ("first", "second", "nan", "dies"):
        ranks = join(out / f"{name}.store", rank, 2)
        model = load_causal_lm(model_path, dtype="float32")[0].requires_grad_(True)
        if rank == 1 and name == "dies":
            os._exit(9)
        if rank == 1 and name == "nan":
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        try:
            gradient = gradients(model, ranks) if name != "nan" else None
            after, both, numbers = train_both(model, ranks)
        except (RankLostError, DataError) as error:
            (out / f"{name}-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        else:
            found = {"gradient": gradient, "packed": after, "both": both, "numbers": numbers}
            np.savez(out / f"{name}-{rank}.npz", **found)


@pytest.fixture(scope="module")
def out(tmp_path_factory, tiny_model_directory):
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    arguments = (folder, tiny_model_directory)
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 9]
    return folder


def test_two_are_as_one_and_the_same_again(out, tiny_model_directory):
    model = load_causal_lm(tiny_model_directory, dtype="float32")[0].requires_grad_(True)
    start = flat(model)
    gradient = gradients(model, ALONE)
    after, both, numbers = train_both(model, ALONE)
    bytes_found = set()
    for name in ("first-0", "first-1", "second-0", "second-1"):
        found = np.load(out / f"{name}.npz")
        assert norm(found["gradient"] - gradient) < 1e-6 * norm(gradient)
        # Adam makes whole steps of gradients that are nothing but rounding, as of a key's bias.
        assert norm(found["packed"] - after) < 1e-2 * norm(after - start)
        assert norm(found["both"] - both) < 1e-2 * norm(both - after)
        assert found["numbers"] == pytest.approx(numbers, rel=1e-5)
        bytes_found.add(found["both"].tobytes())
    assert len(bytes_found) == 1


def test_a_loss_that_is_not_finite_ends_all_ranks_alike(out):
    told = [(out / f"nan-{rank}.txt").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert told[0].startswith("DataError: the training loss is not finite")


def test_a_rank_that_dies_is_told_by_the_other(out):
    assert (out / "dies-0.txt").read_text().startswith("RankLostError: a process that shares")


def test_alone_shares_nothing():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3.0)
    assert ALONE.share(5) == slice(0, 5)
    assert ALONE.sum_gradients([parameter], 1.5) == 1.5
    assert parameter.grad.tolist() == [3.0, 3.0]
    assert ALONE.broadcast(parameter.grad) is parameter.grad
