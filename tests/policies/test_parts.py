"""The pieces of a policy: transformer, flow, bodies, encoder, augmentation."""

import pytest
import torch

from dreamgen.policies import augment
from dreamgen.policies.body import BodyLinear
from dreamgen.policies.dit import DiT, count, on_meta, repeat_context
from dreamgen.policies.encoder import TinyEncoder
from dreamgen.policies.flow import euler, interpolate, sample_time
from jobs.recipe import load


def configured(name: str) -> dict[str, int]:
    """The transformer of conf/policy/<name>.yaml."""
    config = load("train_policy", [f"policy={name}"])[0].policy
    return {key: config[key] for key in ("layers", "heads", "head_width", "out_width")} | {
        "context_width": config.encoder.width
    }


def test_parameters_of_groot_n1():
    """16 layers of 32 x 48 on 1536-wide tokens: the published 537.8M; N1.5's 550.4M with 2048-wide tokens."""
    n1 = configured("n1")
    assert count(on_meta(**n1)) == 537_803_776
    assert count(on_meta(**{**n1, "context_width": 2048})) == 550_386_688


def test_parameters_of_groot_n1_6():
    """32 layers of 32 x 48 on 2048-wide tokens: what its published server counts when it loads."""
    assert count(on_meta(**configured("n1_6"))) == 1_091_722_240


def test_euler_samples_known_fields():
    noise = torch.randn(2, 3, 5)
    goal = torch.randn(2, 3, 5)
    straight = euler(lambda x, t: goal - noise, noise, 4)
    torch.testing.assert_close(straight, goal)
    torch.testing.assert_close(euler(lambda x, t: (goal - x) / (1 - t)[:, None, None], noise, 7), goal)
    # dx/dt = x: K Euler steps give (1 + 1/K)^K
    torch.testing.assert_close(euler(lambda x, t: x, noise, 3), noise * (4 / 3) ** 3)


def test_interpolate_and_time():
    x, noise = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    torch.testing.assert_close(interpolate(x, noise, torch.zeros(2)), noise)
    torch.testing.assert_close(interpolate(x, noise, torch.ones(2)), x)
    torch.manual_seed(0)
    t = sample_time(200_000, like=x)
    assert t.min() >= 0 and t.max() < 1
    assert abs(float(t.mean()) - (1 - 1.5 / 2.5)) < 2e-3  # 1 - mean of Beta(1.5, 1)


def test_body_weights_are_chosen_row_by_row():
    layer, x, body = BodyLinear(3, 4, 7), torch.randn(5, 2, 4), torch.tensor([2, 0, 1, 2, 0])
    want = torch.stack([x[i] @ layer.weight[k] + layer.bias[k] for i, k in enumerate(body)])
    torch.testing.assert_close(layer(x, body), want)


def test_repeated_context_equals_repeated_observations():
    dit = DiT(layers=3, heads=2, head_width=4, context_width=6, out_width=5).eval()
    tokens, x, t = torch.randn(2, 9, 6), torch.randn(6, 4, 8), torch.rand(6)
    a, _ = dit(x, t, repeat_context(dit.context(tokens), 3))
    b, _ = dit(x, t, dit.context(tokens.repeat_interleave(3, 0)))
    torch.testing.assert_close(a, b)


def test_encoder_finds_where_things_are():
    """A keypoint whose heat map is one bright channel lands on the bright square, to a fraction of a pixel."""
    encoder = TinyEncoder(width=12, channels=(8,), halvings=1, keypoints=1, patches=2)
    pictures = torch.zeros(3, 1, 16, 24, 3, dtype=torch.uint8)
    for i, (row, col) in enumerate([(2, 4), (8, 20), (12, 12)]):
        pictures[i, 0, row : row + 2, col : col + 2] = 255
    found = []
    encoder.place.register_forward_pre_hook(lambda _, args: found.append(args[0][..., :2]))
    encoder.stages = torch.nn.ModuleList([Pool()])
    encoder.heat = torch.nn.Linear(8, 1, bias=False)
    torch.nn.init.constant_(encoder.heat.weight, 5.0)
    encoder(pictures, encoder.words(["a"] * 3))
    want = torch.tensor(
        [(3 * 2 / 16 - 1, 5 * 2 / 24 - 1), (9 * 2 / 16 - 1, 21 * 2 / 24 - 1), (13 * 2 / 16 - 1, 13 * 2 / 24 - 1)]
    )
    torch.testing.assert_close(found[0][:, 0], want, atol=1e-3, rtol=0)


class Pool(torch.nn.Module):
    """Halves a picture, its brightness in all 8 channels."""

    def forward(self, x, text):
        y = torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).mean(1)
        return y[..., None].expand(-1, -1, -1, 8)


@pytest.mark.parametrize("size", [(24, 16), (17, 23)])
def test_words_and_tokens(size):
    encoder = TinyEncoder(width=12, channels=(4, 6), halvings=1, keypoints=5, colours=2, patches=3, length=4)
    words = encoder.words(["lift the red block", "Lift  the RED block", "block red the lift", "lift"])
    assert words.shape == (4, 8) and torch.equal(words[0], words[1]) and not torch.equal(words[0], words[2])
    assert (words[3, 2:] == 0).all()
    visual, language = encoder(torch.randint(0, 256, (4, 2, *size, 3), dtype=torch.uint8), words)
    assert visual.shape == (4, 2 * (5 + 2 + 9), 12) and language.shape == (4, 1, 12)
    assert torch.equal(language[0], language[1])
    assert not torch.allclose(language[0], language[2])


def test_a_colour_keypoint_is_where_its_colour_is():
    encoder = TinyEncoder(width=12, channels=(4, 6), halvings=1, keypoints=5, colours=2, patches=3)
    encoder.colour.weight.data = 20 * torch.tensor([[1.0, -1, -1], [-1, -1, 1]])
    picture = torch.full((1, 24, 32, 3), 128, dtype=torch.uint8)
    picture[0, 4:8, 20:24] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    picture[0, 16:20, 8:12] = torch.tensor([0, 0, 255], dtype=torch.uint8)
    red, blue = encoder._colour_places(picture)[0]
    assert torch.allclose(red, torch.tensor([6 / 24, 22 / 32]) * 2 - 1, atol=1e-3)
    assert torch.allclose(blue, torch.tensor([18 / 24, 10 / 32]) * 2 - 1, atol=1e-3)


def test_shift_moves_whole_rows_and_repeats_the_border():
    pictures = torch.arange(7 * 2 * 5 * 6 * 3).reshape(7, 2, 5, 6, 3).to(torch.uint8)
    torch.manual_seed(0)
    moved = augment.shift(pictures, 2)
    assert moved.shape == pictures.shape
    for a, b in zip(pictures, moved, strict=True):
        padded = torch.nn.functional.pad(a.permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="replicate")
        crops = [
            padded[..., i : i + 5, j : j + 6].permute(0, 2, 3, 1).to(torch.uint8) for i in range(5) for j in range(5)
        ]
        assert any(torch.equal(b, crop) for crop in crops)
    assert augment.shift(pictures, 0) is pictures and augment.jitter(pictures, 0.0) is pictures
    light = augment.jitter(pictures, 0.3)
    assert light.dtype == torch.uint8 and not torch.equal(light, pictures)
