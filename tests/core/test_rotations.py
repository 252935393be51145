"""Rotations against scipy, at and across the places where their entries wrap."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dreamgen.core import rotations
from dreamgen.core.part import ROTATIONS, Part

N = 41


def part(rotation: str, **changes) -> Part:
    return Part(name="turn", start=0, stop=ROTATIONS[rotation], rotation=rotation, **changes)


def told(kind: str, rotation: Rotation) -> np.ndarray:
    """Entries by scipy."""
    match kind:
        case "axis_angle":
            return rotation.as_rotvec()
        case "euler_xyz":
            return rotation.as_euler("xyz")
        case "euler_xyz_intrinsic":
            return rotation.as_euler("XYZ")
        case "quaternion_xyzw":
            return rotation.as_quat(canonical=True)
        case "quaternion_wxyz":
            return np.roll(rotation.as_quat(canonical=True), 1, -1)
        case "rot6d":
            return rotation.as_matrix()[..., :2, :].reshape(*rotation.as_quat().shape[:-1], 6)
    return np.swapaxes(rotation.as_matrix()[..., :, :2], -1, -2).reshape(*rotation.as_quat().shape[:-1], 6)


def quaternions(rotation: Rotation) -> np.ndarray:
    return np.roll(rotation.as_quat(), 1, -1)


def samples() -> Rotation:
    """All over, next to none, and next to half a turn."""
    rng = np.random.default_rng(0)
    axis = rng.normal(size=(N, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    angles = (0.0, 1e-12, 1e-8, 1e-4, np.pi - 1e-4, np.pi - 1e-8, np.pi)
    return Rotation.concatenate([Rotation.random(N, rng=rng), *(Rotation.from_rotvec(axis * a) for a in angles)])


@pytest.mark.parametrize("kind", ROTATIONS)
def test_entries_are_those_of_scipy(kind):
    rotation, turn = samples(), part(kind)
    q = rotations.read(turn, told(kind, rotation))
    np.testing.assert_allclose(rotations.angle(q, quaternions(rotation)), 0, atol=2e-8)
    again = rotations.tell(turn, q)
    np.testing.assert_allclose(rotations.angle(rotations.read(turn, again), q), 0, atol=1e-10)
    sure = np.abs(rotation.magnitude() - np.pi) > 1e-3  # at half a turn two tellings are as good
    np.testing.assert_allclose(again[sure], told(kind, rotation)[sure], atol=1e-7)
    tensor = rotations.read(turn, torch.from_numpy(told(kind, rotation)).float().unflatten(0, (8, N)))
    assert tensor.shape == (8, N, 4) and tensor.dtype == torch.float64
    np.testing.assert_allclose(rotations.angle(tensor.flatten(0, 1).numpy(), quaternions(rotation)), 0, atol=1e-6)


@pytest.mark.parametrize("kind", ["euler_xyz", "euler_xyz_intrinsic"])
def test_a_pitch_of_a_quarter_turn_loses_nothing(kind):
    for pitch in (np.pi / 2, -np.pi / 2, np.pi / 2 - 1e-9, np.pi / 2 + 0.2, -2.0):
        angles = np.array([[0.3, pitch, -1.1], [-2.9, pitch, 3.0]])
        rotation = Rotation.from_euler("xyz" if kind == "euler_xyz" else "XYZ", angles)
        q = rotations.read(part(kind), angles)
        np.testing.assert_allclose(rotations.angle(q, quaternions(rotation)), 0, atol=1e-8)
        again = rotations.tell(part(kind), q)
        np.testing.assert_allclose(rotations.angle(rotations.read(part(kind), again), q), 0, atol=1e-6)
        assert (np.abs(again[:, 1]) <= np.pi / 2 + 1e-9).all()


def test_degrees_scales_and_what_is_no_rotation():
    rotation = Rotation.from_euler("xyz", [[170.0, 10.0, -170.0]], degrees=True)
    q = rotations.read(part("euler_xyz", unit="deg"), np.array([[170.0, 10.0, -170.0]]))
    np.testing.assert_allclose(rotations.angle(q, quaternions(rotation)), 0, atol=1e-8)
    half = part("axis_angle", scale=0.5)
    np.testing.assert_allclose(rotations.tell(half, rotations.read(half, np.array([0.2, -1.0, 0.4]))), [0.2, -1, 0.4])
    np.testing.assert_array_equal(rotations.read(part("quaternion_xyzw"), np.zeros((1, 4))), [[1, 0, 0, 0]])
    assert np.isfinite(rotations.read(part("rot6d"), np.zeros((1, 6)))).all()
    with pytest.raises(ValueError, match="part 'plain' is no rotation"):
        rotations.read(Part(name="plain", start=0, stop=3), np.zeros(3))


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rest_turns_nothing(kind):
    turn = part(kind, kind="delta")
    assert rotations.angle(rotations.read(turn, np.array(turn.rest)), np.array([1.0, 0, 0, 0])) == 0
    np.testing.assert_allclose(rotations.tell(turn, np.array([1.0, 0, 0, 0])), turn.rest, atol=1e-15)


def test_composition_and_logarithm_are_those_of_scipy():
    a, b = samples(), samples()[::-1]
    qa, qb = quaternions(a), quaternions(b)
    np.testing.assert_allclose(rotations.angle(rotations.product(qa, qb), quaternions(a * b)), 0, atol=1e-8)
    np.testing.assert_allclose(rotations.angle(qa, qb), (a.inv() * b).magnitude(), atol=1e-7)
    sure = a.magnitude() < np.pi - 1e-3
    np.testing.assert_allclose(rotations.log(qa)[sure], a.as_rotvec()[sure], atol=1e-8)
    np.testing.assert_allclose(rotations.angle(rotations.exp(rotations.log(qa)), qa), 0, atol=1e-8)
    for frame in ("base", "tool"):
        turn = part("axis_angle", kind="delta", frame=frame)
        total, found = Rotation.identity(), rotations.composed(turn, qa)
        for k in range(len(a)):
            total = total * a[k] if frame == "tool" else a[k] * total
            assert rotations.angle(found[k], quaternions(total)) < 1e-7
        start = quaternions(b[:1])
        moved = rotations.turned(turn, start, qa[3:4])
        expected = b[0] * a[3] if frame == "tool" else a[3] * b[0]
        np.testing.assert_allclose(rotations.angle(moved, quaternions(expected)[None]), 0, atol=1e-8)
        np.testing.assert_allclose(rotations.angle(rotations.between(turn, start, moved), qa[3:4]), 0, atol=1e-8)


def test_vectors_are_turned_as_by_scipy():
    vectors = np.random.default_rng(2).normal(size=(8 * N, 3))
    np.testing.assert_allclose(rotations.rotate(quaternions(samples()), vectors), samples().apply(vectors), atol=1e-12)
    assert rotations.rotate(torch.ones(2, 1, 4) / 2, torch.rand(1, 5, 3)).shape == (2, 5, 3)


def test_means_are_those_of_scipy_whatever_the_signs():
    rng = np.random.default_rng(1)
    rotation = Rotation.from_rotvec(rng.normal(0, 0.4, (9, 3))) * Rotation.from_rotvec([np.pi - 0.1, 0, 0])
    weight = rng.uniform(0.1, 1, 9)
    q = quaternions(rotation) * np.sign(rng.normal(size=(9, 1)))
    assert rotations.angle(rotations.mean(q, weight), quaternions(rotation.mean(weight))) < 1e-7
    turn = part("axis_angle")
    assert np.abs(rotation.as_rotvec().mean(0)).max() < 2.5  # the mean of the entries is another
    np.testing.assert_allclose(rotations.angle(rotations.read(turn, rotations.middle(turn, rotation.as_rotvec())),
                                               quaternions(rotation.mean())), 0, atol=1e-7)  # fmt: skip


@pytest.mark.parametrize("kind", ROTATIONS)
def test_entries_go_on_without_wraps(kind):
    """A spin of three turns about a tilted axis, and one by way of the pole of euler angles."""
    for axis in ([0.2, 0.3, 1.0], [0.0, 1.0, 0.0]):
        axis = np.array(axis) / np.linalg.norm(axis)
        spin = Rotation.from_rotvec(np.linspace(0.1, 19, 200)[:, None] * axis)
        values = told(kind, spin)
        smooth = rotations.continued(part(kind), values, values[0])
        np.testing.assert_array_equal(smooth[0], values[0])
        jump = np.abs(np.diff(smooth, axis=0)).max()
        assert jump < 0.5 and (kind.startswith("rot6d") or np.abs(np.diff(values, axis=0)).max() > 1)
        assert rotations.apart(part(kind), smooth, values).max() < 1e-6
    principal = rotations.entries(part(kind), rotations.read(part(kind), smooth), values)
    np.testing.assert_array_equal(principal, values)  # what is told already is kept as it is told
    other = rotations.entries(part(kind), rotations.read(part(kind), smooth), np.roll(values, 1, 0))
    assert rotations.apart(part(kind), other, values).max() < 1e-6
    assert kind.startswith(("rot6d", "quat")) or np.abs(other).max() <= np.pi + 1e-6


@pytest.mark.parametrize("kind", ROTATIONS)
def test_between_frames_the_turn_is_even(kind):
    spin = Rotation.from_rotvec(np.linspace(2.5, 4.0, 4)[:, None] * [0.6, 0.0, 0.8])  # across half a turn
    at, wanted = np.array([0, 3, 5, 9]), np.arange(10)
    found = rotations.along(part(kind), at, told(kind, spin), wanted)
    angle = np.interp(wanted, at, np.linspace(2.5, 4.0, 4))
    expected = Rotation.from_rotvec(angle[:, None] * [0.6, 0.0, 0.8])
    np.testing.assert_allclose(rotations.angle(rotations.read(part(kind), found), quaternions(expected)), 0, atol=1e-7)
    np.testing.assert_array_equal(found[at], told(kind, spin))
    assert rotations.along(part(kind), [0], told(kind, spin)[:1], np.arange(1)).shape == (1, ROTATIONS[kind])


def test_straightened_rows_have_no_wraps():
    spin = [Rotation.from_rotvec((np.pi + np.linspace(-0.4, 0.4, 20) + k / 9)[:, None] * [1.0, 0, 0]) for k in (0, 1)]
    parts = (Part(name="place", start=0, stop=1), Part(name="turn", start=1, stop=4, rotation="axis_angle"))
    rows = [np.concatenate([np.ones((20, 1)), s.as_rotvec()], 1).astype(np.float32) for s in spin]
    made = rotations.straightened(parts, rows)
    assert np.abs(np.diff(made[0], axis=0)).max() < 0.1 and np.abs(np.diff(rows[0], axis=0)).max() > 6
    assert made[0].dtype == np.float32 and abs(abs(made[0][:, 1].mean()) - np.pi) < 1e-3
    assert rotations.straightened(parts[:1], rows)[0] is rows[0]
