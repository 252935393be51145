"""What to dream: first frames x instructions x seeds. Each class is a list maker; its fields are the recipe.

First frames of datasets and simulators are read when they are dreamed (`Draft`), those of pictures with the list.

`every_instruction` puts each first frame under every instruction (counterfactuals); prompts of one first frame share
`pair`. A prompt's seed depends on its id alone, so a list may grow without changing what it held.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dreamgen.core.clip import Draft, Episode, Prompt, read_prompts
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import fingerprint
from dreamgen.core.protocols import Sim
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.states import state_in_dream
from dreamgen.data.video_rate import shown_rows
from dreamgen.video.tiling import fit, tile

ORIGIN = ("sim", "seed", "instruction", "video")  # what a first frame takes along of its episode's meta


def _spread(frames: Sequence[dict], instructions: Sequence[str], *, every: bool, count: int, seed: int) -> list[Draft]:
    """Drafts of first frames (dicts of first, origin, pair, own instruction), `count` seeds each."""
    made = []
    for frame in frames:
        texts = list(dict.fromkeys(instructions)) if every else [frame["instruction"]]
        for number, text in enumerate(texts):
            for repeat in range(count):
                name = f"{frame['pair']}_i{number:02d}_s{repeat}" if every else f"{frame['pair']}_s{repeat}"
                made.append(Draft(id=name, first=frame["first"], instruction=text, pair=frame["pair"],
                                  seed=seed_for(seed, "dream", name, text), origin=frame["origin"]))  # fmt: skip
    return made


def _require_text(instructions: Sequence[object], where: str) -> list[str]:
    bad = [text for text in instructions if not isinstance(text, str) or not text.strip()]
    if bad or not instructions:
        raise ValueError(f"{where}: instructions hold {bad or 'nothing'}; expected text that is not empty")
    return [str(text) for text in instructions]


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetPrompts:
    """First frames from the episodes of a dataset.

    episodes: how many (None: all), drawn by the seed. keyframes: where in each of them, shares of its rows in [0, 1); 0
    is its first row; of labelled video, the row of the picture that is shown there. commanded: at a later one the state
    is that to which commands have led, as in a dream that began with the episode, instead of the measured one.
    instructions: default those of the dataset. ValueError for another share.
    """

    dataset: Dataset
    episodes: int | None = None
    keyframes: Sequence[float | int] = (0,)
    commanded: bool | None = None
    instructions: Sequence[str] | None = None
    every_instruction: bool = False
    repeats: int = 1
    seed: int = 0

    @property
    def source(self) -> Path:
        """What the first frames are taken from."""
        return self.dataset.root

    def __call__(self) -> list[Draft]:
        data = self.dataset
        if self.commanded:
            data.require_actions("prompts.commanded")
        given = self.instructions is not None  # then a dataset's own may be unknown
        own = [data.episode(i).instruction if given else data.instruction(i) for i in range(len(data))]
        texts = _require_text(list(self.instructions), "prompts") if given else list(dict.fromkeys(own))
        chosen = rng_for(self.seed, "prompts").permutation(len(data))[: self.episodes]
        require_shares(self.keyframes)
        frames, held = [], fingerprint(data.root)
        for i in sorted(chosen.tolist()):
            text = own[i] if own[i] in texts else texts[i % len(texts)]
            meta = data.episode(i).meta
            for row in key_rows(self.keyframes, data.episode(i)):
                begun = ORIGIN if row == 0 else ("video",)  # no simulator begins in the middle of this episode
                frames.append({
                    "first": partial(_recorded, data, i, row, bool(self.commanded)), "instruction": text,
                    "pair": f"e{data.index(i):06d}" + (f"_r{row}" if row else ""),
                    "origin": {k: v for k, v in meta.items() if k in begun}
                              | {"dataset": held, "episode": data.index(i), "row": row},
                })  # fmt: skip
        return _spread(frames, texts, every=self.every_instruction, count=self.repeats, seed=self.seed)


def require_shares(keyframes: Sequence[float | int]) -> None:
    """ValueError unless they are shares of an episode's rows, one or more."""
    wrong = [share for share in keyframes if not 0 <= share < 1]
    if wrong or not keyframes:
        raise ValueError(f"prompts.keyframes holds {wrong or 'nothing'}; expected shares of an episode's rows, "
                         "0 <= share < 1")  # fmt: skip


def key_rows(keyframes: Sequence[float | int], episode: Episode) -> list[int]:
    """The rows of an episode at which the keyframes lie, each once: of labelled video those of new pictures, whose
    states and actions belong to them."""
    shown = shown_rows(episode)
    return list(dict.fromkeys(int(shown[int(share * len(shown))]) for share in keyframes))


def _recorded(data: Dataset, i: int, row: int, commanded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Picture and state at a row of an episode; no state where it is unknown."""
    return data.canvas(i, [row])[0], state_in_dream(data, i, row) if commanded else data.state(i, row)


@dataclass(frozen=True, kw_only=True, eq=False)
class SimPrompts:
    """First frames from a simulator whose objects are placed anew for each one.

    sim: makes a simulator. first_frames: how many, spread evenly over `instructions` (default: all it knows).
    """

    sim: Callable[[], Sim]
    first_frames: int
    instructions: Sequence[str] | None = None
    every_instruction: bool = False
    repeats: int = 1
    seed: int = 0

    def __call__(self) -> list[Draft]:
        sim = self.sim()
        scenes = _Scenes(sim)
        texts = _require_text(list(self.instructions or sim.instructions), "prompts")
        unknown = [text for text in texts if text not in sim.instructions]
        frames = []
        for k in range(self.first_frames):
            text = texts[k * len(texts) // self.first_frames]
            scene = text if text not in unknown else sim.instructions[k % len(sim.instructions)]
            own = seed_for(self.seed, "first frame", k)
            origin = {"sim": type(sim).__name__.lower(), "instruction": scene, "seed": own}
            frames.append({"first": partial(scenes.first, scene, own), "instruction": text, "pair": f"f{k:06d}",
                           "origin": origin})  # fmt: skip
        return _spread(frames, texts, every=self.every_instruction, count=self.repeats, seed=self.seed)


class _Scenes:
    """First frames of a simulator, which is closed once no draft needs it."""

    def __init__(self, sim: Sim) -> None:
        self.sim = sim
        weakref.finalize(self, sim.close).atexit = False  # then its renderers close by themselves

    def first(self, scene: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Picture and state of a scene whose objects the seed places."""
        self.sim.reset(scene, seed)
        seen = self.sim.observe()
        return tile(self.sim.robot, {name: view[None] for name, view in seen.views.items()})[0], seen.state


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderPrompts:
    """First frames from pictures (png, jpg) in a folder, brought to the size of each view as it says (`View.fit`).

    One view: every picture is a first frame. Several: `table.front.png` and `table.wrist.png` show the views `front`
    and `wrist` of one. A text file of a first frame's name (`table.txt`) holds its instructions, one per line; else
    `instructions` is used.

    Raises ValueError: no picture, a view without one or with two, a picture of no view, one that cannot be read, no
    instruction.
    """

    folder: Path | str
    robot: Embodiment
    instructions: Sequence[str] = ()
    repeats: int = 1
    seed: int = 0

    @property
    def source(self) -> Path:
        """What the first frames are taken from."""
        return Path(self.folder)

    def __call__(self) -> list[Prompt]:
        folder, made = Path(self.folder), []
        for name, paths in self._named().items():
            note = folder / f"{name}.txt"
            lines = [line.strip() for line in note.read_text().splitlines()] if note.is_file() else self.instructions
            texts = _require_text([line for line in lines if line], str(note if note.is_file() else folder))
            views = {view.name: fit(_picture(paths[view.name]), view.height, view.width, view.fit)
                     for view in self.robot.views}  # fmt: skip
            origin = {"picture": ", ".join(paths[view.name].name for view in self.robot.views)}
            first = tile(self.robot, views), np.zeros(0, np.float32)
            frame = {"first": lambda first=first: first, "pair": name, "origin": origin}
            made += read_prompts(_spread([frame], texts, every=True, count=self.repeats, seed=self.seed))
        return made

    def _named(self) -> dict[str, dict[str, Path]]:
        """First frames by name: the picture of each view."""
        paths = sorted(p for p in Path(self.folder).glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not paths:
            raise ValueError(f"{self.folder} holds no picture (png, jpg); put first frames there")
        views, named = [view.name for view in self.robot.views], dict[str, dict[str, Path]]()
        for path in paths:
            name, _, view = path.stem.rpartition(".") if len(views) > 1 else (path.stem, "", views[0])
            if not name or view not in views:
                wanted = ", ".join(f"{path.stem.partition('.')[0]}.{each}{path.suffix}" for each in views)
                raise ValueError(f"{path} shows none of the views of embodiment '{self.robot.name}', which has "
                                 f"{len(views)}; give each a picture of its own: {wanted}")  # fmt: skip
            if (other := named.setdefault(name, {}).setdefault(view, path)) != path:
                raise ValueError(f"{other} and {path.name} are both the first frame '{name}'; rename one of them")
        for name, found in named.items():
            if missing := [view for view in views if view not in found]:
                raise ValueError(f"{self.folder} has no picture of the view{'s' * (len(missing) > 1)} "
                                 f"{', '.join(missing)} for the first frame '{name}' (only "
                                 f"{', '.join(path.name for path in found.values())}); embodiment '{self.robot.name}' "
                                 f"has the views {', '.join(views)}")  # fmt: skip
        return named


def _picture(path: Path) -> np.ndarray:
    """A picture file, (h w 3) uint8, upright as its EXIF orientation says. ValueError if it is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        return np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
