"""Colours that things have: exact places, rare colours kept, saved with the policy."""

import dataclasses

import numpy as np
import pytest
import torch

from dreamgen.policies.flow import euler
from dreamgen.policies.inference import integrate
from dreamgen.policies.palette import PaletteEncoder, choose_colours
from dreamgen.policies.policy import FlowPolicy
from tests.policies.toy import STEPS, counted, observations, policy, robot

GREY, RED, BLUE = (90, 92, 91), (250, 20, 25), (20, 30, 240)


def scene(rows: list[int], cols: list[int], *, size: int = 48, views: int = 1) -> torch.Tensor:
    """A grey table with a red 4x6 block at each (row, column), and a blue one that stays."""
    pictures = torch.tensor(GREY, dtype=torch.uint8).repeat(len(rows), views, size, size, 1)
    for picture, row, col in zip(pictures, rows, cols, strict=True):
        picture[:, row : row + 4, col : col + 6] = torch.tensor(RED, dtype=torch.uint8)
        picture[:, 40:44, 2:6] = torch.tensor(BLUE, dtype=torch.uint8)
    return pictures


def fitted(**options) -> tuple[PaletteEncoder, torch.Tensor]:  # noqa: ANN003
    torch.manual_seed(3)
    pictures = scene([3, 11, 20, 27, 31], [30, 7, 12, 21, 35])
    encoder = PaletteEncoder(width=24, colours=3, summary=2, hidden=40, **{"slots": 4, **options}).eval()
    encoder.fit(pictures)
    return encoder, pictures


def test_rare_colours_are_chosen():
    found = choose_colours(scene([3, 11, 20], [30, 7, 12]), count=3)
    for colour in (GREY, RED, BLUE):
        assert (found - torch.tensor(colour)).abs().amax(1).min() < 1


def test_centre_extent_and_share_are_exact():
    encoder, _ = fitted()
    red = int((encoder.palette - torch.tensor(RED)).abs().sum(1).argmin())
    found = encoder.measure(scene([17], [26]))[0, red]
    few = 24 / (24 + 0.25)  # a colour's own pixels against those it is shrunk by
    rows, cols = (np.arange(17, 21) + 0.5) / 24 - 1, (np.arange(26, 32) + 0.5) / 24 - 1
    assert found[0] == pytest.approx(rows.mean() * few, abs=2e-3)
    assert found[1] == pytest.approx(cols.mean() * few, abs=2e-3)
    extent = np.sqrt((rows**2).mean() * few - (rows.mean() * few) ** 2)
    assert found[2] == pytest.approx(extent, abs=2e-3)
    assert found[4] == pytest.approx(np.log1p(24 * (4096 / 48**2) / 40), abs=1e-2)


def test_the_other_block_does_not_move():
    encoder, pictures = fitted()
    blue = int((encoder.palette - torch.tensor(BLUE)).abs().sum(1).argmin())
    found = encoder.measure(pictures)[:, blue]
    torch.testing.assert_close(found, found[:1].expand_as(found), atol=1e-5, rtol=0)


def test_tokens_depend_on_picture_and_instruction_row_by_row():
    encoder, pictures = fitted()
    words = encoder.words(["lift the red block", "lift the blue block", "push the red block", "open it", "close it"])
    visual, language = encoder(pictures, words)
    assert visual.shape == (5, 2 + 4, 24) and language.shape == (5, 1, 24)
    alone, _ = encoder(pictures[2:3], words[2:3])
    torch.testing.assert_close(alone[0], visual[2], atol=1e-4, rtol=1e-4)  # extents are roots of differences
    other, _ = encoder(pictures[2:3], words[1:2])
    for part in (slice(2), slice(2, 6)):  # summaries and places are steered by the instruction
        assert (other[0, part] - visual[2, part]).abs().max() > 1e-3


@torch.no_grad()
def test_a_slot_is_where_the_colour_is_that_it_asks_for():
    encoder, pictures = fitted(slots=2)
    found, text = encoder.measure(pictures), encoder.text(encoder.words(["lift it"] * 5))
    red, blue = (int((encoder.palette - torch.tensor(c)).abs().sum(1).argmin()) for c in (RED, BLUE))
    encoder.asked.weight.zero_(), encoder.asked.bias.zero_(), encoder.size.zero_()
    encoder.name.copy_(torch.eye(3, encoder.name.shape[1]))
    encoder.usual.copy_(1e3 * encoder.name[[red, blue]])
    torch.testing.assert_close(encoder.places(found, text), found[:, [red, blue]])
    encoder.usual.zero_(), encoder.size.fill_(1)  # by size alone: the mean over all coloured pixels
    share = found[..., 4:].expm1() + 1e-3
    want = (found * share).sum(1) / share.sum(1)
    torch.testing.assert_close(encoder.places(found, text), want[:, None].expand(-1, 2, -1))


def test_noise_acts_in_training_only():
    encoder, pictures = fitted(noise=0.3)
    words = encoder.words(["lift it"] * 5)
    assert torch.equal(encoder(pictures, words)[0], encoder(pictures, words)[0])
    encoder.train()
    assert not torch.equal(encoder(pictures, words)[0], encoder(pictures, words)[0])


def test_views_must_agree():
    encoder = PaletteEncoder(colours=3, views=2)
    with pytest.raises(ValueError, match="1 views; this encoder was made for 2"):
        encoder.fit(scene([3, 9], [5, 8]))
    encoder.fit(scene([3, 9], [5, 8], views=2))
    torch.manual_seed(0)
    looking = policy(encoder=PaletteEncoder(width=24, colours=3, slots=2, hidden=12)).encoder  # of a robot with two
    looking.fit(scene([3, 9], [5, 8], views=2))
    assert looking.config["views"] == 2 and looking.name.shape[0] == len(looking.std) == 6
    before = looking.name.clone()
    looking.look_at(2)
    assert torch.equal(looking.name, before)


def test_palette_is_saved(tmp_path):
    encoder, pictures = fitted()
    torch.save(encoder.state_dict(), tmp_path / "weights")
    again = PaletteEncoder(**encoder.config).eval()
    again.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    words = encoder.words(["lift it"] * 5)
    assert torch.equal(again(pictures, words)[0], encoder(pictures, words)[0])


def test_kept_features_give_the_same_tokens():
    encoder, pictures = fitted()
    words = encoder.words(["lift the red block"] * 5)
    kept, want = encoder.features(pictures, words), encoder(pictures, words)
    for measures, off in ((kept, 1e-6), (kept.half().float(), 0.1)):  # half: a hundredth of the noise in training
        for a, b in zip(encoder.project(measures, words), want, strict=True):
            torch.testing.assert_close(a, b, atol=off, rtol=0)


def test_it_is_compiled_once(monkeypatch):
    graphs = counted(monkeypatch)
    encoder = PaletteEncoder(colours=4, width=24, text_width=12, buckets=60, hidden=20)
    model = FlowPolicy(robot=robot(), encoder=encoder, horizon=STEPS, layers=1, heads=2, head_width=8).eval()
    for seen in observations(3):
        model.act([seen], [1])
        assert len(graphs) == 1


@torch.no_grad()
def test_summaries_reach_the_chunk_and_the_fast_way_acts_the_same():
    encoder = PaletteEncoder(views=2, colours=4, width=24, text_width=12, buckets=60, summary=2, hidden=20)
    model = FlowPolicy(robot=robot(), encoder=encoder, horizon=STEPS, layers=2, heads=2, head_width=8).eval()
    found = observations(2)
    encoder.fit(torch.from_numpy(np.stack([np.stack(list(o.views.values())) for o in found])))
    left, right = (dataclasses.replace(found[0], instruction=text) for text in ("go left", "go right"))
    seen = model.observe([left, right, dataclasses.replace(found[1], instruction="go left")])
    assert (seen.plan[0] - seen.plan[1]).abs().max() > 1e-4 and (seen.plan[0] - seen.plan[2]).abs().max() > 1e-4
    noise = model.noise([1, 2, 3])
    slow = euler(lambda x, t: model.velocity(x, t, seen.state, seen.plan, seen.context, seen.body)[0], noise, 4)
    fast = integrate(model, noise, seen.state, seen.plan, seen.context, 4, 0)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
