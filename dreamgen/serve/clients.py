"""Servers as policies: whatever speaks one of the protocols can be evaluated, in a simulator or in a dream.

A server of ours says for which robot it was made; a client compares that with its own and names each difference. Of a
server of another stack the robot must be told, and the horizon of openpi's, which has no place for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment
from dreamgen.serve.asked import going_on
from dreamgen.serve.groot import to_groot, zeromq
from dreamgen.serve.openpi import keys, require_websockets, to_message
from dreamgen.serve.wire import pack_groot, pack_openpi, unpack_groot, unpack_openpi


def _require_chunk(chunk: Any, shape: tuple, where: str) -> np.ndarray:
    if not isinstance(chunk, np.ndarray) or chunk.shape != shape or not np.isfinite(chunk).all():
        got = f"shape {chunk.shape}" if isinstance(chunk, np.ndarray) else type(chunk).__name__
        raise ValueError(f"{where} sent actions of {got}; expected finite numbers of shape {shape}")
    return chunk.astype(np.float32)


def _prefix(told: Mapping[str, Any]) -> int | None:
    """What a server of ours says of going on from a chunk; None for one of another stack."""
    prefix = told.get("prefix")
    return int(prefix) if isinstance(prefix, int) else None


class _Remote:
    """A connection that is made on first use, so that a client can be handed to other processes."""

    _link: Any = None

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_link"}

    def _robot(self, contract: dict | None, robot: Embodiment | None, where: str) -> Embodiment:
        if robot is None and contract is None:
            raise ValueError(f"{where} does not say for which robot it is; give the embodiment: robot=...")
        if robot is not None and contract is not None:
            robot.require(contract, f"the policy at {where}")
        return robot or Embodiment.from_contract(contract)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the next question makes a new one."""
        if self._link is not None:
            self._link.close()
        self._link = None


class OpenpiPolicy(_Remote):
    """The policy behind `address` (ws://host:port), asked for one observation after another.

    names: keys of its observations (see `dreamgen.serve.openpi.keys`), for servers of another stack; the default is
    what the server's metadata says. timeout: seconds to wait for an answer.

    Raises ValueError: no server, a refused key, a server for another robot, an error that the server reports.
    """

    def __init__(
        self,
        address: str,
        *,
        robot: Embodiment | None = None,
        horizon: int | None = None,
        names: Mapping[str, Any] | None = None,
        key: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        require_websockets()
        self.address, self.key, self.timeout = address, key, timeout
        self.metadata = self._connect()
        self.robot = self._robot(self.metadata.get("contract"), robot, address)
        self.names = names or self.metadata.get("keys") or keys(self.robot)
        if horizon is None and "horizon" not in self.metadata:
            raise ValueError(f"{address} does not say how long its chunks are; give horizon=...")
        self.horizon = int(self.metadata["horizon"] if horizon is None else horizon)
        self.prefix = _prefix(self.metadata)
        self.timing: dict[str, float] = {}

    @classmethod
    def load(cls, path: str, *, robot: Embodiment | None = None, **options: Any) -> "OpenpiPolicy":
        """A policy whose "path" is its address, for the stages."""
        return cls(path, robot=robot, **options)

    def _connect(self) -> dict:
        from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException
        from websockets.sync.client import connect

        headers = {"Authorization": f"Api-Key {self.key}"} if self.key else None
        try:
            self._link = connect(self.address, compression=None, max_size=None, additional_headers=headers, proxy=None,
                                 open_timeout=self.timeout).__enter__()  # fmt: skip
            metadata = unpack_openpi(self._link.recv(self.timeout))
        except (OSError, InvalidURI, InvalidHandshake, WebSocketException) as error:
            raise ValueError(f"no openpi server answers at {self.address}: {error}") from None
        return metadata if isinstance(metadata, dict) else {}

    def act(self, observations: Sequence[Observation], seeds: Sequence[int]) -> Float32[np.ndarray, "b h a"]:
        """Action chunks in units; `timing` holds what the server said of the last."""
        return np.stack([self._ask(seen, seed) for seen, seed in zip(observations, seeds, strict=True)])

    def proceed(self, observations: Sequence[Observation], seeds: Sequence[int], rests: Sequence[np.ndarray], *,
                delay: int, mode: str, beta: float) -> Float32[np.ndarray, "b h a"]:  # fmt: skip
        """The same, going on from the rests of the last chunks; see `dreamgen.core.protocols.Continuing`."""
        each = zip(observations, seeds, rests, strict=True)
        return np.stack([self._ask(seen, seed, realtime=going_on([rest], delay, mode, beta))
                         for seen, seed, rest in each])  # fmt: skip

    def _ask(self, seen: Observation, seed: int, **more: Any) -> Float32[np.ndarray, "h a"]:
        from websockets.exceptions import ConnectionClosed

        if self._link is None:
            self._connect()
        try:
            self._link.send(pack_openpi({**to_message(seen, self.names), "seed": int(seed), **more}))
            reply = self._link.recv(self.timeout)
        except (ConnectionClosed, TimeoutError, OSError) as error:
            self.close()
            raise ValueError(f"the openpi server at {self.address} broke off: {error}") from None
        if isinstance(reply, str):
            raise ValueError(f"the openpi server at {self.address} refused the observation: {reply}")
        answer = unpack_openpi(reply)
        self.timing = answer.get("server_timing", {})
        return _require_chunk(answer["actions"], (self.horizon, self.robot.action_dim), self.address)


class GrootPolicy(_Remote):
    """The policy behind `address` (tcp://host:port), asked for whole batches.

    Raises ValueError: no answer within `timeout` seconds, a server for another robot or with other keys, an error that
    the server reports.
    """

    def __init__(
        self, address: str, *, robot: Embodiment | None = None, key: str | None = None, timeout: float = 60.0
    ) -> None:
        self.address, self.key, self.timeout = address, key, timeout
        modality = {name: node["as_json"] for name, node in self.ask("get_modality_config").items()}
        try:
            told = self.ask("contract")
        except ValueError:  # not one of ours
            told = {}
        self.robot, self.prefix = self._robot(told.get("contract"), robot, address), _prefix(told)
        self.horizon = len(modality["action"]["delta_indices"])
        for kind, wanted in (("video", self.robot.views), ("state", self.robot.state), ("action", self.robot.action)):
            here, there = [part.name for part in wanted], modality[kind]["modality_keys"]
            if sorted(here) != sorted(there):
                raise ValueError(f"the policy at {address} has the {kind} keys {there}; embodiment '{self.robot.name}' "
                                 f"has {here}")  # fmt: skip

    @classmethod
    def load(cls, path: str, *, robot: Embodiment | None = None, **options: Any) -> "GrootPolicy":
        """A policy whose "path" is its address, for the stages."""
        return cls(path, robot=robot, **options)

    def ask(self, endpoint: str, data: dict | None = None) -> Any:
        """One request; ValueError for an error or no answer."""
        zmq = zeromq()
        if self._link is None:
            self._link = zmq.Context.instance().socket(zmq.REQ)
            for option in (zmq.RCVTIMEO, zmq.SNDTIMEO):
                self._link.setsockopt(option, int(1000 * self.timeout))
            self._link.setsockopt(zmq.LINGER, 0)
            self._link.connect(self.address)
        request = {"endpoint": endpoint, **({} if data is None else {"data": data})}
        try:
            self._link.send(pack_groot(request | ({"api_token": self.key} if self.key else {})))
            reply = unpack_groot(self._link.recv())
        except zmq.ZMQError as error:
            self.close()  # a request without its reply blocks the next
            raise ValueError(f"no GR00T server answers at {self.address}: {error}") from None
        if isinstance(reply, dict) and "error" in reply:
            raise ValueError(f"the GR00T server at {self.address} says: {reply['error']}")
        return reply

    def act(self, observations: Sequence[Observation], seeds: Sequence[int]) -> Float32[np.ndarray, "b h a"]:
        """Action chunks in units."""
        return self._chunks(observations, seeds)

    def proceed(self, observations: Sequence[Observation], seeds: Sequence[int], rests: Sequence[np.ndarray], *,
                delay: int, mode: str, beta: float) -> Float32[np.ndarray, "b h a"]:  # fmt: skip
        """The same, going on from the rests of the last chunks; see `dreamgen.core.protocols.Continuing`."""
        return self._chunks(observations, seeds, realtime=going_on(rests, delay, mode, beta))

    def _chunks(self, observations: Sequence[Observation], seeds: Sequence[int], **more: Any) -> np.ndarray:
        options = {"seed": [int(seed) for seed in seeds], **more}
        action, _ = self.ask("get_action", {"observation": to_groot(observations, self.robot), "options": options})
        shape = (len(observations), self.horizon)
        return np.concatenate([_require_chunk(action.get(part.name), (*shape, part.width), self.address)
                               for part in self.robot.action], -1)  # fmt: skip
