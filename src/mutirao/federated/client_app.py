"""The site's Flower ClientApp: takes a request, has the site answer it, logs what leaves.

Started anew by the SuperNode for every message. Which site it is, and where its data
lies, it reads from the site's own file, named in the SuperNode's node configuration; the
coordinator cannot name paths.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from mutirao.config import load_json
from mutirao.environment import silence
from mutirao.errors import MutiraoError
from mutirao.federated.journal import SiteJournal
from mutirao.federated.messages import count_bytes, pack_error, pack_reply, unpack_request
from mutirao.federated.plan import Site

silence()
app = ClientApp()


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Answer one round's request; an expected failure travels back as one sentence."""
    site = load_json(Site, Path(str(context.node_config["site-file"])))
    journal = SiteJournal(site.work)
    bytes_received = count_bytes(message.content)
    round_number, sha256, told = None, None, None
    try:
        from mutirao.federated.site import answer_round

        plan, round_number, state = unpack_request(message.content)
        reply = answer_round(site, plan, round_number, state)
        content = pack_reply(reply)
        sha256 = reply.update.sha256
    except MutiraoError as error:
        told = f"site {site.name}: {error}"
        content = pack_error(told)
    except Exception:
        # What Flower would send of it may quote the site's text; that stays in the site's log.
        journal.log(event="failed", round=round_number, traceback=traceback.format_exc())
        told = f"site {site.name} failed; its own log, log.jsonl in its work folder, says why"
        content = pack_error(told)
    journal.log(
        event="left the site",
        round=round_number,
        bytes_received=bytes_received,
        bytes_sent=count_bytes(content),
        content=told or "adapter update: 8-bit codes, scales, and the numbers of the round",
        update_sha256=sha256,
    )
    return Message(content, reply_to=message)
