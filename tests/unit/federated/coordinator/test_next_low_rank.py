"""Updates in files to the next low-rank state: coordinator and sites agree to the bit."""

import numpy as np
import pytest

from mutirao.errors import ArtifactError, UpdateError
from mutirao.federated.aggregation.low_rank_state import (
    shapes_at_rank,
    split_state,
    start_adapter,
)
from mutirao.federated.aggregation.updates import ParcelFile, write_parcel
from mutirao.federated.codec import CodecConfig, decode_tensors, encode_tensors
from mutirao.federated.coordinator.journal import CoordinatorJournal, hash_state
from mutirao.federated.coordinator.next_low_rank import (
    sent_ranks,
    site_shapes,
    trained_shapes,
    write_low_rank_start,
    write_next_low_rank,
)
from mutirao.federated.messages import StateFields, tensor_payloads
from mutirao.federated.parcel import COORDINATOR, Parcel
from mutirao.federated.plan import FederatedConfig, Plan
from mutirao.federated.site.state import take_state
from mutirao.tune.config import LoRAConfig

A = "model.q_proj.lora_A.default.weight"
B = "model.q_proj.lora_B.default.weight"
SHAPES = {A: (4, 10), B: (8, 4)}
RUN = "0" * 64
WEIGHTS = {"north": 3.0, "south": 1.0}


def _plan(rule, **changes):
    config = {"upload": CodecConfig(format="fp32"), "download": CodecConfig(format="fp32")}
    return Plan(
        federated=FederatedConfig(aggregation=rule, keeps_optimizer=False, **{**config, **changes}),
        lora=LoRAConfig(rank=4, alpha=8, freeze_a=False),
        seed=5,
        model_sha256="m",
    )


class Coordination:
    """A coordinator's journal, and what a site makes of it."""

    def __init__(self, folder, plan, ranks):
        self.plan, self.ranks = plan, ranks
        self.journal = CoordinatorJournal(folder)
        self.start = start_adapter(SHAPES, seed=1, round_number=1)
        write_low_rank_start(self.journal, plan.federated, SHAPES, self.start.__getitem__)
        self.shapes = trained_shapes(self.journal, 0, plan.federated)
        self.held = None
        self.expected = 0.0
        self.rng = np.random.default_rng(0)

    @property
    def is_stacked(self):
        return self.plan.federated.aggregation == "stacked"

    def fetch(self, number, form):
        """Send the state after a round to the site, as the coordinator would."""
        file = self.journal.open_state(number, "replica")
        if form == "whole":
            tensors = {name: file.read(name) for name in file.names}
            payloads, based_on = encode_tensors(tensors, CodecConfig(format="fp32")), ""
        else:
            change = self.journal.open_state(number, "change")
            payloads = {name: change.map_bytes(name) for name in change.names}
            based_on = self.held[0]
        fields = StateFields(
            form=form,
            based_on=based_on,
            state_sha256=hash_state(file),
            ranks=sent_ranks(self.journal, number, whole=form == "whole"),
        )
        parcel = Parcel("train", RUN, number + 1, COORDINATOR, payloads=tensor_payloads(payloads))
        state = take_state(parcel, fields, self.held, self.plan, self.shapes)
        self.held = (fields.state_sha256, state)
        return state

    def run_round(self, number, folder):
        state = self.held[1]
        files, mean = {}, 0.0
        for site, rank in self.ranks.items():
            shapes = shapes_at_rank(SHAPES, rank)
            start = (
                start_adapter(shapes, seed=5, round_number=number)
                if self.is_stacked
                else split_state(state)[0]
            )
            codec = self.plan.federated.upload
            update = {n: (0.2 * self.rng.normal(size=s)).astype("f4") for n, s in shapes.items()}
            payloads = encode_tensors(update, codec)
            arrived = decode_tensors(payloads, shapes, codec)
            b, a = (start[n].astype("f8") + arrived[n] for n in (B, A))
            mean = mean + WEIGHTS[site] / 4 * (8 / rank) * b @ a
            parcel = Parcel(
                "update", RUN, number, site, {"rank": rank}, tensor_payloads(payloads), "00" * 64
            )
            write_parcel(folder / f"{number}-{site}.parcel", parcel)
            files[site] = ParcelFile(folder / f"{number}-{site}.parcel")
        old = self.effect(state, with_adapter=False)
        result = write_next_low_rank(self.journal, number, self.plan, files, WEIGHTS)
        self.expected = old + mean
        return result, files

    def effect(self, state, *, with_adapter=True):
        adapter, history = split_state(state)
        total = np.zeros((8, 10))
        for each in history.values():
            total = total + each.b.astype("f8") @ each.a.astype("f8")
        if adapter and with_adapter:
            total = total + 2 * adapter[B].astype("f8") @ adapter[A].astype("f8")
        return total


@pytest.mark.parametrize(("rule", "south"), [("stacked", 2), ("fedex", 4)])
@pytest.mark.parametrize("upload", ["fp32", "int8"])
def test_site_and_coordinator_hold_the_true_mean_round_after_round(tmp_path, rule, south, upload):
    run = Coordination(
        tmp_path, _plan(rule, upload=CodecConfig(format=upload)), {"north": 4, "south": south}
    )
    run.fetch(0, "whole")
    forms = []
    for number in range(1, 6):
        result, _ = run.run_round(number, tmp_path)
        is_change = run.journal.state_path(number, "change").exists()
        forms.append("change" if is_change else "whole")
        state = run.fetch(number, forms[-1])
        assert result.global_sha256 == result.replica_sha256 == run.held[0]
        gap = np.linalg.norm(run.effect(state) - run.expected) / np.linalg.norm(run.expected)
        assert gap < 1e-6
    # 8 rows can use 8 columns; beyond 16 the history is recompressed.
    assert set(forms) == {"change", "whole"}
    run.held = None
    assert run.fetch(5, "whole").keys() == state.keys()


@pytest.mark.parametrize("download", ["bf16", "int8"])
def test_coarse_downloads_keep_both_sides_alike(tmp_path, download):
    for rule in ("stacked", "fedex"):
        plan = _plan(rule, download=CodecConfig(format=download))
        run = Coordination(tmp_path / rule, plan, {"north": 4, "south": 4})
        run.fetch(0, "whole")
        run.run_round(1, tmp_path)
        state = run.fetch(1, "change")
        gap = np.linalg.norm(run.effect(state) - run.expected) / np.linalg.norm(run.expected)
        assert 1e-5 < gap < 0.02


def test_the_same_updates_give_the_same_files(tmp_path):
    plan = _plan("fedex")
    run = Coordination(tmp_path / "one", plan, {"north": 4, "south": 4})
    run.fetch(0, "whole")
    first, files = run.run_round(1, tmp_path)
    kept = {p.name: p.read_bytes() for p in run.journal.state_path(1, "global").parent.iterdir()}
    backwards = dict(reversed(files.items()))
    again = write_next_low_rank(run.journal, 1, plan, backwards, WEIGHTS)
    folder = run.journal.state_path(1, "global").parent
    assert again == first
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == kept


def test_start_of_stacked_is_empty_and_remembers_the_adapters_shapes(tmp_path):
    run = Coordination(tmp_path, _plan("stacked"), {"north": 4})
    assert run.journal.open_state(0, "global").shapes == {}
    assert run.journal.has_start()
    assert run.shapes == SHAPES
    assert run.fetch(0, "whole") == {}
    config = run.plan.federated
    assert site_shapes(SHAPES, 2, config) == {A: (2, 10), B: (8, 2)}
    assert site_shapes(SHAPES, None, config) == SHAPES
    assert site_shapes(SHAPES, 2, _plan("fedex").federated) == SHAPES
    with pytest.raises(UpdateError, match="rank 1025"):
        site_shapes(SHAPES, 1025, config)
    mean = FederatedConfig()
    assert trained_shapes(run.journal, 0, mean) == {}


def test_a_damaged_update_or_a_step_out_of_float32_keeps_nothing(tmp_path):
    run = Coordination(tmp_path, _plan("stacked"), {"north": 4, "south": 4})
    run.fetch(0, "whole")
    _, files = run.run_round(1, tmp_path)
    path = tmp_path / "1-north.parcel"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="damaged"):
        write_next_low_rank(run.journal, 2, run.plan, files, WEIGHTS)
    huge = {n: np.full(s, 3e38, np.float32) for n, s in SHAPES.items()}
    payloads = tensor_payloads(encode_tensors(huge, CodecConfig(format="fp32")))
    write_parcel(path, Parcel("update", RUN, 2, "north", {}, payloads, "00" * 64))
    with pytest.raises(UpdateError, match="too large for float32"):
        write_next_low_rank(run.journal, 2, run.plan, {"north": ParcelFile(path)}, WEIGHTS)
    assert not run.journal.state_path(2, "global").exists()
