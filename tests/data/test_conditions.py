"""data/conditions.py, with a row of the test's own; tests/test_labels.py has the row of labels."""

from types import SimpleNamespace

import torch

from data.conditions import (
    CONDITIONS,
    Condition,
    chosen_inputs,
    in_grids,
    with_conditions,
    without_conditions,
)
from tests.conftest import normal, refused


class Mean(Condition):
    """A number that follows from x_0."""

    name = "mean"
    switch = "means"

    def of_x_0(self, x_0):
        return x_0.mean((1, 2, 3))

    def absent(self, facts):
        return -9.0


def test_a_condition_is_a_row_that_is_read_dropped_and_chosen(monkeypatch):
    monkeypatch.setitem(CONDITIONS, "mean", Mean())
    on = {"means": True, "label_names": ["a", "b"]}
    x_0 = normal(0, 4, 3, 2, 2)
    own = {"label": torch.tensor([0, 1, 0, 1]), "other": normal(1, 4, 5)}
    assert with_conditions(own, x_0, {}) == own
    inputs = with_conditions(own, x_0, on)
    assert inputs == own | {"mean": inputs["mean"]}
    assert torch.equal(inputs["mean"], x_0.mean((1, 2, 3)))

    # All conditions of an image are dropped at once, but no input of one's own network.
    dropped = without_conditions(inputs, torch.tensor([True, False, False, True]), on)
    assert dropped["label"].tolist() == [2, 1, 0, 2]
    assert dropped["mean"].tolist() == [-9, *inputs["mean"][1:3].tolist(), -9]
    assert dropped["other"] is inputs["other"]
    assert in_grids(inputs, on)["mean"] is inputs["mean"]

    given = SimpleNamespace(label=(), mean=0.25)
    assert chosen_inputs(given, on, [5, 6], 2.0) == {"mean": 0.25}
    with refused("--mean: the model was trained without means"):
        chosen_inputs(given, {}, [5], None)
    given.mean = None
    assert chosen_inputs(given, on, [5], None) == {}
    with refused("--cfg needs a condition: --mean a number$"):
        chosen_inputs(given, on, [5], 2.0)
    monkeypatch.setattr(Mean, "missing", "it needs a mean")
    with refused("it needs a mean"):
        chosen_inputs(given, on, [5], None)
    assert chosen_inputs(given, {}, [5], None) == {}
