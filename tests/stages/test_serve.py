"""The stage that serves: where it listens is said once it does, and it ends when it is told to."""

import json
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamgen.engine import precision
from dreamgen.serve.clients import GrootPolicy, OpenpiPolicy
from dreamgen.serve.groot import GrootServer
from dreamgen.serve.openpi import OpenpiServer
from dreamgen.stages.serve import serve
from jobs.recipe import load
from tests.serve.toy import ROBOT, Mean, observations

pytest.importorskip("websockets"), pytest.importorskip("zmq")
PROTOCOLS = [(OpenpiServer, OpenpiPolicy), (GrootServer, GrootPolicy)]


def announced(out: Path, seconds: float = 30.0) -> dict:
    """What `server.json` says, once it is there."""
    until = time.monotonic() + seconds
    while not (out / "server.json").is_file():
        assert time.monotonic() < until
        time.sleep(0.05)
    return json.loads((out / "server.json").read_text())


@pytest.mark.parametrize(("protocol", "client"), PROTOCOLS)
def test_it_says_where_and_ends(tmp_path: Path, protocol, client):
    made: list = []

    def remembered(*args, **options):
        made.append(protocol(*args, **options))
        return made[0]

    thread = threading.Thread(target=partial(serve, Mean(), remembered, out=tmp_path, port=0, record={}))
    thread.start()
    told = announced(tmp_path)
    assert told["embodiment"] == "toy" and told["horizon"] == 4 and told["host"] == "127.0.0.1"
    with client(told["address"], robot=ROBOT) as policy:
        np.testing.assert_allclose(policy.act(observations(2), [5, 6]), Mean().act(observations(2), [5, 6]))
    with pytest.raises(ValueError, match="cannot serve at 127.0.0.1"):
        serve(Mean(), protocol, out=tmp_path / "other", port=told["port"], record={})
    made[0].stop()
    thread.join(5)
    assert not thread.is_alive() and not (tmp_path / "server.json").exists()
    assert "serving at" in (tmp_path / "serve.log").read_text()


def test_the_policy_computes_on_the_accelerator(tmp_path: Path, monkeypatch):
    class Heavy(torch.nn.Linear):
        robot, horizon = ROBOT, 4

        def act(self, observations, seeds):
            assert self.weight.device.type == "meta"
            return Mean().act(observations, seeds)

    class Ends(GrootServer):
        def run(self) -> None:
            self.stop()
            super().run()

    monkeypatch.setattr(precision, "best_device", lambda: torch.device("meta"))
    assert serve(Heavy(2, 3), Ends, out=tmp_path, port=0, record={})["horizon"] == 4


def test_an_empty_key_is_none(tmp_path: Path, monkeypatch):
    """Of a variable that is set to nothing: whoever shows none would be refused by one server, let in by the other."""
    keys: list = []

    class Ends:
        def __init__(self, policy, *, host, key, seed, port):
            keys.append(key)
            self.port, self.address = port, f"tcp://{host}:{port}"

        def run(self) -> None: ...

    monkeypatch.setenv("DREAMGEN_KEY", "")
    key = load("serve", ["experiment=smoke"])[0].stage.key
    serve(Mean(), Ends, out=tmp_path, host="0.0.0.0", port=1, key=key, record={})
    assert key == "" and keys == [None]
    assert "is open to everyone who reaches this machine: no key is set" in (tmp_path / "serve.log").read_text()


@pytest.mark.parametrize("protocol", [OpenpiServer, GrootServer])
def test_a_port_that_there_is_not(tmp_path: Path, protocol):
    with pytest.raises(ValueError, match="cannot serve at port 80000; choose one from 0"):
        serve(Mean(), protocol, out=tmp_path, port=80000, record={})


def test_two_servers_do_not_share_a_folder(tmp_path: Path):
    """Whichever ended first would take the other's `server.json` along."""
    script = SCRIPT.format(module="openpi", name="OpenpiServer")
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[2]) as process:
        try:
            told = announced(tmp_path)
            with pytest.raises(ValueError, match=rf"by another run \(process {process.pid} .*choose another `out`"):
                serve(Mean(), GrootServer, out=tmp_path, port=0, record={})
            assert announced(tmp_path) == told
            process.terminate()
            process.wait(15)
        finally:
            process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["serve.log"]


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background would ignore it
from dreamgen.serve.{module} import {name}
from dreamgen.stages.serve import serve
from tests.serve.toy import Mean
serve(Mean(), {name}, out=sys.argv[1], port=0, record={{}})
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize(("protocol", "client"), PROTOCOLS)
def test_a_signal_ends_it(tmp_path: Path, protocol, client, connected: bool, how: signal.Signals):
    script = SCRIPT.format(module=protocol.__module__.rpartition(".")[2], name=protocol.__name__)
    command, root = [sys.executable, "-c", script, str(tmp_path)], Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as process:
        try:
            told = announced(tmp_path)
            if not connected:
                process.send_signal(how)
            else:
                with client(told["address"], robot=ROBOT) as policy:
                    policy.act(observations(1), [5])
                    process.send_signal(how)
                    process.wait(15)
            error = process.communicate(timeout=15)[1]
        finally:
            process.kill()
    assert not (tmp_path / "server.json").exists()
    assert (process.returncode, error) == (0, "")
