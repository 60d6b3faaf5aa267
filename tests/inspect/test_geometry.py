"""ΔM and ΔD: a worked example, the effects of scaling and rotation, and the paper's two cases."""

import math

import models
import pytest
import torch
from torch import Tensor

import reparam
from reparam.inspect.geometry import Directions, correlation, geometry, of_update
from reparam.methods.dora import DoRAUpdate

W = torch.tensor([[3.0, 4.0], [0.0, 5.0]])


def test_the_worked_example() -> None:
    """W0 + BA = [[4, 4], [2, 5]] under DoRA: magnitudes stay, directions move by a known amount."""
    merged = torch.tensor([[3.53553391, 3.53553391], [1.85695338, 4.64238345]], dtype=torch.float64)
    found = geometry(W.double(), merged)
    assert found.magnitude == pytest.approx(0, abs=1e-8)
    assert found.direction == pytest.approx((0.0100505 + 0.0715233) / 2, abs=1e-6)
    columns = torch.tensor([[2.68328157, 4.0], [1.34164079, 5.0]], dtype=torch.float64)
    assert geometry(W.double(), columns, axis="input").magnitude == pytest.approx(0, abs=1e-8)


def test_scaling_has_no_direction_and_turning_no_magnitude() -> None:
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert geometry(w, w) == Directions(0.0, 0.0)
    scaled = geometry(w, 1.5 * w)
    assert scaled.magnitude == pytest.approx(0.5 * float(w.norm(dim=1).mean()))
    assert scaled.direction == pytest.approx(0, abs=1e-15)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    turned = geometry(w, w @ turn)
    assert turned.magnitude == pytest.approx(0, abs=1e-12)
    expected = 1 - torch.nn.functional.cosine_similarity(w, w @ turn, dim=1).mean()
    assert turned.direction == pytest.approx(float(expected))
    assert geometry(w, -w).direction == pytest.approx(2)


def test_small_changes_do_not_cancel() -> None:
    w = torch.ones(1, 2, dtype=torch.float64)
    angle = 1e-9
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    assert geometry(w, w @ turn.T).direction == pytest.approx(angle**2 / 2, rel=1e-6)


def test_rows_of_zeros_count_for_their_magnitude_alone() -> None:
    w, new = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert geometry(w, new) == Directions(2.5, 1.0)


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_an_update_is_measured_on_its_matrix(storage: str) -> None:
    model = models.llama()
    if storage != "dense":
        reparam.quantize(model, storage)
    adapter = reparam.attach(model, reparam.DoRA(r=2))
    for path, module in adapter.modules.items():
        update = adapter.updates[path]
        assert isinstance(update, DoRAUpdate)
        with torch.no_grad():
            update.magnitude *= 2  # of each row
        w: Tensor = module.frozen.tensor().double()
        found = of_update(module.frozen, update.factors(module.frozen))
        assert found.magnitude == pytest.approx(float(w.norm(dim=1).mean()), rel=1e-5)
        assert found.direction == pytest.approx(0, abs=1e-9)


def test_correlation() -> None:
    assert correlation([Directions(1.0, 2.0), Directions(2.0, 4.0), Directions(3.0, 6.0)]) == pytest.approx(1)
    assert correlation([Directions(1.0, 6.0), Directions(2.0, 4.0), Directions(3.0, 2.0)]) == pytest.approx(-1)
    assert math.isnan(correlation([Directions(1.0, 2.0)]))
