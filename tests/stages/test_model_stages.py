"""Every model through the stages: fine-tuned with LoRA (killed, continued) and whole, then dreamed with."""

import numpy as np
import pytest

from dreamgen.core.clip import Episode
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.stages.dream import dream
from dreamgen.stages.finetune import finetune
from dreamgen.worlds.world import VideoWorld
from tests.worlds import zoo
from tests.worlds.test_models import NAMES, apart, prompts


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[tuple[int, int], Dataset]:
    """Two episodes of one clip each, for each size of picture."""
    rng, found = np.random.default_rng(0), {}
    for size in sorted({zoo.sizes(name) for name in NAMES}):
        root, robot = tmp_path_factory.mktemp("models") / f"demos_{size[0]}", zoo.robot(*size)
        write_dataset(root, [
            Episode(instruction=zoo.TEXTS[i], state=rng.normal(size=(17, 2)).astype(np.float32),
                    action=rng.normal(size=(17, 3)).astype(np.float32), meta={},
                    video={"front": rng.integers(0, 256, (17, *size, 3), dtype=np.uint8)})
            for i in range(2)
        ], robot)  # fmt: skip
        found[size] = Dataset(root, robot)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_tuned_and_dreams(name, datasets, tmp_path, monkeypatch):
    folder, data = zoo.save(name, tmp_path / "base"), datasets[zoo.sizes(name)]
    options = {"batch_size": 2, "warmup": 1, "validation": 0, "validate_every": 1, "lr": 1e-2, "record": {}}
    calls, loss = [], VideoWorld.loss

    def killed(self, batch):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(VideoWorld, "loss", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(zoo.world(name, folder), data, out=tmp_path / "lora", method="lora", steps=2, **options)
    done = finetune(zoo.world(name, folder), data, out=tmp_path / "lora", method="lora", steps=2, **options)
    assert done["results"]["windows"] == 2 and (tmp_path / "lora" / "adapter").is_dir()
    finetune(zoo.world(name, folder), data, out=tmp_path / "full", steps=1, **options)
    base = zoo.world(name, folder).dream(prompts(name, 2))
    extra = {"guardrail": False} if name.startswith("cosmos") else {}
    for kind in ("lora", "full"):
        world = zoo.WORLDS[name].load(tmp_path / kind, **extra)
        out = tmp_path / f"{kind}_dreams"
        assert dream(world, lambda: prompts(name, 2), out=out, batch_size=2, record={})["results"]["clips"] == 2
        clips = ClipFolder(out / "clips")
        assert sorted(clips.ids()) == ["p0", "p1"] and clips.read("p0").video.shape == base[0].video.shape
        assert any(apart(a.video, b.video) for a, b in zip(world.dream(prompts(name, 2)), base, strict=True))
