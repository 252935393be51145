"""The loss of a batch that is cut: that of the whole, whoever works on which rows of it."""

import pytest
import torch

from dreamgen.engine.shares import parts_of
from dreamgen.policies.palette import PaletteEncoder
from dreamgen.policies.regression import Regression
from tests.policies.test_space import framed
from tests.policies.toy import batch, policy

ON = dict(align_weight=0.3, align_layer=2, future_tokens=3, target="qformer")


def uneven() -> dict[str, torch.Tensor]:
    """Recordings first, then dreams that are hardly trusted, last a video without actions; some futures unknown."""
    data = batch()
    data["body"] = torch.tensor([0, 0, 1, 1, 0])
    data["weight"][2:4] = 0.1
    data["weight"][1, 2] = 0.5
    data["valid"][4] = False
    return data


@pytest.mark.parametrize(("replicas", "accumulate"), [(1, 2), (1, 3), (2, 1), (2, 2)])
@pytest.mark.parametrize("kind", ["flow", "prefix", "relative", "flare", "regression"])
def test_gradients_do_not_depend_on_the_cut(monkeypatch, replicas, accumulate, kind):
    palette = PaletteEncoder(width=20, colours=4, slots=3, hidden=12, views=2, noise=0.0, dropout=0.0)
    changes = {"prefix": dict(prefix=2), "flare": ON, "regression": dict(encoder=palette)}
    model = framed("relative") if kind == "relative" else policy(**changes.get(kind, {}))
    model.state_dropout = 0.0
    data = uneven()
    learner = Regression(model) if kind == "regression" else model
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.3))  # noise that the cut does not change
    monkeypatch.setattr("dreamgen.policies.policy.sample_time", lambda n, like: torch.full((n,), 0.4))
    monkeypatch.setattr(torch, "randint", lambda low, high, size, device: torch.full(size, high - 1))
    cut = model.whole(data)

    def gradients(replicas: int, accumulate: int) -> tuple[float, list[torch.Tensor]]:
        learner.zero_grad(set_to_none=False)
        total = 0.0
        for replica in range(replicas):
            for part in parts_of(cut, replica, replicas, 0, 1, accumulate, torch.device("cpu")):
                loss = learner.loss(part.batch)[0] * part.weight / replicas
                loss.backward()
                total += float(loss.detach())
        return total, [torch.zeros(()) if p.grad is None else p.grad.clone() for p in learner.parameters()]

    whole, want = gradients(1, 1)
    assert whole == pytest.approx(float(learner.loss(data)[0].detach()), rel=1e-5)
    loss, found = gradients(replicas, accumulate)
    assert loss == pytest.approx(whole, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(found, want, strict=True))
    assert sum(float(g.abs().sum()) for g in want) > 1
