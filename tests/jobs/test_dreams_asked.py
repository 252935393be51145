"""How many dreams are asked for is known before they are made, as far as their prompts tell."""

from omegaconf import OmegaConf

from dreamgen.core.manifest import write_json
from jobs.dreams import asked


def test_dreams_are_counted_as_far_as_their_prompts_tell(tmp_path) -> None:
    def count(**told: object) -> int | None:
        return asked(OmegaConf.create({"keyframes": [0], "repeats": 3, "episodes": None, **told}))

    assert (count(first_frames=5), count(folder="pictures")) == (15, None)
    under = {"first_frames": 5, "every_instruction": True}
    assert (count(**under, instructions=["a", "b", "a"]), count(**under, instructions=None)) == (30, None)
    data = {"root": str(tmp_path), "episodes": None, "leave_out": [0, 3]}
    assert count(dataset=data) is None
    (tmp_path / "meta").mkdir()
    info = {"codebase_version": "v2.1", "fps": 10, "features": {}, "data_path": "{episode_index}"}
    write_json(tmp_path / "meta" / "info.json", info)
    (tmp_path / "meta" / "tasks.jsonl").touch()
    rows = [f'{{"episode_index": {i}, "length": 9, "tasks": ["go"]}}\n' for i in range(11)]
    (tmp_path / "meta" / "episodes.jsonl").write_text("".join(rows))
    assert count(dataset=data) == 9 * 3 and count(dataset=data, episodes=4, keyframes=[0, 0.5]) == 4 * 2 * 3
    assert count(dataset={**data, "episodes": [3, 4, 5, 99]}) == 2 * 3
