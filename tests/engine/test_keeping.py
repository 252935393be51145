"""A training state is kept by the clock, where steps take long."""

import pytest

from tests.engine.test_train import batch_at, run


def test_a_state_is_kept_where_steps_take_long(tmp_path, monkeypatch):
    for name in ("KEEP_SECONDS", "SPARE"):
        monkeypatch.setattr(f"dreamgen.engine.train.{name}", 0.0)
    asked = []

    def dies(step):
        asked.append(step)
        if step == 3 and asked.count(3) == 1:
            raise KeyboardInterrupt
        return batch_at(step)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 5, dies, checkpoint_every=500)
    again, _ = run(tmp_path / "cut", 5, dies, checkpoint_every=500)
    assert asked.count(0) == 1
    whole, _ = run(tmp_path / "whole", 5, checkpoint_every=500)
    assert all((a == b).all() for a, b in zip(whole.parameters(), again.parameters(), strict=True))
