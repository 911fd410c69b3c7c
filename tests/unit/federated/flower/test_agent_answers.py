"""Answers that a site's agent cannot get rid of: of a SuperLink that is gone, or never taken."""

from types import SimpleNamespace

import pytest
from tiny_sites import make_site

from mutirao.federated.flower import site_agent
from mutirao.federated.flower.connection import Connection
from mutirao.federated.flower.fleet import RunOver, Unreachable
from mutirao.federated.flower.site_agent import SiteAgent


class Line:
    """A line to a SuperLink, at which this node has a number."""

    def __init__(self, node_id, error=None):
        self.node_id, self.error, self.sent = node_id, error, []

    def send(self, reply):
        self.sent.append(reply)
        if self.error is not None:
            raise self.error


@pytest.fixture
def agent(tmp_path, monkeypatch):
    site = make_site(tmp_path, tmp_path, tmp_path)
    made = SiteAgent(site, Connection(address="127.0.0.1:1"), lambda request: request)
    monkeypatch.setattr(made, "_reply", lambda job: job)
    return made


def job(node_id):
    message = SimpleNamespace(metadata=SimpleNamespace(dst_node_id=node_id))
    return site_agent._Job(message, b"request", "0" * 64)


def test_an_answer_for_a_superlink_that_is_gone_holds_up_no_other(agent):
    agent._done = [job(1), job(2)]
    line = Line(2)
    agent._send_done(line)
    assert agent._done == []
    assert len(line.sent) == 1


def test_an_answer_outlives_a_broken_line_but_is_not_sent_for_ever(agent):
    agent._done = [job(1)]
    line = Line(1, Unreachable("status 500"))
    for _ in range(3):
        with pytest.raises(Unreachable):
            agent._send_done(line)
        assert len(agent._done) == 1
    agent._send_done(line)
    assert agent._done == []
    assert len(line.sent) == 3


def test_an_answer_to_a_run_that_is_over_is_dropped(agent):
    agent._done = [job(1), job(1)]
    agent._send_done(Line(1, RunOver()))
    assert agent._done == []
