"""The stage that serves: where it listens is said once it does, and it ends when it is told to."""

import json
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dreamgen.serve.clients import GrootPolicy, OpenpiPolicy
from dreamgen.serve.groot import GrootServer
from dreamgen.serve.openpi import OpenpiServer
from dreamgen.stages.serve import serve
from tests.serve.toy import ROBOT, Mean, observations

pytest.importorskip("websockets"), pytest.importorskip("zmq")


@pytest.mark.parametrize(("protocol", "client"), [(OpenpiServer, OpenpiPolicy), (GrootServer, GrootPolicy)])
def test_it_says_where_and_ends(tmp_path: Path, protocol, client):
    made: list = []

    def remembered(*args, **options):
        made.append(protocol(*args, **options))
        return made[0]

    thread = threading.Thread(target=partial(serve, Mean(), remembered, out=tmp_path, port=0, record={}))
    thread.start()
    for _ in range(100):
        if (tmp_path / "server.json").is_file():
            break
        time.sleep(0.05)
    told = json.loads((tmp_path / "server.json").read_text())
    assert told["embodiment"] == "toy" and told["horizon"] == 4 and told["host"] == "127.0.0.1"
    with client(told["address"], robot=ROBOT) as policy:
        np.testing.assert_allclose(policy.act(observations(2), [5, 6]), Mean().act(observations(2), [5, 6]))
    with pytest.raises(ValueError, match="cannot serve at 127.0.0.1"):
        serve(Mean(), protocol, out=tmp_path / "other", port=told["port"], record={})
    made[0].stop()
    thread.join(5)
    assert not thread.is_alive() and not (tmp_path / "server.json").exists()
    assert "serving at" in (tmp_path / "serve.log").read_text()
