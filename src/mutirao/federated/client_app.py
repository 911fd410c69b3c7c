"""The site's Flower ClientApp: takes a request, has the site answer it, sends what may leave.

Started anew by the SuperNode for every message. Which site it is, and where its data
lies, it reads from the site's own file, named in the SuperNode's node configuration; the
coordinator cannot name paths. What leaves passes the gate, with one exception: a fixed
sentence which says that the audit log could not be written.
"""

from __future__ import annotations

import traceback
from contextlib import suppress
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from mutirao.config import load_json
from mutirao.environment import silence
from mutirao.errors import MutiraoError
from mutirao.federated.gate import Gate, Payload
from mutirao.federated.journal import SiteJournal
from mutirao.federated.messages import (
    count_bytes,
    hash_content,
    pack_error,
    pack_reply,
    unpack_request,
)
from mutirao.federated.plan import Site

silence()
app = ClientApp()


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Answer one round's request; an expected failure travels back as one sentence."""
    site = load_json(Site, Path(str(context.node_config["site-file"])))
    journal, gate = SiteJournal(site.work), Gate(site)
    bytes_received = count_bytes(message.content)
    plan, round_number, sha256, told = None, None, None, None
    try:
        from mutirao.federated.site import answer_round

        plan, round_number, state = unpack_request(message.content)
        gate.admit(plan, round_number)
        reply = answer_round(site, plan, round_number, state)
        content = pack_reply(reply)
        gate.release_update(plan, round_number, reply.tensors, _weigh(content))
        sha256 = reply.update.sha256
    except MutiraoError as error:
        told = f"site {site.name}: {error}"
    except Exception:
        # What Flower would send of it may quote the site's text; that stays in the site's log.
        journal.log(event="failed", round=round_number, traceback=traceback.format_exc())
        told = f"site {site.name} failed; its own log, log.jsonl in its work folder, says why"
    if told is not None:
        content = pack_error(told)
        try:
            gate.release_error(plan, round_number, told, _weigh(content))
        except Exception:
            return Message(_pack_unrecorded(journal, site), reply_to=message)
    journal.log(
        event="left the site",
        round=round_number,
        bytes_received=bytes_received,
        bytes_sent=count_bytes(content),
        content=told or "adapter update: 8-bit codes, scales, and the numbers of the round",
        update_sha256=sha256,
    )
    return Message(content, reply_to=message)


def _weigh(content: RecordDict) -> Payload:
    return Payload(count_bytes(content), hash_content(content))


def _pack_unrecorded(journal: SiteJournal, site: Site) -> RecordDict:
    """Return fixed words that tell nothing, for the one message that is not in the audit log."""
    with suppress(MutiraoError, OSError):  # the disk may be full, which is why we are here
        journal.log(event="failed", traceback=traceback.format_exc())
    return pack_error(
        f"site {site.name} could not write its audit log, so nothing but this sentence leaves it"
    )
