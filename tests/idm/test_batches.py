"""Clips of labelled video, which repeats a picture until the next one: a labeler sees each picture at its own row."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clock import Clock
from dreamgen.data.video_rate import shown_rows
from idm.batches import Batches
from idm.latent.batches import VideoBatches

sys.path.insert(0, str(Path(__file__).parent))
from moving_square import Squares  # noqa: E402


def labelled(gap: int, rows: int = 27) -> Squares:
    """Pictures that stand for `gap` rows; a picture's first pixel tells its row."""
    squares, fresh = Squares(3, rows=rows), (np.arange(rows) % gap == 0)[:, None].astype(np.float32)
    for i, episode in enumerate(squares.episodes):
        episode = replace(episode, extra={"frame_fresh": fresh})
        frames = episode.video["top"].copy()
        frames[:, 0, 0, 0] = np.arange(rows)
        squares.episodes[i] = replace(episode, video={"top": frames[shown_rows(episode)]})
    return squares


def test_clips_show_the_rows_whose_actions_they_bring():
    squares, clock = labelled(3), Clock(robot_hz="20", video_hz="20/3", frames=4)
    known = [[tuple(row) for row in episode.action] for episode in squares.episodes]

    asked = []

    def degrade(ask, rates, texts):
        asked.extend(ask(n)[:, 0, 0, 0] for n in range(len(rates)))
        return [ask(n) for n in range(len(rates))]

    flow = Batches(squares, range(3), [clock], batch_size=6, seed=0, degrade=degrade, degraded_clips=5,
                   degrade_frames=5)  # fmt: skip
    assert len(flow) == 3 * 6 and len(asked) == 5 and all((rows % 3 == 0).all() for rows in asked)
    assert all((np.diff(rows.astype(int)) == 3).all() for rows in asked)
    latent = VideoBatches(squares, range(3), range(3), clock, batch_size=6, seed=0)
    for step in range(5):
        for batch in (flow(step), latent(step)):
            first = batch["video"].numpy()[:, 0, 0, 0, 0].astype(int)
            for row, action in zip(first, batch["action"].numpy(), strict=True):
                assert row % 3 == 0 and any(mine[row : row + 9] == [tuple(a) for a in action] for mine in known)


def test_clips_of_rates_that_do_not_divide_are_of_new_pictures(caplog):
    """A gap of 5/4 rows: pictures at rows 0, 1, 2, 3, 5, 6, 7, 8, 10, ... From row 2 a clip would show row 3 twice."""
    clock, squares = Clock(robot_hz="20", video_hz="16", frames=5), labelled(1)
    fresh = np.isin(np.arange(27), clock.with_frames(22).rows)[:, None].astype(np.float32)
    squares.episodes = [replace(e, extra={"frame_fresh": fresh}) for e in squares.episodes]
    batches = VideoBatches(squares, range(3), range(3), clock, batch_size=6, seed=0)
    assert all(set(starts) == set(range(0, 22, 5)) for starts in batches.starts.values())
    short = squares.episodes[1]
    squares.episodes[1] = replace(short, **{key: getattr(short, key)[:4] for key in ("state", "action")},
                                  video={}, extra={"frame_fresh": fresh[:4]})  # fmt: skip
    assert VideoBatches(squares, range(3), [1, 2], clock, batch_size=2, seed=0).labelled == [2]
    assert "1 of 3 episodes bring no training clips" in caplog.text
    with pytest.raises(ValueError, match="none of 1 labelled episodes has the 6 rows"):
        VideoBatches(squares, range(3), [1], clock, batch_size=2, seed=0)


def test_labels_of_another_rate_are_refused():
    with pytest.raises(ValueError, match="none of 3 episodes has the 7 rows .* with new pictures alone"):
        VideoBatches(labelled(3), range(3), [], Clock(robot_hz="20", video_hz="10", frames=4), batch_size=2, seed=0)
    with pytest.raises(ValueError, match="no clip of 4 frames at 10 Hz shows new pictures alone"):
        Batches(labelled(3), range(3), [Clock(robot_hz="20", video_hz="10", frames=4)], batch_size=2, seed=0)
