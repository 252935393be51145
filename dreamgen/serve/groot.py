"""The GR00T protocol: ZeroMQ requests and replies, one msgpack map each.

A request is {"endpoint": name, "data": {...}, ["api_token": key]}. Endpoints: ping, kill, get_action -> [action, info],
reset, get_modality_config, and ours, contract. What cannot be answered gets {"error": text}. N1.6 and later speak so;
N1.5 has flat observations, which are refused, and sends the `as_json` of a modality, here a map, as text.

Observations are {"video": {view: (B, T, H, W, 3) uint8}, "state": {part: (B, T, D) float32}, "language": {key:
[[text]]}} under any one key, of which the last step T counts; actions are {part: (B, T, D) float32} in the units of the
embodiment. Options of get_action: {"seed": int or [int], "realtime": {"rests": [(p, a)], "delay": int, "mode": text,
"beta": float}}; `realtime` (ours) has each row go on from the rest of its last chunk.
"""

import hmac
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.protocols import Policy
from dreamgen.core.seeding import seed_for
from dreamgen.serve.asked import answer, instruction_of, named, require_port, said, seed_of
from dreamgen.serve.wire import pack_groot, peek, unpack_groot

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost")
LANGUAGE = "task"  # what our server calls its instruction


def zeromq() -> Any:
    """The package; ValueError that names the extra where it is missing."""
    try:
        import zmq
    except ImportError:
        raise ValueError("the GR00T protocol needs pyzmq: pip install -e '.[serve]' in dreamgen's folder") from None
    return zmq


def modality_config(robot: Embodiment, horizon: int) -> dict[str, Any]:
    """The modalities as GR00T names them: keys of each, and the steps that are looked at or predicted."""
    found = {
        "video": ([view.name for view in robot.views], [0]),
        "state": ([part.name for part in robot.state], [0]),
        "action": ([part.name for part in robot.action], list(range(horizon))),
        "language": ([LANGUAGE], [0]),
    }
    return {name: {"__ModalityConfig_class__": True, "as_json": {"delta_indices": steps, "modality_keys": names}}
            for name, (names, steps) in found.items()}  # fmt: skip


def to_groot(seen: Sequence[Observation], robot: Embodiment, language: str = LANGUAGE) -> dict[str, Any]:
    """A batch of observations as one message, with T = 1; language: key of the instruction."""
    return {
        "video": {view.name: np.stack([o.views[view.name] for o in seen])[:, None] for view in robot.views},
        "state": {part.name: np.stack([o.state[part.slice] for o in seen])[:, None].astype(np.float32)
                  for part in robot.state},
        "language": {language: [[o.instruction] for o in seen]},
    }  # fmt: skip


def _group(observation: dict, kind: str, names: Sequence[str]) -> dict:
    """The map under `kind`, which must have all `names`."""
    group = observation.get(kind)
    if not isinstance(group, dict):
        raise ValueError(f"the observation's {kind} is {type(group).__name__}; expected a map with {list(names)}")
    if missing := [name for name in names if name not in group]:
        raise ValueError(f"the observation's {kind} lacks {missing}; it is {said(group)}; expected {list(names)}")
    return group


def _entry(group: dict, kind: str, name: str, axes: int) -> np.ndarray:
    """The last step of one array: (B, ...)."""
    value = group[name]
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or value.ndim != axes or 0 in value.shape:
        got = f"{value.shape} {value.dtype}" if isinstance(value, np.ndarray) else f"{type(value).__name__}"
        raise ValueError(f"'{name}' of the observation's {kind} is {got}; expected an array "
                         f"({'B, T, H, W, 3' if axes == 5 else 'B, T, D'})")  # fmt: skip
    return value[:, -1]


def _texts(observation: dict) -> list[str]:
    group = observation.get("language")
    values = list(group.values()) if isinstance(group, dict) else []
    if len(values) != 1 or not isinstance(values[0], list | tuple) or not values[0]:
        raise ValueError(f"the observation's language is {said(group)}; expected {{'{LANGUAGE}': [[text], ...]}}")
    texts = [row[-1] if isinstance(row, list | tuple) and row else row for row in values[0]]
    return [instruction_of(text, "the observation's language") for text in texts]


def from_groot(observation: Any, robot: Embodiment) -> list[Observation]:
    """The inverse of `to_groot`. Raises ValueError that names what is missing or has another shape."""
    if not isinstance(observation, dict):
        raise ValueError(f"the observation is {type(observation).__name__}; expected a map of video, state, language")
    if any(isinstance(key, str) and key.startswith(("video.", "state.")) for key in observation):
        raise ValueError(f"the observation has flat keys, as of N1.5: it is {said(observation)}; expected the maps "
                         f"video, state, language")  # fmt: skip
    texts = _texts(observation)
    video = _group(observation, "video", [view.name for view in robot.views])
    states = _group(observation, "state", [part.name for part in robot.state]) if robot.state else {}
    views = {view.name: _entry(video, "video", view.name, 5) for view in robot.views}
    for view in robot.views:
        view.require(views[view.name][0])
    parts = [_entry(states, "state", part.name, 3) for part in robot.state]
    for part, value in zip(robot.state, parts, strict=True):
        if value.shape[1] != part.width:
            raise ValueError(f"'{part.name}' of the observation's state is {value.shape[1]} wide; embodiment "
                             f"'{robot.name}' has {part.width}")  # fmt: skip
    sizes = {len(texts), *(len(value) for value in [*views.values(), *parts])}
    if len(sizes) != 1:
        raise ValueError(f"the observation holds batches of {sorted(sizes)} rows; expected one size")
    state = np.concatenate(parts, 1).astype(np.float32) if parts else np.zeros((len(texts), 0), np.float32)
    return [Observation(views={name: value[i] for name, value in views.items()}, state=state[i], instruction=text)
            for i, text in enumerate(texts)]  # fmt: skip


class GrootServer:
    """`policy` at tcp://host:port. Use as a context, or `run()` until `stop()` is called from another thread.

    port: 0 takes a free one; `port` then says which. key: requests must hold it as api_token, which is looked at before
    their data are unpacked; None admits all. max_mb: largest request; a frame of four times as much is not even read.
    ZeroMQ itself keeps all frames of a message until the last has come, and limits neither their sum nor the number of
    connections: let only hosts you trust reach a port beyond loopback. `kill` is refused to strangers: where the server
    is bound beyond loopback, it needs a key. max_rows: most observations in a request.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        host: str = "127.0.0.1",
        port: int = 5555,
        key: str | None = None,
        max_mb: float = 64,
        max_rows: int = 256,
        seed: int = 0,
    ) -> None:
        zmq = zeromq()
        require_port(port)
        self.policy, self.host, self.key, self.seed, self.max_rows = policy, host, key, seed, max_rows
        self.named = named(policy)
        self.most = int(max_mb * 2**20)
        self._running, self._served, self._thread = True, 0, None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 4 * self.most)
        self._socket.setsockopt(zmq.RCVHWM, 1)  # of a client that does not wait for its answer; ZeroMQ would keep 1000
        try:
            self._socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            self._close()
            raise ValueError(f"cannot serve at {host}:{port}: {error}; choose another host or port") from None
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    @property
    def address(self) -> str:
        """What a client takes."""
        return f"tcp://{self.host}:{self.port}"

    def run(self) -> None:
        """Serve until `stop` or the endpoint `kill`."""
        try:
            while self._running:
                if self._socket.poll(100):
                    self._socket.send(self._reply(*self._receive()))
        finally:
            self._close()

    def _receive(self) -> tuple[bytes, int]:
        """The first frame of a message, and how many it had; the others are let go one by one."""
        frame, count = self._socket.recv(), 1
        while self._socket.rcvmore:
            self._socket.recv(copy=False)
            count += 1
        return frame, count

    def _close(self) -> None:
        self._socket.close()
        self._context.term()

    def stop(self) -> None:
        """End `run`."""
        self._running = False

    def __enter__(self) -> "GrootServer":
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        if self._thread:
            self._thread.join()

    def _reply(self, frame: bytes, frames: int) -> bytes:
        try:
            if frames != 1 or len(frame) > self.most:
                raise ValueError(f"a request of {frames} frames, the first of {len(frame)} bytes; expected one frame "
                                 f"of at most {self.most} bytes")  # fmt: skip
            self._admit(frame)
            return pack_groot(self._answer(unpack_groot(frame)))
        except ValueError as error:
            log.warning("refused: %s", error)
            return pack_groot({"error": str(error)})
        except Exception as error:  # a fault of the policy's must not take the robot's server down
            log.exception("the policy failed")
            return pack_groot({"error": f"the policy failed: {type(error).__name__}: {error}"})

    def _admit(self, frame: bytes) -> None:
        """ValueError for a request without the key."""
        if self.key is None:
            return
        shown = peek(frame, "api_token")
        if not isinstance(shown, str) or not hmac.compare_digest(shown.encode(), self.key.encode()):
            raise ValueError("Unauthorized: Invalid API token")

    def _answer(self, request: Any) -> Any:
        if not isinstance(request, dict):
            raise ValueError(f"a request of type {type(request).__name__}; expected a map with an endpoint")
        endpoint, data = request.get("endpoint", "get_action"), request.get("data")
        match endpoint:
            case "ping":
                return {"status": "ok", "message": "Server is running"}
            case "kill":
                if self.key is None and self.host not in LOOPBACK:
                    raise ValueError("kill is refused: this server has no key and is bound beyond loopback")
                self.stop()
                return None
            case "reset":
                return {}
            case "get_modality_config":
                return modality_config(self.policy.robot, self.policy.horizon)
            case "contract":
                return {"contract": self.policy.robot.contract(), "horizon": self.policy.horizon,
                        "prefix": getattr(self.policy, "prefix", None), "policy": self.named}  # fmt: skip
            case "get_action":
                return self._act(data if isinstance(data, dict) else {})
        raise ValueError(f"Unknown endpoint: {said(endpoint)}")

    def _act(self, data: dict) -> list:
        """[action, info] of an observation, which lies under "observation" or is the data itself."""
        seen = from_groot(data.get("observation", data), self.policy.robot)
        if len(seen) > self.max_rows:
            raise ValueError(f"the request holds {len(seen)} observations; expected at most {self.max_rows}")
        options = data.get("options") if "observation" in data else None
        options = options if isinstance(options, dict) else {}
        asked = options.get("seed")
        each = asked if isinstance(asked, list) else [asked] * len(seen)
        if len(each) != len(seen):
            raise ValueError(f"{len(each)} seeds came with {len(seen)} observations; expected one each")
        begun = time.monotonic()
        seeds = [seed_of(value, seed_for(self.seed, "serve", self._served, i)) for i, value in enumerate(each)]
        self._served += 1
        chunk = answer(self.policy, seen, seeds, options.get("realtime"))
        action = {part.name: np.ascontiguousarray(chunk[..., part.slice]) for part in self.policy.robot.action}
        return [action, {"server_timing": {"infer_ms": 1000 * (time.monotonic() - begun)}}]
