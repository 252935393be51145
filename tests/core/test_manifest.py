"""Writing in one piece, whoever else writes."""

import pytest

from dreamgen.core.manifest import replacing
from dreamgen.stages.sharing import sweep


def test_processes_of_one_number_on_two_machines_do_not_meet(tmp_path):
    path = tmp_path / "a.npy"
    with replacing(path) as one, replacing(path) as other:
        assert one != other and {one.parent, other.parent} == {tmp_path} and one.suffix == ".npy"
        one.write_text("one")
        other.write_text("other")
        assert not path.exists()
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]  # the last to end


def test_what_a_kill_leaves_is_swept(tmp_path):
    with replacing(tmp_path / "a.npy") as name:
        name.touch()
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "b.npy") as other:
        other.touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    name.touch()  # of a process that was killed
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
