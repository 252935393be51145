"""Curation of squares: a few dreams are frozen, some labels are wild; the rest is kept, whatever happens on the way."""

import sys
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Clip, Episode, Labels
from dreamgen.core.manifest import Stage, is_complete, read_json, write_json
from dreamgen.core.seeding import seed_for
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import recorded_clip
from dreamgen.data.writer import write_dataset
from dreamgen.filters.frozen import Frozen
from dreamgen.filters.limits import Limits
from dreamgen.filters.spread import Spread
from dreamgen.stages.candidates import Candidates
from dreamgen.stages.curate import Work, curate
from dreamgen.stages.evaluate_filters import evaluate_filters
from dreamgen.stages.label import label

sys.path.insert(0, str(Path(__file__).parents[1] / "idm"))
from moving_square import CLOCK, ROBOT, Squares  # noqa: E402

N, STILL, WILD = 9, (2, 7), (4, 5)
MADE = {"stage": "curate", "config": {}, "results": {}}


class Told:
    """A labeler that knows the truth, but for the wild clips."""

    robot, path, clock = ROBOT, None, CLOCK

    def __init__(self, squares: Squares) -> None:
        self.squares = squares

    def label(self, clips: list[Clip]) -> list[Labels]:
        found = []
        for clip in clips:
            k, wild = int(clip.id.split("_")[1]), int(clip.id.split("_")[1]) in WILD and clip.id.startswith("dream")
            action = self.squares.episode(k).action[: CLOCK.with_frames(len(clip.video)).steps]
            spread = np.full_like(action, 0.02 + 0.001 * k + 5 * wild)
            found.append(Labels(value=action + np.float32(2 * wild), spread=spread))
        return found


class Mute:
    """A filter that abstains on odd clips and rates the others by their number."""

    name, needs_labels = "mute", False

    def score(self, clips: list[Clip], labels: list[Labels]) -> np.ndarray:
        number = np.array([int(clip.id.split("_")[1]) for clip in clips])
        return np.where(number % 2, np.nan, 1 - number / N)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("curate")
    squares = Squares(N, rows=19, seed=5)
    write_dataset(root / "real", squares.episodes, ROBOT)
    with Stage(root / "dreams", "dream", config={}) as run:
        folder = ClipFolder(root / "dreams" / "clips")
        for k, episode in enumerate(squares.episodes):
            video = episode.video["top"][CLOCK.rows]
            video = np.repeat(video[:1], len(video), axis=0) if k in STILL else video
            folder.write(Clip(id=f"dream_{k}", video=video, video_hz="10", instruction=f"move {k % 2}", seed=k,
                              pair=f"pair_{k // 3}", state=episode.state[0],
                              origin={"sim": "plane", "instruction": f"move {k % 2}", "seed": k}))  # fmt: skip
        run.finish(clips=N)
    label(Told(squares), root / "dreams", out=root / "labels", robot=ROBOT, record={})
    return {"root": root, "labels": Dataset(root / "labels", ROBOT), "real": Dataset(root / "real", ROBOT),
            "squares": squares, "dreams": root / "dreams"}  # fmt: skip


def filters() -> dict:
    return {"spread": Spread(robot=ROBOT), "limits": Limits(robot=ROBOT), "frozen": Frozen()}


def scored(made: dict, out: Path, **changes) -> dict:
    options = dict(out=out, clips=made["dreams"], reference=made["real"], reference_clips=5, batch_size=4,
                   labeler=Told(made["squares"]), record={},
                   least={"spread": 0.1, "limits": 0.3, "frozen": 0.1})  # fmt: skip
    return curate(changes.pop("filters", filters()), changes.pop("dataset", made["labels"]), **{**options, **changes})


def files(root: Path) -> dict[str, bytes]:
    wanted = [p for p in root.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl", ".parquet")]
    notes = ("manifest.json", "run.json", "stats.json")
    return {str(p.relative_to(root)): p.read_bytes() for p in wanted if p.name not in notes}


@pytest.fixture(scope="module")
def kept(made) -> Path:
    scored(made, made["root"] / "kept")
    return made["root"] / "kept"


def test_the_world_model_of_a_filter_is_placed(made, tmp_path):
    class Model:
        placed = 0

        def place(self) -> None:
            self.placed += 1

    one = Mute()
    one.world_model = model = Model()
    for _ in range(2):  # what is complete needs none
        scored(made, tmp_path, filters={"mute": one}, least={"mute": 0.5})
    assert model.placed == 1


def test_the_reference_is_labelled_in_batches_by_a_placed_labeler(made, tmp_path):
    """Recordings that are shorter than the labeler's window are left out, as they are elsewhere."""
    episodes = [made["squares"].episode(k) for k in range(5)]
    write_dataset(tmp_path / "real", [Episode(instruction="move", state=e.state[:n], action=e.action[:n],
                                              video={"top": e.video["top"][:n]})
                                      for e, n in zip(episodes, (19, 5, 19, 1, 19), strict=True)], ROBOT)  # fmt: skip

    class Placed(Told):
        window, placed, seen = 4, False, []

        def place(self) -> None:
            self.placed = True

        def label(self, clips: list[Clip]) -> list[Labels]:
            assert self.placed
            self.seen.append([clip.id for clip in clips])
            return super().label(clips)

    candidates, wanted = Candidates(made["labels"], None), {"spread": Spread(robot=ROBOT), "frozen": Frozen()}
    real, labeler = Dataset(tmp_path / "real", ROBOT), Placed(made["squares"])
    Work(tmp_path, candidates, wanted, []).refer(real, 64, labeler, 2, 0)
    assert labeler.seen == [["episode_000000", "episode_000002"], ["episode_000004"]]
    signals = Frozen().raw([recorded_clip(made["real"], k, CLOCK)[0] for k in (0, 2, 4)], [])
    np.testing.assert_allclose(wanted["spread"].half, np.quantile([0.02, 0.022, 0.024], 0.95), rtol=1e-6)
    np.testing.assert_allclose(wanted["frozen"].half, np.quantile(signals[:, 0], 0.05), rtol=0.05)
    Work(tmp_path / "alone", candidates, {"frozen": Frozen()}, []).refer(real, 64, None, 2, 0)  # of two frames and more
    assert read_json(tmp_path / "alone" / "reference.json")["frozen"]
    with pytest.raises(ValueError, match="of 5 episodes of .* 0 have the .* a window of the labeler"):
        labeler.window = 30
        Work(tmp_path / "long", candidates, {"frozen": Frozen()}, []).refer(real, 64, labeler, 2, 0)


def test_scores_and_truth_of_other_content_are_refused(made, tmp_path):
    """Two datasets of dreams have the same ids; the scores of one say nothing of the other."""
    mine = read_json(made["labels"].root / "manifest.json")["id"]
    known = [{"id": f"dream_{k}", "scores": {"mute": 0.5}, "success": True} for k in range(N)]
    for name, parents in (("same", {"dataset": mine}), ("other", {"dataset": "0"}), ("dreams", {"dreams": "0"})):
        write_json(tmp_path / name / "manifest.json", {"id": name, "parents": parents, **MADE})
        write_json(tmp_path / name / "scores.json", known)
        write_json(tmp_path / name / "truth.json", known)
    options = dict(filters={"mute": Mute()}, least={}, reference=None, keep=2)
    for name, found in (("other", "dataset 0"), ("dreams", "dreams 0")):
        with pytest.raises(ValueError, match=f"`scored` is .*{name}, which read {found}, but this run reads"):
            scored(made, tmp_path / "s" / name, scored=tmp_path / name, **options)
    with pytest.raises(ValueError, match="`truth` is .*other, which read dataset 0, but this run reads dataset"):
        scored(made, tmp_path / "t", control="oracle", truth=tmp_path / "other", **options)
    assert not (tmp_path / "s" / "other" / "scores").exists()  # said before anything is scored


def test_the_good_are_kept_with_their_scores(made, kept):
    manifest, rows = read_json(kept / "manifest.json"), read_json(kept / "scores.json")
    good = [k for k in range(N) if k not in STILL + WILD]
    assert [row["episode"] for row in rows if row["kept"]] == good and manifest["results"]["kept"] == len(good)
    found = manifest["results"]["yields"]
    assert (found["spread"]["passed"], found["limits"]["passed"], found["frozen"]["passed"]) == (N - 2, N - 2, N - 2)
    # a video's coding noise moves a still clip's pixels a little: next to nothing, not exactly nothing
    assert max(row["scores"]["frozen"] for row in rows if row["episode"] in STILL) < 1e-3
    dataset = Dataset(kept, ROBOT)
    for i, k in enumerate(good):
        episode, before = dataset.episode(i), made["labels"].episode(k)
        assert episode.meta["prompt"] == f"dream_{k}" and episode.meta["origin"]["seed"] == k
        assert {"spread", "limits", "frozen", "total", "label_spread"} <= set(episode.meta["scores"])
        np.testing.assert_array_equal(episode.action, before.action)
        np.testing.assert_array_equal(episode.extra["label_spread"], before.extra["label_spread"])
        shown = [part.canvas(n).astype(int) for part, n in ((dataset, i), (made["labels"], k))]
        assert np.abs(shown[0] - shown[1]).mean() < 0.5  # encoded from the dreams, not a second time from the labels
    assert {path.name for path in (kept / "sheets").glob("*.png")} == {"spread.png", "limits.png", "frozen.png"}


def test_shards_and_a_killed_run_write_the_same(made, kept, tmp_path, monkeypatch):
    score, calls = Frozen.score, []

    def dies(self, clips, labels):  # noqa: ANN001, ANN202
        calls.append([clip.id for clip in clips])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, clips, labels)

    monkeypatch.setattr(Frozen, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        scored(made, tmp_path / "out", num_shards=2, shard=0)
    assert not is_complete(tmp_path / "out")
    assert scored(made, tmp_path / "out", num_shards=2, shard=1) == {"complete": False, "left": 1}
    assert scored(made, tmp_path / "out", num_shards=2, shard=0)["results"]["kept"] == 5
    assert calls[3:] == [["dream_8"]] and files(tmp_path / "out") == files(kept)
    shown = [Dataset(root, ROBOT).canvas(3).astype(int) for root in (tmp_path / "out", kept)]
    assert np.abs(shown[0] - shown[1]).mean() < 1


def test_killed_between_dataset_and_manifest(made, kept, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stage, "finish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        scored(made, tmp_path / "out")
    assert (tmp_path / "out" / "meta" / "info.json").is_file() and not is_complete(tmp_path / "out")
    assert scored(made, tmp_path / "out")["results"] == read_json(kept / "manifest.json")["results"]
    assert files(tmp_path / "out") == files(kept)


def test_without_the_dreams_clips_are_read_from_the_labels(made, tmp_path):
    found = scored(made, tmp_path / "out", clips=None)["results"]
    assert found["kept"] == 5 and Dataset(tmp_path / "out", ROBOT).length(0) == 16


def test_best_of_n_before_labelling(made, tmp_path):
    mute = {"mute": Mute()}
    options = dict(filters=mute, dataset=None, reference=None, least={}, best_per="pair", rank_by="mute")
    assert scored(made, tmp_path / "best", **options)["results"]["kept"] == 3
    kept = ClipFolder(tmp_path / "best" / "clips")
    assert kept.ids() == ["dream_0", "dream_4", "dream_7"] and kept.info("dream_4")["scores"]["mute"] == 1 - 4 / N
    label(Told(made["squares"]), tmp_path / "best", out=tmp_path / "labels", robot=ROBOT, record={})
    assert len(Dataset(tmp_path / "labels", ROBOT)) == 3
    found = scored(made, tmp_path / "prompt", **{**options, "best_per": "prompt", "abstained": "drop"})["results"]
    assert found["yields"]["mute"]["abstained"] == 4 and found["kept"] == 3  # of odd clips there is no opinion
    with pytest.raises(ValueError, match="filter 'spread' scores labels and there is no dataset"):
        scored(made, tmp_path / "no", dataset=None)


class Plane:
    """A simulator in which only the even squares' true labels succeed."""

    robot = ROBOT
    instructions = ("move 0", "move 1")

    def __init__(self, squares: Squares) -> None:
        self.squares = squares

    def reset(self, instruction: str, seed: int) -> None:
        assert instruction == f"move {seed % 2}"
        self.wanted, self.at, self.good = self.squares.episode(seed).action[:16], 0, seed % 2 == 0
        self.begun = self.squares.episode(seed).state[0]

    def observe(self) -> None:
        raise AssertionError("a replay draws no pictures")

    def state(self) -> np.ndarray:
        return self.begun

    def step(self, action: np.ndarray) -> bool:
        self.good &= self.at >= 16 or bool(np.abs(self.wanted[self.at] - action).max() < 0.1)
        self.at += 1
        return self.good and self.at >= 16

    def expert(self) -> None: ...

    def close(self) -> None: ...


def test_scores_meet_the_truth_and_controls_use_them(made, kept, tmp_path):
    found = evaluate_filters(kept, made["labels"], lambda: Plane(made["squares"]), out=tmp_path / "worth", draws=50,
                             record={})["results"]  # fmt: skip
    truth = {row["episode"]: row["success"] for row in read_json(tmp_path / "worth" / "truth.json")}
    assert truth == {k: k % 2 == 0 and k not in WILD for k in range(N)}
    assert found["success"]["successes"] == 4 and found["clips"] == N
    spread, limits = found["filters"]["spread"], found["filters"]["limits"]
    assert limits["auroc"] == (2 + 3 * 0.5) / 5 and limits["positives"] == 4  # one of two wild clips is even
    assert spread["low"] <= spread["auroc"] <= spread["high"] and set(found["filters"]) == {*filters(), "mean"}
    options = dict(filters={}, least={}, scored=kept, keep=4)
    oracle = scored(made, tmp_path / "oracle", control="oracle", truth=tmp_path / "worth", **options)
    assert oracle["results"]["control"] == "oracle"
    assert [r["episode"] for r in read_json(tmp_path / "oracle" / "scores.json") if r["kept"]] == [0, 2, 6, 8]
    scored(made, tmp_path / "random", control="random", **options)
    chance = [r["episode"] for r in read_json(tmp_path / "random" / "scores.json") if r["kept"]]
    assert len(chance) == 4 and chance != [0, 2, 6, 8] and seed_for(0, "random", "dream_0") != seed_for(1, "random")
    each = dict(options, keep=None, best_per="instruction", best_count=3)
    scored(made, tmp_path / "each", control="oracle", truth=tmp_path / "worth", **each)
    rows = read_json(tmp_path / "each" / "scores.json")  # 4 of the even squares succeed, none of the odd ones
    assert {r["episode"] for r in rows if r["kept"] and r["episode"] % 2 == 0} < {0, 2, 6, 8}
    assert sum(r["kept"] for r in rows if r["episode"] % 2) == 3 == sum(r["kept"] for r in rows) // 2
    best = scored(made, tmp_path / "best", rank_by="frozen", **options)["results"]
    assert best["kept"] == 4 and best["yields"]["frozen"]["kept_mean"] > best["yields"]["frozen"]["mean"]


def test_settings_that_choose_nothing_are_refused_before_hours_of_scoring(made, kept, tmp_path):
    for key, value, told in (
        ("least", {"judge": 0.5}, "least names the filter judge"), ("drop", {"jerk": 0.5}, "drop names the filter je"),
        ("drop", 1.0, "drop is 1.0"), ("rank_by", "judge", "rank_by names"), ("abstained", "no", "abstained is 'no'"),
        ("best_count", 0, "best_count is 0"), ("keep", 2.5, "keep is 2.5"), ("keep", 10, "asks for 10 clips, 9 of 9"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            scored(made, tmp_path, **{key: value})
        assert not (tmp_path / "scores").exists()
    assert scored(made, tmp_path, filters={"a": Mute()}, scored=kept, rank_by="spread", keep=3)["results"]["kept"] == 3


def test_refusals(made, kept, tmp_path):
    def refused(text: str, **changes) -> None:
        with pytest.raises(ValueError, match=text):
            scored(made, tmp_path / "x" / str(abs(hash(text))), **changes)

    refused("keep none of 9 clips; of every filter alone: spread 9, limits 9, frozen 0", least={"frozen": 1.0})
    refused("filter 'spread' has no reference", reference=None)
    refused("best_per is 'clip'; expected null, prompt or pair or instruction", best_per="clip")
    refused("control is random, keep is None", control="random")
    refused("expected 0 <= shard < num_shards", shard=2, num_shards=2)
    refused("neither a dataset of labelled dreams nor dreams", dataset=None, clips=None)
    refused("has no label spread", dataset=made["real"], clips=None, labeler=None)
    refused("labels the dreams of no stage|labels the dreams", dataset=made["real"])
    (tmp_path / "half" / "clips").mkdir(parents=True)
    refused("unfinished", clips=tmp_path / "half", dataset=None)
    write_json(tmp_path / "other" / "manifest.json", {"id": "0", "parents": {}, **MADE})
    write_json(tmp_path / "other" / "scores.json", [{"id": "a", "scores": {}}])
    refused("has scores of 1 other clips", scored=tmp_path / "other")
    with pytest.raises(ValueError, match="needs a simulator"):
        evaluate_filters(kept, made["labels"], None, out=tmp_path / "w", record={})
    with pytest.raises(ValueError, match="scores another dataset"):
        evaluate_filters(kept, made["real"], lambda: Plane(made["squares"]), out=tmp_path / "w", record={})
