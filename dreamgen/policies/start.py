"""Where the weights of a policy begin that goes on from another.

What all bodies share, the encoder and the transformer, is taken as it is; where an encoder has weights of each view and
looks at more of them than before, the others begin as the first. The way in and out of a body is taken of the
body of the same name, where both belong to the same robot, or of the one that is named; or it begins afresh, beside
statistics of the new robot's data. So a policy of several robots becomes one of a single, or learns another one.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamgen.core.manifest import RUN, read_json
from dreamgen.engine.state import holds, take_over, weights_of
from dreamgen.policies import checkpoint, regression
from dreamgen.policies.space import Space
from dreamgen.policies.spaces import owner

WAYS = ("encode_state.", "encode_action.", "decode_action.")  # weights of which each body has its own
INNER, COPY = "encoder.model.", "flare.target.model."  # the model inside an encoder, and in what gives FLARE's targets
# the axis of a body's weights along which narrower robots are padded: nothing is read of what lies there
PADDED = {"encode_state.layer1.weight": 0, "encode_action.layer1.weight": 0, "decode_action.layer2.weight": 1,
          "decode_action.layer2.bias": 1}  # fmt: skip


def begin(model: Any, out: Path, bodies: Mapping[str, str | None] | None = None) -> list[int]:
    """Give `model` the weights of the policy in `out`, or of its training that has not ended. bodies: for bodies of the
    model, the one of that policy as which they begin, None to begin afresh; for others it is the one of their name.

    Returns the bodies that begin afresh; a robot that has no others has no statistics, and these are to be fitted.
    Raises ValueError for a body of which is not clear how to begin, one that begins as one of other widths, statistics
    of chunks that were told otherwise, and where the rest is another model's.
    """
    out, asked = Path(out), dict(bodies or {})
    if not (out / "config.json").is_file():
        if asked:
            raise ValueError(f"stage.start_bodies is {asked}, and {out} is a training that has not ended, which does "
                             f"not say which bodies it has; leave it out to begin with all as they are")  # fmt: skip
        run = read_json(out / RUN).get("config", {}) if (out / RUN).is_file() else {}
        _require_told_alike(model, out, run.get("policy"), range(len(model.bodies)))
        if not holds(out):
            regression.begin(model, out)
            return []
        untrained = {name: value for name, value in model.state_dict().items() if name.startswith(INNER)}
        take_over(model, _copied(model, untrained | weights_of(out)), out)
        return []
    config, contracts = checkpoint.read(out)
    for name in asked:
        model.body(name)
    sources = [_source(model, out, name, config["bodies"], contracts, asked) for name in model.bodies]
    _require_told_alike(model, out, config, [k for k, source in enumerate(sources) if source is not None])
    numbers = [None if source is None else config["bodies"].index(source) for source in sources]
    weights = weights_of(out)
    for name, live in model.named_parameters():
        if name.startswith(WAYS) and name in weights:
            weights[name] = _ways(name, live.detach().cpu().clone(), weights[name], numbers)
    for each in getattr(model.encoder, "by_view", ()):
        rows = len(getattr(model.encoder, each))
        for saved in {"encoder." + each, "flare.target." + each} & weights.keys():
            weights[saved] = weights[saved].repeat(-(-rows // len(weights[saved])), 1)[:rows]
    weights = _copied(model, _statistics(model, weights, sources, config["robots"]))
    take_over(model, weights, out)
    return [k for k, source in enumerate(sources) if source is None]


def _source(model: Any, out: Path, name: str, there: list[str], contracts: Mapping[Any, dict],
            asked: Mapping[str, str | None]) -> str | None:  # fmt: skip
    """The body as which the body `name` of `model` begins."""
    robot = model.spaces.of(model.body(name)).robot
    if name in asked and asked[name] is None:
        return None
    source = asked.get(name, name)
    if source in there:
        other = contracts[source]
        if name not in asked and not robot.mismatches(other, learned=True):
            return name
        sizes = [robot.state_dim, robot.action_dim], [max((p["stop"] for p in other[key]), default=0)
                                                      for key in ("state", "action")]  # fmt: skip
        if name in asked and sizes[0] == sizes[1]:
            return source
        if name in asked:
            raise ValueError(f"the body '{name}' cannot begin as '{source}' of {out}: its states and actions have "
                             f"{sizes[0]} entries, those of '{source}' {sizes[1]}; stage.start_bodies={{{name}: null}} "
                             f"begins afresh")  # fmt: skip
    told = ", ".join(f"{body} of '{contracts[body]['name']}'" for body in there)
    raise ValueError(f"{out} has no body '{source}' of the robot '{robot.name}' with which the body '{name}' could "
                     f"begin; it has {told}. Name one of them, or null for fresh weights: "
                     f"stage.start_bodies={{{name}: ...}}")  # fmt: skip


def _require_told_alike(model: Any, out: Path, config: Any, bodies: Iterable[int]) -> None:
    """ValueError where chunks of `bodies`, whose statistics are those of `out`, mean something else to `model`; config:
    of that policy, as far as it is known."""
    mine = {key: model.config[key] for key in ("frame", "cumulative")}
    told = {key: (config if isinstance(config, Mapping) else {}).get(key, value) for key, value in mine.items()}
    for space in dict.fromkeys(model.spaces.of(body) for body in bodies):
        robot, made = space.robot, dict(horizon=model.horizon, state=space.state, action=space.action)
        other = Space(robot, **made, **told)
        if (space.summed, space.shifts) != (other.summed, other.shifts):
            raise ValueError(f"the policy in {out} tells chunks of the robot '{robot.name}' with policy.frame="
                             f"{told['frame']} and policy.cumulative={told['cumulative']}, and has its statistics so; "
                             f"here they are {mine['frame']} and {mine['cumulative']}. Set them alike, or begin its "
                             f"bodies afresh: stage.start_bodies={{...: null}}")  # fmt: skip


def _ways(name: str, live: Tensor, saved: Tensor, numbers: list[int | None]) -> Tensor:
    """The weights `name` of all bodies, by the number of the saved body as which each begins; as they were saved where
    they are of another model, which `take_over` will say."""
    keep = [k for k in range(live.ndim - 1) if k != PADDED.get(name)]
    if [live.shape[1 + k] for k in keep] != [saved.shape[1 + k] for k in keep]:
        return saved
    for own, number in zip(live, numbers, strict=True):
        if number is not None:
            corner = tuple(slice(min(sizes)) for sizes in zip(own.shape, saved[number].shape, strict=True))
            own[corner] = saved[number][corner]
    return live


def _copied(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with as many copies of the model inside an encoder as `model` has (see `flare.follower`): that of
    FLARE's targets begins as the encoder's own where there is none, and is left out where it is one with that."""
    here = model.state_dict()
    kept = {name: value for name, value in weights.items() if name in here or not name.startswith(COPY)}
    lacking = {name: INNER + name.removeprefix(COPY) for name in here if name.startswith(COPY) and name not in kept}
    return kept | {name: weights[own] for name, own in lacking.items() if own in weights}


def _place(of: str | None) -> dict[str, str]:
    """Where the statistics of a robot lie: of the policy's own (None) and of that of a body."""
    return {kind: f"normalise_{kind}." if of is None else f"other_normalisers.{of}.{kind}."
            for kind in ("state", "action")}  # fmt: skip


def _statistics(model: Any, weights: dict[str, Tensor], sources: list[str | None],
                robots: Mapping[str, Any]) -> dict[str, Tensor]:  # fmt: skip
    """The weights with each robot's statistics at its place, those of the first of its bodies that does not begin
    afresh; of a robot that has none, as `model` has them."""
    kept = {name: value for name, value in weights.items() if not name.startswith(("normalise_", "other_normalisers."))}
    owners = [owner(name, model.config["robots"]) for name in model.bodies]
    for of in dict.fromkeys(owners):
        mine = [k for k, other in enumerate(owners) if other == of]
        source = next((sources[k] for k in mine if sources[k] is not None), None)
        if source is None:
            here = tuple(_place(of).values())
            kept |= {name: value for name, value in model.state_dict().items() if name.startswith(here)}
            continue
        for kind, there in _place(owner(source, robots)).items():
            here = _place(of)[kind]
            kept |= {
                here + name.removeprefix(there): value for name, value in weights.items() if name.startswith(there)
            }
    return kept
