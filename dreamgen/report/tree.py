"""What could have happened, as a tree: a first frame, its streams of actions or instructions, where each one leads."""

import base64
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dreamgen.core.manifest import is_complete, read_json
from dreamgen.data.clips import ClipFolder
from dreamgen.video.sheet import evenly, png

SIDE, GAP, LETTER = 64, 6, 5.8  # height of a picture, space between branches, width of a letter


@dataclass(frozen=True, kw_only=True)
class Branch:
    """name: of the stream or instruction; frames: a few of its clip; dreamt, real: did it succeed, if known."""

    name: str
    instruction: str
    frames: UInt8[np.ndarray, "n h w 3"]
    dreamt: float | None = None
    real: bool | None = None

    @property
    def verdict(self) -> str:
        """In words: "judged .93, really failed"."""
        told = "" if self.dreamt is None else f"judged {self.dreamt:.2f}"
        true = "" if self.real is None else "really succeeded" if self.real else "really failed"
        return ", ".join(filter(None, (told, true)))


def branches(folder: ClipFolder, truth: Path | None, count: int, *, frames: int = 5) -> dict[str, list[Branch]]:
    """pair: its branches, of the first `count` pairs with several clips. truth: of `evaluate stage=counterfactuals`, if
    there."""
    known: dict[str, Mapping] = {}
    if truth is not None and is_complete(Path(truth)):
        known = {row["id"]: row for group in read_json(Path(truth) / "pairs.json").values() for row in group}
    grouped = defaultdict(list)
    for id in folder.ids():
        grouped[folder.info(id)["pair"]].append(id)
    several = [(pair, ids) for pair, ids in grouped.items() if pair and len(ids) > 1]
    found = {}
    for pair, ids in several[:count]:
        made = []
        for id in ids:
            clip, row = folder.read(id), known.get(id, {})
            made.append(Branch(name=clip.origin.get("stream") or clip.instruction, real=row.get("real"),
                               instruction=clip.instruction, frames=clip.video[evenly(len(clip.video), frames)],
                               dreamt=row.get("probability")))  # fmt: skip
        found[pair] = sorted(made, key=lambda branch: (branch.name != "own", branch.name))
    return found


def uri(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def drawn(made: Sequence[Branch]) -> str:
    """One pair as inline SVG: the first frame, a line to each branch, its frames from left to right, its verdict."""
    h, w = made[0].frames.shape[1:3]
    wide, row = SIDE * w / h, SIDE + GAP
    height, start = row * len(made), wide + 40
    middle = height / 2
    room = 12 + LETTER * max(len(text) for branch in made for text in (branch.name, branch.verdict))
    parts = [f'<image href="{uri(made[0].frames[0])}" x="0" y="{middle - SIDE / 2:.1f}" width="{wide:.1f}" '
             f'height="{SIDE}"/>']  # fmt: skip
    for k, branch in enumerate(made):
        y = k * row + SIDE / 2
        parts.append(f'<path class="axis" fill="none" d="M{wide:.1f},{middle:.1f}C{wide + 20:.1f},{middle:.1f} '
                     f'{wide + 20:.1f},{y:.1f} {start:.1f},{y:.1f}"/>')  # fmt: skip
        parts.append(f'<text x="{start + 4:.1f}" y="{y - 4:.1f}">{escape(branch.name)}</text>'
                     f'<text x="{start + 4:.1f}" y="{y + 10:.1f}">{escape(branch.verdict)}</text>')  # fmt: skip
        for n, frame in enumerate(branch.frames[1:]):
            x = start + room + n * (wide + 2)
            parts.append(f'<image href="{uri(frame)}" x="{x:.1f}" y="{k * row}" width="{wide:.1f}" height="{SIDE}"/>')
    most = max(len(branch.frames) for branch in made) - 1
    label = escape(f"{len(made)} streams from one first frame")
    return (f'<svg class="plot tree" viewBox="0 0 {start + room + most * (wide + 2):.0f} {height}" role="img" '
            f'aria-label="{label}">{"".join(parts)}</svg>')  # fmt: skip


def trees(clips: Path | None, truth: Path | None, count: int) -> list[tuple[str, str]]:
    """(pair and, where there is one, its instruction; SVG) of the first `count` pairs of a finished dream step; empty
    where there is none."""
    if clips is None or not is_complete(Path(clips)):
        return []
    found = branches(ClipFolder(Path(clips) / "clips"), truth, count)
    asked = {pair: {branch.instruction for branch in made} for pair, made in found.items()}
    return [(f"{pair}: {texts.pop()}" if len(texts := asked[pair]) == 1 else pair, drawn(made))
            for pair, made in found.items()]  # fmt: skip
