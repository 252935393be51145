"""The openpi protocol: a websocket on which observations come in and action chunks go out.

The server speaks first: its metadata (the robot's contract, the horizon, the keys of an observation, what names the
policy). Then each frame

    {"observation/<view>": (h, w, 3) uint8, ..., "observation/state": (d,), "prompt": text, ["seed": int],
     ["realtime": {"rests": [(p, a)], "delay": int, "mode": text, "beta": float}]}

is answered with {"actions": (H, a) float32 in units, "server_timing": {infer_ms, prev_total_ms}}. `realtime` (ours)
has the chunk go on from the rest of the last one; metadata say with which prefixes the policy was trained for that. A
frame that cannot be used is answered with a string that says why, and the connection stays open; a frame over `max_mb`
closes it (1009). Frames are unpacked one at a time, whatever the number of connections, and of each connection at most
two wait. GET /healthz says OK. With a key, the handshake must bring `Authorization: Api-Key <key>`.

A robot that speaks to another server keeps its keys: see `dreamgen.serve.messages`.
"""

import hmac
import http
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from dreamgen.core.protocols import Policy
from dreamgen.core.seeding import seed_for
from dreamgen.serve.asked import answer, named, require_port, seed_of
from dreamgen.serve.messages import from_message, keys, require_names
from dreamgen.serve.wire import pack_openpi, unpack_openpi

log = logging.getLogger(__name__)


def require_websockets() -> None:
    """ValueError that names the extra where the package is missing."""
    try:
        import websockets  # noqa: F401
    except ImportError:
        raise ValueError(
            "the openpi protocol needs websockets: pip install -e '.[serve]' in dreamgen's folder"
        ) from None


class OpenpiServer:
    """`policy` at ws://host:port. Use as a context, or `run()` until `stop()` is called from another thread.

    port: 0 takes a free one; `port` then says which. key: clients must show it; None admits all. max_mb: largest frame.
    clients: connections at a time; others are told 503. Requests of all connections are served one after another.
    names: keys of an observation, as the robot has them; None: `keys`. instruction: of a robot that sends no prompt.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        key: str | None = None,
        max_mb: float = 64,
        clients: int = 16,
        names: Mapping[str, Any] | None = None,
        instruction: str | None = None,
        seed: int = 0,
    ) -> None:
        require_websockets()
        require_port(port)
        from websockets.sync.server import serve

        self.policy, self.host, self.key, self.seed, self.limit = policy, host, key, seed, clients
        self.names = keys(policy.robot) if names is None else require_names(names, policy.robot)
        self.instruction = instruction
        self.metadata = {"contract": policy.robot.contract(), "horizon": policy.horizon, "keys": self.names,
                         "prefix": getattr(policy, "prefix", None), "policy": named(policy)}  # fmt: skip
        self._turn, self._count, self._served = threading.Lock(), threading.Lock(), 0
        self._thread: threading.Thread | None = None
        # without an origin: a page in a browser on this machine is no robot; a queue: websockets would keep 16 frames
        self._server = serve(self._talk, host, port, compression=None, max_size=int(max_mb * 2**20), origins=[None],
                             max_queue=1, process_request=self._admit)  # fmt: skip
        self.port = self._server.socket.getsockname()[1]
        self._open = 0

    @property
    def address(self) -> str:
        """What a client takes."""
        return f"ws://{self.host}:{self.port}"

    def run(self) -> None:
        """Serve until `stop`, then end all connections."""
        try:
            self._server.serve_forever()
        finally:
            self._server.shutdown()

    def stop(self) -> None:
        """End `run` and all connections, and wait for that: not from the thread of `run`, nor a signal's handler."""
        self._server.shutdown()

    def __enter__(self) -> "OpenpiServer":
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        if self._thread:
            self._thread.join()

    def _admit(self, connection: Any, request: Any) -> Any:
        """Answer health checks; refuse who shows no key, and more clients than there are places for."""
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        shown = request.headers.get_all("Authorization")
        if self.key is not None and not (
            len(shown) == 1 and hmac.compare_digest(shown[0].encode(errors="replace"), f"Api-Key {self.key}".encode())
        ):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "expected the header Authorization: Api-Key ...\n")
        if self._open >= self.limit:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"all {self.limit} places are taken\n")
        return None

    def _talk(self, connection: Any) -> None:
        """One client, in a thread of its own."""
        from websockets.exceptions import ConnectionClosed

        with self._count:
            self._open += 1
        before: float | None = None
        try:
            connection.send(pack_openpi(self.metadata))
            while True:
                frame = connection.recv()
                begun = time.monotonic()
                connection.send(self._answer(frame, before))
                before = time.monotonic() - begun
        except ConnectionClosed as closed:
            log.info("a client left: %s", closed)
        finally:
            with self._count:
                self._open -= 1

    def _answer(self, frame: bytes | str, before: float | None) -> bytes | str:
        """The reply to one frame: a packed chunk, or text that says what is wrong."""
        try:
            if isinstance(frame, str):
                raise ValueError("a text frame; expected a msgpack frame")
            with self._turn:
                message = unpack_openpi(frame)
                seen = from_message(message, self.policy.robot, self.names, self.instruction)
                begun = time.monotonic()
                seed = seed_of(message.get("seed"), seed_for(self.seed, "serve", self._served))
                self._served += 1
                actions = answer(self.policy, [seen], [seed], message.get("realtime"))[0]
                timing = {"infer_ms": 1000 * (time.monotonic() - begun)}
            if before is not None:
                timing["prev_total_ms"] = 1000 * before
            return pack_openpi({"actions": actions, "server_timing": timing})
        except ValueError as error:
            log.warning("refused: %s", error)
            return f"ValueError: {error}"
        except Exception as error:  # a fault of the policy's must not take the robot's server down
            log.exception("the policy failed")
            return f"the policy failed: {type(error).__name__}: {error}"
