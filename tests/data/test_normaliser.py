import numpy as np
import pytest
import torch

from dreamgen.core import rotations
from dreamgen.core.embodiment import Part
from dreamgen.core.part import ROTATIONS
from dreamgen.data.normaliser import Normaliser

PARTS = (
    Part(name="move", start=0, stop=3, kind="delta"),
    Part(name="close", start=3, stop=4, kind="binary"),
    Part(name="still", start=4, stop=5),
)


def data(n: int = 400) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(n, 5)) * [1e-3, 2, 50, 1, 0] + [0, -1, 300, 0, -2.1]
    values[:, 3] = np.sign(values[:, 3])
    return values.astype(np.float32)


@pytest.mark.parametrize("rule", ["standard", "quantile"])
def test_normalise_and_denormalise_are_inverse(rule):
    values = data()
    n = Normaliser.fit(values, PARTS, rule=rule)
    z = n.normalise(values)
    assert z.dtype == np.float32
    assert np.allclose(n.denormalise(z), values, rtol=1e-5, atol=1e-6)
    tensor = torch.from_numpy(values).reshape(4, 100, 5)
    assert np.allclose(n.normalise(tensor).numpy().reshape(-1, 5), z, atol=1e-6)
    assert torch.allclose(n.denormalise(n.normalise(tensor)), tensor, rtol=1e-5, atol=1e-5)
    assert np.array_equal(z[:, 3], values[:, 3])
    assert np.abs(z[:, 4]).max() < 1e-5
    if rule == "standard":
        assert np.allclose(z[:, :3].mean(0), 0, atol=1e-3) and np.allclose(z[:, :3].std(0), 1, atol=1e-3)
    else:
        assert np.allclose(np.percentile(z[:, :3], [1, 99], axis=0), [[-1] * 3, [1] * 3], atol=1e-3)


@pytest.mark.parametrize("rule", ["standard", "quantile"])
@pytest.mark.parametrize("limits", [(-1.0, 1.0), (0.0, 0.08), (0.0, 255.0)])
def test_the_two_commands_of_a_binary_part_are_minus_one_and_one(rule, limits):
    part = Part(name="hand", start=0, stop=1, kind="binary", limits=limits)
    values = np.array(limits, np.float32)[[0, 0, 0, 1, 0]][:, None]
    n = Normaliser.fit(values, [part], rule=rule, floor=1e-3)
    if limits == (-1.0, 1.0):
        assert (n.offset.item(), n.scale.item()) == (0, 1)
    np.testing.assert_allclose(n.normalise(values)[:, 0], [-1, -1, -1, 1, -1], rtol=1e-5)
    np.testing.assert_allclose(n.denormalise(n.normalise(values)), values, rtol=1e-5, atol=1e-6)


def test_constant_entries_are_safe():
    n = Normaliser.fit(np.full((6, 2), -2.1, np.float32))
    assert np.allclose(n.normalise(np.array([-2.1, -1.1])), [0, 1], atol=1e-6)
    assert n.denormalise(np.array([0.3, -40.0], np.float32)).tolist() == [np.float32(-2.1)] * 2  # it stands still


def test_quantiles_of_an_entry_mostly_at_rest():
    values = np.zeros((1000, 1))
    values[:3] = 5
    z = Normaliser.fit(values, rule="quantile").normalise(values)
    assert np.isfinite(z).all() and z.max() < 50


def test_lies_in_the_checkpoint():
    n = Normaliser.fit(data(), PARTS)
    other = Normaliser(5)
    assert np.array_equal(other.normalise(data()), data())
    other.load_state_dict(n.state_dict(), strict=True)
    assert np.array_equal(other.normalise(data()), n.normalise(data()))


@pytest.mark.usefixtures("untyped")
def test_errors():
    with pytest.raises(ValueError, match="rule"):
        Normaliser.fit(data(), rule="minmax")
    with pytest.raises(ValueError, match="finite"):
        Normaliser.fit(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="4 wide.*5"):
        Normaliser.fit(data()[:, :4], PARTS)
    with pytest.raises(ValueError, match="4 wide.*for 5"):
        Normaliser(5).normalise(np.zeros((2, 4)))


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotations_are_seen_without_jumps_and_come_back(rotation):
    """A hand that points down: its entries wrap, or change their sign, and what a network sees does not."""
    part = Part(name="turn", start=1, stop=1 + ROTATIONS[rotation], rotation=rotation)
    turns = rotations.exp(np.linspace(np.pi - 0.3, np.pi + 0.3, 60)[:, None] * [0.9998, 0.02, 0.0])
    values = np.concatenate([np.linspace(0, 1, 60)[:, None], rotations.tell(part, turns)], 1).astype(np.float32)
    made = Normaliser.fit(values, [Part(name="place", start=0, stop=1), part])
    assert made.state_dict().keys() == {"offset", "scale"}
    loaded = Normaliser(values.shape[1], [part])
    loaded.load_state_dict(made.state_dict())
    for told in (values, torch.from_numpy(values).unflatten(0, (4, 15))):
        seen = loaded.normalise(told)
        assert type(seen) is type(told) and seen.dtype == told.dtype
        flat = np.asarray(seen).reshape(60, -1) * made.scale.numpy()
        assert np.abs(np.diff(flat[:, 1:], axis=0)).max() < 0.05
        back = loaded.denormalise(seen)
        assert rotations.apart(part, back[..., part.slice], told[..., part.slice]).max() < 1e-5
        np.testing.assert_allclose(back[..., 0], told[..., 0], atol=1e-6)
        if part.width == 4:  # no change of sign either, which other trainers would stumble over
            assert np.abs(np.diff(np.asarray(back).reshape(60, -1), axis=0)).max() < 0.05


def test_quaternions_come_back_with_the_sign_of_the_data():
    part = Part(name="turn", start=0, stop=4, rotation="quaternion_wxyz")
    turns = -rotations.exp(np.linspace(-1, 1, 9)[:, None] * [0.6, 0.0, 0.8])
    np.testing.assert_allclose(
        (made := Normaliser.fit(turns, [part])).denormalise(made.normalise(turns)), turns, atol=1e-6
    )
