"""Where a dataset is looked for: a folder, or the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
import pytest

from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset


@pytest.fixture
def asked(tmp_path, robot, make_episodes, monkeypatch) -> list[dict]:
    """What is asked of the hub, which has any dataset; it lies in the folder `there`."""
    calls = []
    write_dataset(tmp_path / "there", make_episodes(3), robot)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **options: calls.append({"repo": repo, **options}) or str(tmp_path / "there"),
    )
    monkeypatch.chdir(tmp_path)
    return calls


def test_hub_id_downloads(robot, asked):
    assert len(Dataset("someone/some-data", robot, revision="main")) == 3
    assert asked == [{"repo": "someone/some-data", "repo_type": "dataset", "revision": "main"}]


def test_hub_id_offline(robot, monkeypatch):
    def unreachable(*_, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match="someone/some-data is no local folder.*no route to host"):
        Dataset("someone/some-data", robot)


def test_a_folder_of_the_name_of_an_organisation_does_not_hide_the_hub(tmp_path, robot, make_episodes, asked):
    (tmp_path / "lerobot/src").mkdir(parents=True)  # a clone of its code
    assert len(Dataset("lerobot/pusht", robot)) == 3 and asked.pop()["repo"] == "lerobot/pusht"
    write_dataset(tmp_path / "lerobot/mine", make_episodes(2), robot)
    assert len(Dataset("lerobot/mine", robot)) == 2
    with pytest.raises(ValueError, match="folder lerobot holds others; write hf://lerobot/pusht if .*./lerobot/pusht"):
        Dataset("lerobot/pusht", robot)
    with pytest.raises(ValueError, match="./lerobot/pusht does not exist; mend"):
        Dataset("./lerobot/pusht", robot)
    assert asked == []
    for root in ("hf://lerobot/mine", Path("hf://lerobot/mine")):  # a path has one slash less
        assert len(Dataset(root, robot)) == 3 and asked.pop()["repo"] == "lerobot/mine"
