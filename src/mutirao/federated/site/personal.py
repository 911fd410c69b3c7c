"""A site's own copy of the final model, trained a little further on its own text alone.

It begins with the state that all sites hold after the last round and goes on at the schedule's
last learning rate with text that comes next in the site's stream. The result stays at the site:
nothing of it is sent to anybody, so no gate is asked and no audit record is written. It is not
covered by the run's differential privacy, and its manifest says so where there was any.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import JsonValue

from mutirao.artifact import Manifest, read_manifest, write_artifact
from mutirao.errors import FederationError, InputError
from mutirao.federated.plan import Site
from mutirao.federated.site.journal import RunJournal, SiteJournal
from mutirao.federated.site.trainer import LocalTrainer
from mutirao.formats.huggingface import save_causal_lm
from mutirao.tune.lora import save_adapter

LOW_RANK = ("stacked", "fedex")


def personalise(
    site: Site,
    out: Path,
    *,
    run_id: str | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Manifest:
    """Train the final model for one more round on this site's text alone.

    Args:
        site: who and where.
        out: folder of the new artifact: of kind 'adapter', or 'model' where all weights are
            trained.
        run_id: of the run; None for the latest.
        on_tokens: called now and then with the tokens trained.

    Returns:
        Its manifest, with the loss on the site's held-out text before and after, in nats per
        token.

    Raises:
        InputError: the site took part in no such run, or in one without a lasting adapter.
        FederationError: the site has not got the final state.
    """
    run = _find_run(site, run_id)
    plan = run.read_plan()
    if plan.federated.aggregation in LOW_RANK:
        raise InputError(
            f"federated.aggregation={plan.federated.aggregation} begins each round with a fresh "
            "adapter, so there is none to go on with (expected another aggregation)"
        )
    held = run.read_replica()
    if held is None:
        raise FederationError(
            f"site {site.name} holds no state of run {run.run_id[:16]}; let it take part until the "
            "run has finished"
        )
    trainer = LocalTrainer(site, plan)
    trainer.set_state(held[1])
    measured = plan.federated.monitor_tokens or 4 * plan.train.max_tokens_per_example
    before = trainer.evaluate(measured)
    trainer.train_round(plan.federated.num_rounds + 1, None, on_tokens or (lambda _: None))
    after = trainer.evaluate(measured)
    recipe: dict[str, JsonValue] = {
        "site": site.name,
        "run": run.run_id,
        "plan": plan.model_dump(mode="json"),
        "is_private": False,
    }
    kind = "model" if plan.lora is None else "adapter"
    with write_artifact(out, kind, recipe=recipe, seed=plan.seed) as writer:
        writer.add_parent("base", site.model)
        writer.add_parent("data", site.data)
        if plan.lora is None:
            save_causal_lm(trainer.model, trainer.tokenizer, writer.path)
        else:
            save_adapter(trainer.model, writer.path, base_model=str(site.model))
        writer.metrics["heldout_loss_before"] = before[0] if before else None
        writer.metrics["heldout_loss_after"] = after[0] if after else None
    return read_manifest(out)


def _find_run(site: Site, run_id: str | None) -> RunJournal:
    """Return the run that is meant: the one named, or the latest."""
    journal = SiteJournal(site.work)
    if run_id is not None:
        found = journal.run(run_id)
        if found.plan_sha256() is None:
            raise InputError(f"site {site.name} took part in no run {run_id[:16]}")
        return found
    runs = journal.runs()
    if not runs:
        raise InputError(f"site {site.name} took part in no run yet")
    return runs[0]
