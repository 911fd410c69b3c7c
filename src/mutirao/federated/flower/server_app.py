"""The coordinator's Flower ServerApp: hands Flower's Grid to the coordinator's rounds.

Flower starts it anew for each run; the rounds go on from the coordinator's journal, so a run
of Flower's is no more than one attempt. How an attempt ended stands in the journal's status:
'finished', 'failed' where trying again makes no sense, 'crashed' where it may.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from mutirao.config import load_json
from mutirao.console import configure_logging
from mutirao.environment import silence
from mutirao.errors import MutiraoError
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.flower.connection import COORDINATOR_VARIABLE
from mutirao.federated.flower.network import FlowerNetwork
from mutirao.federated.flower.records import bound_arrays
from mutirao.federated.plan import Coordinator

silence()
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds that the journal does not hold yet, and say in it how that ended."""
    configure_logging()
    bound_arrays()
    path = Path(os.environ[COORDINATOR_VARIABLE])
    # The folder may have been moved since the file was written.
    coordinator = load_json(Coordinator, path).model_copy(update={"work": path.parent})
    journal = CoordinatorJournal(coordinator.work)
    journal.write_status("running")
    try:
        from mutirao.federated.coordinator.rounds import run_rounds

        run_rounds(coordinator, FlowerNetwork(grid, coordinator))
    except MutiraoError as error:
        journal.write_status("failed", str(error))
        raise
    except Exception as error:
        journal.write_status("crashed", f"{type(error).__name__}: {error}"[:2_000])
        raise
    journal.write_status("finished")
