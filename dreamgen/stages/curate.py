"""Dreams -> scores by every filter -> the dreams that are kept, as a dataset, with their scores.

Scores are stored batch by batch and filter by filter as soon as they are there, so a killed run continues, shards share
out the batches, and `scored` takes the scores of an earlier run over, also of one whose choice failed. What is kept is
a pure function of the scores.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamgen.core.clip import Labels
from dreamgen.core.manifest import RUN, Stage, is_complete, read_json, replacing, require_complete, write_json
from dreamgen.core.protocols import Filter, Labeler
from dreamgen.core.seeding import rng_for
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.data.writer import require_free, write_dataset
from dreamgen.engine.precision import place
from dreamgen.engine.progress import progress
from dreamgen.stages.candidates import Candidates, recorded
from dreamgen.stages.selection import best, best_of, passing, quantile_thresholds, require_settings, totals
from dreamgen.stages.sharing import Shard, alone, grouped
from dreamgen.video.sheet import captioned, grid, png

SCORES = "scores.json"
SHOWN = 4  # best and worst clips on a filter's contact sheet
GROUPS = {"prompt": ("pair", "instruction"), "pair": ("pair",), "instruction": ("instruction",)}  # by what they share


def curate(
    filters: Mapping[str, Filter],
    dataset: Dataset | None,
    *,
    out: Path,
    clips: Path | None = None,
    reference: Dataset | None = None,
    reference_clips: int = 64,
    labeler: Labeler | None = None,
    video_hz: str = "10",
    scored: Path | None = None,
    drop: float | Mapping[str, float] = 0.0,
    least: Mapping[str, float] | None = None,
    rank_by: str = "mean",
    best_per: str | None = None,
    best_count: int = 1,
    keep: float | int | None = None,
    abstained: str = "pass",
    control: str | None = None,
    truth: Path | None = None,
    batch_size: int = 16,
    codec: str = "h264",
    crf: int | None = None,
    workers: int = 1,
    shard: int = 0,
    num_shards: int = 1,
    seed: int = 0,
    record: dict,
) -> dict:
    """Score labelled dreams by `filters` (name to filter) and keep the good ones.

    dataset, clips: see `Candidates`; without a dataset the kept clips are written as dreams, ready to be labelled (best
    of n before labelling). reference: recorded episodes, of which `reference_clips` say what is normal; they are
    labelled by `labeler`, which leaves out those shorter than its window, or count with their recorded actions and no
    spread. scored: a run on the same dataset that has scored all clips, whose scores are used besides those of
    `filters`.

    A clip is kept if it is not among the worst `drop` (a share; of every filter or by name) and reaches `least` (by
    name); then of each `best_per` ("prompt": one first frame and instruction; "pair": one first frame; "instruction",
    so that easy ones do not displace the others) the `best_count` best by `rank_by` ("mean" rank over filters, or one
    filter), then the `keep` best of all (share or number). abstained: a filter without an opinion lets a clip "pass"
    or "drop"s it. control: what `best_per` and `keep` rank by instead of scores, thresholds aside; "random" draws,
    "oracle" prefers what succeeded when replayed (`truth`, of `evaluate stage=filters`): a ceiling for experiments.

    Writes `scores.json` (all clips), `sheets/<filter>.png` (best and worst). Results: yields by filter, kept, clips.
    Raises ValueError for clips that a filter cannot score, unknown names, thresholds that keep nothing, a `scored` or
    a `truth` of another dataset. A shard that is not the last returns {"complete": False}.
    """
    mine = Shard(shard, num_shards)
    wrong = (control and keep is None and best_per is None) or ((control == "oracle") != bool(truth))
    if control not in (None, "random", "oracle") or wrong:
        raise ValueError(f"control is {control}, keep is {keep}, truth is {truth}; expected null, or 'random' with "
                         f"keep or best_per, or 'oracle' with one of these and truth")  # fmt: skip
    if best_per not in (None, *GROUPS):
        raise ValueError(f"best_per is '{best_per}'; expected null, {' or '.join(GROUPS)}")
    candidates = Candidates(dataset, clips, video_hz)
    parents = candidates.parents(clips) | ({"scored": scored} if scored else {}) | ({"truth": truth} if truth else {})
    parents |= {"reference": reference.root} if reference is not None else {}
    parents |= {f"filter_{name}": found for name, filter in filters.items() if (found := _made_of(filter))}
    if dataset is not None:
        require_free(out)
    with Stage(out, "curate", config=record, parents=parents, seed=seed, shared=True) as run:
        if run.complete:
            return run.manifest()
        if not len(candidates):
            raise ValueError(f"{clips} holds no dreams; give its stage at least one prompt")
        if scored:
            require_scored(scored, candidates.ids, run.spec["parents"])
        if truth:
            made = require_complete(truth, "the stage that `truth` names,")
            require_same(made, truth, "truth", run.spec["parents"])
        for name, filter in filters.items():
            if dataset is None and getattr(filter, "needs_labels", True):
                raise ValueError(f"filter '{name}' scores labels and there is no dataset; label the dreams first, or "
                                 f"use filters of video alone")  # fmt: skip
        names, unknown = list(filters), np.zeros((len(candidates), len(filters)))
        names, unknown = with_scored(scored, names, unknown) if scored else (names, unknown)
        require_settings(unknown, names, drop=drop, least=least or {}, rank_by=rank_by, best_count=best_count,
                         keep=keep, abstained=abstained)  # fmt: skip
        groups = grouped(range(len(candidates)), batch_size)
        work = Work(out, candidates, filters, groups)
        if any(work.missing(name, group) for name in filters for group in mine.of(groups)):
            place(*(part for filter in filters.values() for part in vars(filter).values()))
            work.refer(reference, reference_clips, labeler, batch_size, seed)
        for group in progress(mine.of(groups), len(mine.of(groups)), mine.title("curate"), out, unit="batch"):
            work.score(group)
        left = sum(work.missing(name, group) for name in filters for group in groups)
        if left:
            return {"complete": False, "left": left}
        with alone(out, mine) as may_end:  # shards that end together do not write twice
            if not may_end:
                return {"complete": False, "left": 0}
            if is_complete(out):
                return run.manifest()
            names, scores = work.table()
            known = [candidates.describe(i) for i in range(len(candidates))]
            if scored:
                names, scores = with_scored(scored, names, scores)
            rows = [{**one, "scores": dict(zip(names, _plain(line), strict=True))}
                    for one, line in zip(known, scores, strict=True)]  # fmt: skip
            again = ""
            if filters:  # of a choice that fails the scores are left, see `require_scored`
                write_json(Path(out) / SCORES, rows)
                again = f". Its scores are kept: choose anew with stage.filters={{}} stage.scored={out} in another out"
            total = totals(scores, names, rank_by)
            limits = quantile_thresholds(scores, names, drop)
            limits |= {name: max(value, limits.get(name, value)) for name, value in (least or {}).items()}
            good = passing(scores, names, limits, abstained)
            chosen = good.all(1)
            if control:
                total, chosen = controlled(control, known, truth, total, seed), np.ones(len(known), bool)
            if best_per:
                texts = ["\n".join(one[shared] for shared in GROUPS[best_per]) for one in known]
                chosen = best_of(total, texts, chosen, best_count)
            if not chosen.any():
                raise ValueError(f"the thresholds keep none of {len(known)} clips; of every filter alone: "
                                 + ", ".join(f"{name} {int(good[:, k].sum())}" for k, name in enumerate(names))
                                 + f". Lower drop and least, or set abstained=pass{again}")  # fmt: skip
            chosen = chosen if keep is None else best(total, chosen, keep, again)
            rows = [{**row, "total": float(value), "kept": bool(taken)}
                    for row, value, taken in zip(rows, total, chosen, strict=True)]  # fmt: skip
            write_json(Path(out) / SCORES, rows)
            sheets(Path(out) / "sheets", candidates, names, scores)
            counts = _write(Path(out), candidates, rows, codec=codec, crf=crf, workers=workers)
            return run.finish(clips=len(known), kept=int(chosen.sum()), rank_by=rank_by, control=control,
                              yields=yields(names, scores, good, chosen, limits), **counts,
                              **noted(dataset, reference))  # fmt: skip


class Work:
    """The scores of a run: `scores/<filter>/<first clip of the batch>.json`, and the reference of each filter."""

    def __init__(self, out: Path, candidates: Candidates, filters: Mapping[str, Filter],
                 groups: Sequence[range]) -> None:  # fmt: skip
        self.out, self.candidates, self.filters, self.groups = Path(out), candidates, filters, groups

    def _path(self, name: str, group: range) -> Path:
        return self.out / "scores" / name / f"{group.start:06d}.json"

    def missing(self, name: str, group: range) -> bool:
        return not self._path(name, group).is_file()

    def refer(self, dataset: Dataset | None, count: int, labeler: Labeler | None, size: int, seed: int) -> None:
        """Fit the filters that need it to recorded clips, labelled `size` at a time; the result is stored, the same for
        all shards."""
        path = self.out / "reference.json"
        waiting = {name: one for name, one in self.filters.items() if hasattr(one, "fit") and one.half is None}
        if not path.is_file() and waiting and dataset is not None:
            place(labeler)
            signals: dict[str, list[np.ndarray]] = {name: [] for name in waiting}
            for clips, actions in recorded(dataset, self.candidates.clip(0).video_hz, count, seed, labeler, size):
                labels = labeler.label(clips) if labeler is not None else [
                    Labels(value=action, spread=np.full_like(action, np.nan)) for action in actions]  # fmt: skip
                for name, one in waiting.items():
                    signals[name].append(one.raw(clips, labels))
            for name, one in waiting.items():
                one.fit(np.concatenate(signals[name]))
            write_json(path, {name: list(map(float, one.half)) for name, one in waiting.items()})
        stored = read_json(path) if path.is_file() else {}
        for name, one in waiting.items():
            one.half = np.array(stored[name]) if name in stored else None

    def score(self, group: range) -> None:
        """Every filter's scores of a batch, each stored once it is there."""
        missing = [name for name in self.filters if self.missing(name, group)]
        if not missing:
            return
        clips, labels = [self.candidates.clip(i) for i in group], [self.candidates.labels(i) for i in group]
        for name in missing:
            found = np.asarray(self.filters[name].score(clips, labels), np.float64)
            if found.shape != (len(group),) or (found < 0).any() or (found > 1).any():
                raise ValueError(f"filter '{name}' gave {found} for {len(group)} clips; expected as many scores in "
                                 f"[0, 1], or nan")  # fmt: skip
            write_json(self._path(name, group), {"ids": [clip.id for clip in clips], "scores": _plain(found)})

    def table(self) -> tuple[list[str], np.ndarray]:
        """Filters and all scores (n k)."""
        columns = [[value for group in self.groups for value in read_json(self._path(name, group))["scores"]]
                   for name in self.filters]  # fmt: skip
        table = np.array(columns, np.float64).reshape(len(self.filters), len(self.candidates)).T
        return list(self.filters), table


def require_scored(scored: Path, ids: list[str], parents: Mapping[str, str]) -> None:
    """Raise ValueError if a curation has not scored all of its clips, or is of other clips than `ids`, or of other
    `parents` (by fingerprint). It need not have chosen of them."""
    whole = is_complete(scored) or not (Path(scored) / SCORES).is_file()
    made = require_complete(scored, "the scores") if whole else read_json(Path(scored) / RUN)
    rows = read_json(Path(scored) / SCORES)
    if [row["id"] for row in rows] != ids:
        raise ValueError(f"{scored} has scores of {len(rows)} other clips than these {len(ids)}; curate this "
                         f"dataset, or leave out `scored`")  # fmt: skip
    require_same(made, scored, "scored", parents)


def require_same(made: Mapping, path: Path, setting: str, parents: Mapping[str, str]) -> None:
    """Raise ValueError if the stage at `path` that is given as `setting`, of which its manifest `made` tells, read
    another dataset than one with these parents, or other dreams where one of the two has no dataset."""
    theirs = made["parents"]
    key = "dataset" if "dataset" in theirs and "dataset" in parents else "dreams"
    if key not in parents or theirs.get(key) != parents[key]:
        found, wanted = (f"{key} {of[key]}" if key in of else f"no {key}" for of in (theirs, parents))
        raise ValueError(f"`{setting}` is {path}, which read {found}, but this run reads {wanted}; clips of one name "
                         f"may differ. Make it of these clips, or leave out `{setting}`")  # fmt: skip


def with_scored(scored: Path, names: list[str], scores: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The scores of an earlier run on the same clips beside these; a filter's new score counts."""
    rows = read_json(Path(scored) / SCORES)
    old = [name for name in rows[0]["scores"] if name not in names]
    more = np.array([[row["scores"][name] for name in old] for row in rows], np.float64).reshape(len(rows), len(old))
    return old + names, np.concatenate([more, scores], axis=1)


def controlled(control: str, known: list[dict], truth: Path | None, total: np.ndarray, seed: int) -> np.ndarray:
    """What the control goes by instead of scores: chance, or replayed success (ties by the scores)."""
    if control == "random":
        return np.array([rng_for(seed, "random", one["id"]).random() for one in known])
    success = {row["id"]: row["success"] for row in read_json(Path(truth) / "truth.json")}
    return np.array([bool(success.get(one["id"])) for one in known]) + total / 2


def yields(names: list[str], scores: np.ndarray, good: np.ndarray, chosen: np.ndarray, limits: dict) -> dict:
    """Per filter: how many clips it passes, abstains on, its threshold, and its scores' mean and quartiles."""
    found = {}
    for k, name in enumerate(names):
        told = scores[np.isfinite(scores[:, k]), k]
        found[name] = {"passed": int(good[:, k].sum()), "of": len(scores), "yield": float(good[:, k].mean()),
                       "abstained": int(np.isnan(scores[:, k]).sum()), "threshold": limits.get(name),
                       "mean": float(told.mean()) if len(told) else None,
                       "quartiles": np.quantile(told, (0.25, 0.5, 0.75)).tolist() if len(told) else [],
                       "kept_mean": _mean(scores[chosen, k])}  # fmt: skip
    return found


def sheets(folder: Path, candidates: Candidates, names: list[str], scores: np.ndarray) -> None:
    """A picture per filter: its best clips, then its worst."""
    for k, name in enumerate(names):
        told = np.flatnonzero(np.isfinite(scores[:, k]))
        order = told[np.argsort(-scores[told, k], kind="stable")]
        few = min(SHOWN, len(order) // 2)
        rows: list[tuple[str, Any]] = []
        for kind, part in (("best", order[:few]), ("worst", order[len(order) - few :])):
            for i in part:
                clip = candidates.clip(int(i))
                rows.append((f"{name} {kind} {scores[i, k]:.3f}: {clip.instruction} ({clip.id})",
                             grid(clip.video, count=8, columns=8, height=96)))  # fmt: skip
        if rows:
            with replacing(folder / f"{name}.png") as temporary:
                temporary.write_bytes(png(captioned(rows)))


def _write(out: Path, candidates: Candidates, rows: list[dict], *, codec: str, crf: int | None, workers: int) -> dict:
    """The kept episodes as a dataset, or the kept clips as dreams."""
    kept = [i for i, row in enumerate(rows) if row["kept"]]
    if candidates.dataset is None:
        folder = ClipFolder(out / "clips", codec=codec, crf=crf)
        for i in kept:
            if not folder.has(candidates.ids[i]):
                clip = candidates.clip(i)
                clip.scores.update({name: score for name, score in rows[i]["scores"].items() if score is not None})
                folder.write(clip)
        return {"world_model": candidates.world_model}

    def episodes() -> Iterator:
        for i in progress(kept, len(kept), "write", out, unit="episode"):
            yield candidates.episode(i, rows[i]["scores"] | {"total": rows[i]["total"]})

    written = write_dataset(out, episodes(), candidates.dataset.robot, codec=codec, crf=crf, workers=workers)
    return {"episodes": written["episodes"], "rows": written["frames"]}


def _plain(scores: np.ndarray) -> list[float | None]:
    """JSON has no nan."""
    return [float(value) if np.isfinite(value) else None for value in scores]


def _mean(scores: np.ndarray) -> float | None:
    told = scores[np.isfinite(scores)]
    return float(told.mean()) if len(told) else None


def _made_of(filter: Any) -> Path | None:
    """The folder that a filter's model was loaded from."""
    return next((part.path for part in vars(filter).values() if isinstance(getattr(part, "path", None), Path)), None)
