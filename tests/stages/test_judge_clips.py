"""The clips that a judge learns from, as a world model shows them: kept while the stage runs."""

from functools import partial
from pathlib import Path

import pytest

from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.stages.judge_clips import shown_by
from dreamgen.stages.sharing import Parts
from dreamgen.stages.train_judge import train_judge
from tests.stages.test_train_judge import OPTIONS, ROBOT, Autoencoder, Inverted, episodes, tiny


def test_clips_that_were_dreamt_before_a_kill_are_not_dreamt_again(tmp_path: Path, monkeypatch) -> None:
    write_dataset(tmp_path / "data", episodes(), ROBOT)
    dataset = Dataset(tmp_path / "data", ROBOT)
    for dreams in (Inverted(), Autoencoder(0.5)):
        out = tmp_path / type(dreams).__name__
        options = OPTIONS | {"steps": 2, "world_model": dreams}
        train_judge(tiny, [dataset], out=out / "whole", **options)
        done, stops, write = [], {3, 4}, Parts.write  # within the training clips, and after them

        def dies(self, number, arrays, done=done, stops=stops, write=write):  # noqa: ANN001, ANN202
            if len(done) in stops:
                stops.discard(len(done))
                raise KeyboardInterrupt
            write(self, number, arrays)
            done.append((self.root.name, number))

        monkeypatch.setattr("dreamgen.stages.train_judge.shown_by", partial(shown_by, batch_size=8))
        monkeypatch.setattr(Parts, "write", dies)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train_judge(tiny, [dataset], out=out / "killed", **options)
        train_judge(tiny, [dataset], out=out / "killed", **options)
        monkeypatch.undo()
        assert len(done) == len(set(done)) and len({call for call, _ in done}) > 1
        for file in ("model.safetensors", "config.json", "scores.json"):
            assert (out / "whole" / file).read_bytes() == (out / "killed" / file).read_bytes()
        assert not (out / "killed/shown").exists()
