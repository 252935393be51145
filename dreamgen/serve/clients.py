"""Servers as policies: whatever speaks one of the protocols can be evaluated, in a simulator or in a dream.

A server of ours says for which robot it was made; a client compares that with its own and names each difference. Of a
server of another stack the robot must be told, and the horizon of openpi's, which has no place for it. Where a
connection has to be made anew, another policy than before is refused. A server's key, where none is given, is what the
environment variable DREAMGEN_KEY holds.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float32

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import differences
from dreamgen.serve.asked import going_on
from dreamgen.serve.groot import LANGUAGE, to_groot, zeromq
from dreamgen.serve.messages import keys, to_message
from dreamgen.serve.openpi import require_websockets
from dreamgen.serve.wire import pack_groot, pack_openpi, unpack_groot, unpack_openpi

ACTING = frozenset(["compile", "euler_steps", "speaks"])  # settings of a policy that is loaded from a directory
TOLD = ("policy", "horizon", "keys", "prefix", "modality")  # what a server says of itself, beside its contract


def _require_chunk(chunk: Any, shape: tuple, where: str) -> np.ndarray:
    plain = isinstance(chunk, np.ndarray) and chunk.dtype.kind in "iuf"
    if not plain or chunk.shape != shape or not np.isfinite(chunk).all():
        got = f"type {chunk.dtype}" if isinstance(chunk, np.ndarray) else type(chunk).__name__
        got = f"shape {chunk.shape}" if plain else got
        raise ValueError(f"{where} sent actions of {got}; expected finite numbers of shape {shape}")
    return chunk.astype(np.float32)


def _prefix(told: Mapping[str, Any]) -> int | None:
    """What a server of ours says of going on from a chunk; None for one of another stack."""
    prefix = told.get("prefix")
    return int(prefix) if isinstance(prefix, int) else None


def _key(given: str | None) -> str | None:
    return given or os.environ.get("DREAMGEN_KEY") or None


def _require_map(value: Any, wanted: Sequence[str], where: str) -> dict:
    """`value`, which must be a map with the keys `wanted`; ValueError says what `where` sent instead."""
    if not isinstance(value, dict) or any(key not in value for key in wanted):
        got = f"a map of {sorted(map(str, value))!s:.200}" if isinstance(value, dict) else f"{type(value).__name__}"
        raise ValueError(f"{where} sent {got}; expected a map with {', '.join(wanted)}")
    return value


def _modality(node: Any, where: str) -> tuple[list, list]:
    """The steps and the keys of one modality; `as_json` is a map (N1.6) or text (N1.5)."""
    told = _require_map(node, ["as_json"], where)["as_json"]
    try:
        told = json.loads(told) if isinstance(told, str) else told
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} sent a modality that is no JSON: {error}") from None
    told = _require_map(told, ["delta_indices", "modality_keys"], where)
    steps, names = told["delta_indices"], told["modality_keys"]
    if not isinstance(steps, list) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where} sent a modality of delta_indices {steps!r:.80}, modality_keys {names!r:.80}; "
                         f"expected two lists, the second of text")  # fmt: skip
    return steps, names


class _Remote:
    """A connection that is made on first use, so that a client can be handed to other processes."""

    _link: Any = None
    metadata: dict[str, Any]

    @property
    def served(self) -> str | None:
        """What the server calls its policy; None where it does not say (one of another stack)."""
        told = self.metadata.get("policy")
        return told if isinstance(told, str) else None

    @classmethod
    def load(cls: Any, path: str, *, robot: Embodiment | None = None, **options: Any) -> Any:
        """A policy whose "path" is its address, for the stages; options of None are left out. ValueError for those of
        `ACTING`: how a policy acts is said where it is served."""
        given = {name: value for name, value in options.items() if value is not None}
        if meant := sorted(given.keys() & ACTING):
            raise ValueError(f"the policy at {path} acts as its server says; set {', '.join(meant)} there")
        return cls(path, robot=robot, **given)

    def _require_same(self, before: dict, now: dict, where: str) -> None:
        """ValueError that names in what a server says something else of itself than `before`."""
        with self._kept_if_right():
            self._robot(now.get("contract"), self.robot, where)
            if changed := differences(*({name: told.get(name) for name in TOLD} for told in (before, now))):
                raise ValueError(f"{where} serves another policy since the connection was made anew: {changed}; make a "
                                 f"new client")  # fmt: skip

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_link"}

    def _robot(self, contract: Any, robot: Embodiment | None, where: str) -> Embodiment:
        if robot is None and contract is None:
            raise ValueError(f"{where} does not say for which robot it is; give the embodiment: robot=...")
        try:
            if robot is not None and contract is not None:
                robot.require(contract, f"the policy at {where}")
            return robot or Embodiment.from_contract(contract)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} sent a contract that describes no robot: {error!r:.200}") from None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _kept_if_right(self) -> Iterator[None]:
        """A context in which a ValueError ends the connection: it would hold one of the server's places for good."""
        try:
            yield
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """End the connection; the next question makes a new one."""
        if self._link is not None:
            self._link.close()
        self._link = None


class OpenpiPolicy(_Remote):
    """The policy behind `address` (ws://host:port), asked for one observation after another.

    names: keys of its observations (see `dreamgen.serve.messages`), for servers of another stack; the default is
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
        self.address, self.key, self.timeout = address, _key(key), timeout
        self.metadata = self._connect()
        with self._kept_if_right():
            self._introduce(robot, horizon, names)
        self.prefix = _prefix(self.metadata)
        self.timing: dict[str, float] = {}

    def _introduce(self, robot: Embodiment | None, horizon: int | None, names: Mapping[str, Any] | None) -> None:
        """Take the robot, the keys and the horizon as told, or else as the server says."""
        address = self.address
        self.robot = self._robot(self.metadata.get("contract"), robot, address)
        found = names or self.metadata.get("keys") or keys(self.robot)
        self.names = _require_map(found, ["views", "state", "prompt"], f"{address}, as the keys of an observation,")
        _require_map(self.names["views"], [], f"{address}, as the keys of the views,")
        if not isinstance(self.names["state"], str):
            parts = [part.name for part in self.robot.state]
            _require_map(self.names["state"], parts, f"{address}, as the keys of the state,")
        if horizon is None and "horizon" not in self.metadata:
            raise ValueError(f"{address} does not say how long its chunks are; give horizon=...")
        told = self.metadata["horizon"] if horizon is None else horizon
        if isinstance(told, bool) or not isinstance(told, int | np.integer) or told < 1:
            raise ValueError(f"{address} has chunks of {told!r:.40} steps; expected a whole number from 1")
        self.horizon = int(told)

    def _connect(self) -> dict:
        from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException
        from websockets.sync.client import connect

        headers = {"Authorization": f"Api-Key {self.key}"} if self.key else None
        try:
            self._link = connect(self.address, compression=None, max_size=None, additional_headers=headers, proxy=None,
                                 open_timeout=self.timeout).__enter__()  # fmt: skip
            frame = self._link.recv(self.timeout)
        except (OSError, InvalidURI, InvalidHandshake, WebSocketException) as error:
            self.close()
            raise ValueError(f"no openpi server answers at {self.address}: {error}") from None
        with self._kept_if_right():
            return _require_map(unpack_openpi(frame), [], f"{self.address}, as its metadata,")

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
            self._require_same(self.metadata, self._connect(), self.address)
        try:
            self._link.send(pack_openpi({**to_message(seen, self.names, self.robot), "seed": int(seed), **more}))
            reply = self._link.recv(self.timeout)
        except (ConnectionClosed, TimeoutError, OSError) as error:
            self.close()
            raise ValueError(f"the openpi server at {self.address} broke off: {error}") from None
        if isinstance(reply, str):
            raise ValueError(f"the openpi server at {self.address} refused the observation: {reply}")
        answer = _require_map(unpack_openpi(reply), ["actions"], f"the openpi server at {self.address}")
        self.timing = answer.get("server_timing", {})
        return _require_chunk(answer["actions"], (self.horizon, self.robot.action_dim), self.address)


class GrootPolicy(_Remote):
    """The policy behind `address` (tcp://host:port), asked for whole batches.

    Raises ValueError: no answer within `timeout` seconds, a server for another robot, with other keys, of several
    instructions or that looks at more than the present, an error that the server reports.
    """

    def __init__(
        self, address: str, *, robot: Embodiment | None = None, key: str | None = None, timeout: float = 60.0
    ) -> None:
        self.address, self.key, self.timeout = address, _key(key), timeout
        with self._kept_if_right():
            self.metadata = self._introduced()
            modality = self.metadata["modality"]
            self.robot, self.prefix = self._robot(self.metadata.get("contract"), robot, address), _prefix(self.metadata)
            self.horizon = len(modality["action"][0])
            each = (("video", self.robot.views), ("state", self.robot.state), ("action", self.robot.action))
            for kind, wanted in each:
                here, there = [part.name for part in wanted], modality[kind][1]
                if sorted(here) != sorted(there):
                    raise ValueError(f"the policy at {address} has the {kind} keys {there}; embodiment "
                                     f"'{self.robot.name}' has {here}")  # fmt: skip
                steps = modality[kind][0]
                if kind != "action" and wanted and len(steps) != 1:
                    raise ValueError(f"the policy at {address} looks at {len(steps)} steps of {kind} (delta_indices "
                                     f"{steps!s:.80}); expected one, for this client sends the present alone: serve a "
                                     f"policy that looks at no others")  # fmt: skip
            names = modality["language"][1] if "language" in modality else [LANGUAGE]
            if len(names) != 1:
                raise ValueError(f"the policy at {address} has the language keys {names}; expected one instruction")
            self.language = names[0]

    def _introduced(self) -> dict[str, Any]:
        """What the server says of itself: its modality, and one of ours its contract, horizon and prefix."""
        where = f"the GR00T server at {self.address}"
        nodes = _require_map(self.ask("get_modality_config"), ["video", "state", "action"], where)
        kinds = [kind for kind in ("video", "state", "action", "language") if kind in nodes]
        modality = {kind: _modality(nodes[kind], where) for kind in kinds}
        try:
            told = self.ask("contract")
        except ValueError:
            if self._link is None:  # no answer; any other error says that it is none of ours
                raise
            told = None
        return {**(told if isinstance(told, dict) else {}), "modality": modality}

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
        if self._link is None:
            with self._kept_if_right():
                self._require_same(self.metadata, self._introduced(), self.address)
        options = {"seed": [int(seed) for seed in seeds], **more}
        seen = to_groot(observations, self.robot, self.language)
        reply = self.ask("get_action", {"observation": seen, "options": options})
        where, parts = f"the GR00T server at {self.address}", self.robot.action
        if not isinstance(reply, list | tuple) or len(reply) != 2:
            got = f"a list of {len(reply)}" if isinstance(reply, list | tuple) else type(reply).__name__
            raise ValueError(f"{where} answered get_action with {got}; expected [action, info]")
        action, shape = _require_map(reply[0], [part.name for part in parts], where), (len(observations), self.horizon)
        return np.concatenate([_require_chunk(action[part.name], (*shape, part.width), self.address)
                               for part in parts], -1)  # fmt: skip
