"""A policy that robots can ask over the network. Where it listens is written to `server.json` once it does."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dreamgen.core.clip import Observation
from dreamgen.core.lock import LOCK, hold
from dreamgen.core.manifest import write_json
from dreamgen.core.protocols import Policy
from dreamgen.engine.precision import place
from dreamgen.engine.progress import file_logger
from dreamgen.serve.groot import LOOPBACK


def serve(
    policy: Policy,
    protocol: Callable[..., Any],
    *,
    out: Path,
    host: str = "127.0.0.1",
    port: int | None = None,
    key: str | None = None,
    seed: int = 0,
    record: dict,
) -> dict:
    """Serve `policy` over `protocol` until it is interrupted, terminated or told to stop.

    protocol: makes the server (`dreamgen.serve`). host: an address of this machine; only programs on this machine
    reach the default, 0.0.0.0 is open to all. port: null takes the protocol's own, 0 any free one. key: what clients
    must show; an empty one is none. The policy is asked once before the port opens, so that the first robot does not
    wait.

    Returns what `server.json` holds: host, port, address, horizon, embodiment. Raises ValueError for an address that
    is taken, a port that there is not, and where another server writes to `out`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with hold(out):
        try:
            return _serve(policy, protocol, out, host, port, key or None, seed)
        finally:
            (out / LOCK).unlink(missing_ok=True)


def _serve(policy: Policy, protocol: Callable[..., Any], out: Path, host: str, port: int | None, key: str | None,
           seed: int) -> dict:  # fmt: skip
    log = file_logger("serve", out / "serve.log")
    robot = policy.robot
    place(policy)
    blank = {view.name: np.zeros((view.height, view.width, 3), np.uint8) for view in robot.views}
    policy.act([Observation(views=blank, state=np.zeros(robot.state_dim, np.float32), instruction="")], [0])
    try:
        server = protocol(policy, host=host, key=key, seed=seed, **({} if port is None else {"port": port}))
    except OSError as error:
        raise ValueError(f"cannot serve at {host}:{port}: {error}; choose another host or port") from None
    if host not in LOOPBACK and key is None:
        log.warning("%s is open to everyone who reaches this machine: no key is set", server.address)
    answer = {"host": host, "port": server.port, "address": server.address, "horizon": policy.horizon,
              "embodiment": robot.name}  # fmt: skip
    ours = threading.current_thread() is threading.main_thread()
    ends = (signal.SIGTERM, signal.SIGINT) if ours else ()
    before = {end: signal.signal(end, lambda *_: threading.Thread(target=server.stop).start()) for end in ends}
    try:
        write_json(out / "server.json", answer)
        log.info("serving at %s", server.address)
        server.run()
    finally:
        (out / "server.json").unlink(missing_ok=True)
        for end, handler in before.items():
            signal.signal(end, handler)
    return answer
