"""What a network can get beside x_t and t: the conditions, a row of CONDITIONS each.

A row says how a condition is read from a data set or follows from x_0, what stands for none, what a
model knows of it, and how it is chosen for a drawing. All else goes through the rows, and names
none. How a condition enters the network stands in models/unet.py.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.packed import ImageSet
from data.sources import Source
from functions.support.errors import UserError, printable
from functions.support.settings import setting

# What is known of a model: the fields of its DiffusionConfig and of its ModelConfig, and the
# `facts` of its ImageSet, which its provenance has.
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """What a drawing can ask of the conditions: a field has the name of its row."""

    # The labels to draw, of a model that was trained with labels. Image i gets the label i mod K of
    # these K.
    label: tuple[str, ...] = setting(())


class Condition:
    """A row of CONDITIONS. What a class does not define is as for a number that is always given."""

    # The name of the network's argument and of the field of `Given`.
    name: str
    # The field of DiffusionConfig with which a training turns the condition on.
    switch: str
    # The error of a drawing that gives no value, if the model cannot do without one
    missing = ""

    def read(self, image_set: ImageSet, source: Source) -> ImageSet:
        """Return the set with the condition's values (N, ...) in `inputs`, and its `facts`."""
        return image_set

    def of_x_0(self, x_0: Tensor) -> Tensor | None:
        """Return the values (B, ...) that follow from images x_0 (B, C, H, W), if they do."""

    def absent(self, facts: Facts) -> float | None:
        """Return the value that stands for none; with None, the condition is never dropped."""

    def known(self, facts: Facts) -> Sequence[str]:
        """Return what a model knows of it, by which values mean the same; empty for nothing.

        The length is the field NAME_count of the ModelConfig.
        """
        return ["a number"] if facts.get(self.switch) else []

    def renewed(self, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict:
        """Return the weights of a model that knows other values, for a network with `own` weights.

        Those of the condition alone, NAME_embedding..., are replaced by the network's own.
        """
        prefix = f"{self.name}_embedding."
        kept = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        return kept | {name: value for name, value in own.items() if name.startswith(prefix)}

    def fault(self, values: np.ndarray, trained: np.ndarray, facts: Facts) -> str:
        """Return why a new run cannot learn values (N, ...) from the images `trained`, or ""."""
        return ""

    def tensor(self, value: Any, facts: Facts, indices: Sequence[int]) -> Tensor:
        """Return the tensor (B, ...) or (1, ...) of a value that is given for B images.

        Raises UserError for a value that the model does not know.
        """
        return torch.tensor([value])

    def in_grids(self, values: Tensor, facts: Facts) -> Tensor:
        """Return what the grids of a training show, given the values of held-out images."""
        return values


class Label(Condition):
    """The folder or the class of an image, as an index of the fact `label_names`."""

    name = "label"
    switch = "labels"

    def read(self, image_set: ImageSet, source: Source) -> ImageSet:
        """Return the set with the label of each image, from 0 on in the order of their names.

        Raises UserError for an image without one, and for fewer than two labels.
        """
        name = printable(image_set.name)
        found = [source.members[image_id].label for image_id in image_set.ids]
        labels = [label() if callable(label) else label for label in found]
        if None in labels:
            without = printable(image_set.names[labels.index(None)])
            raise UserError(
                f"{name} has no label for {without}: folders are labels, "
                "or the column label of a parquet file; FFHQ has none"
            )
        # Numbers are sorted as such.
        names = sorted({*labels}, key=lambda name: (int(name) if name.isdecimal() else inf, name))
        if len(names) < 2:
            raise UserError(f"{name} has one label, {printable(names[0])}; two are needed")
        indices = {label: index for index, label in enumerate(names)}
        label = np.array([indices[label] for label in labels])
        counts = sorted(np.bincount(label))
        summary = f"{len(names)} labels of {counts[0]:,} to {counts[-1]:,} images"
        folded = Counter(map(str.casefold, names))
        if alike := [label for label in names if folded[label.casefold()] > 1]:
            summary += f"; warning: labels differ in case alone: {printable(', '.join(alike))}"
        return replace(
            image_set,
            summary=f"{image_set.summary}; {summary}",
            inputs=image_set.inputs | {"label": label},
            facts=image_set.facts | {"label_names": names},
        )

    def absent(self, facts: Facts) -> int:
        # The last row of the network's table
        return len(self.known(facts))

    def known(self, facts: Facts) -> Sequence[str]:
        return [*facts.get("label_names", ())]

    def renewed(self, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict:
        """Return the weights, with which the network does for all what the old one did without."""
        result = super().renewed(weights, own)
        table, bias = "label_embedding.weight", "time_embedding.linear_2.bias"
        if table in weights:
            no_label = weights[table][-1]
            if table in own:
                result[table] = no_label.expand_as(own[table])
            else:
                # The embedding of a label is added to that of t.
                result[bias] = weights[bias] + no_label
        return result

    def fault(self, values: np.ndarray, trained: np.ndarray, facts: Facts) -> str:
        names = self.known(facts)
        if not {*values.tolist()} <= {*range(len(names))}:
            return "labels must be indices of the fact label_names"
        unseen = [name for index, name in enumerate(names) if index not in values[trained]]
        return unseen and (
            f"no training image has the label {printable(unseen[0])!r}, as all with it are held "
            "out; add images of it, or let folders train/ and val/ decide"
        )

    def tensor(self, value: Sequence[str], facts: Facts, indices: Sequence[int]) -> Tensor:
        names = self.known(facts)
        for name in value:
            if not name or name not in names:
                known = printable(", ".join(names))
                raise UserError(f"--label: the model knows {known}, and not {printable(name)!r}")
        return torch.tensor([names.index(value[i % len(value)]) for i in indices])

    def in_grids(self, values: Tensor, facts: Facts) -> Tensor:
        return torch.arange(self.absent(facts), device=values.device)


CONDITIONS: dict[str, Condition] = {row.name: row for row in (Label(),)}


def turned_on(diffusion: Facts) -> dict[str, Condition]:
    """Return the conditions that the fields of a DiffusionConfig turn on."""
    return {name: row for name, row in CONDITIONS.items() if diffusion.get(row.switch)}


def with_conditions(inputs: dict[str, Tensor], x_0: Tensor, diffusion: Facts) -> dict:
    """Return the inputs of images x_0 (B, C, H, W) with the conditions that follow from x_0."""
    for name, row in turned_on(diffusion).items():
        value = row.of_x_0(x_0)
        if value is not None:
            inputs = inputs | {name: value}
    return inputs


def without_conditions(inputs: dict[str, Tensor], dropped: Tensor, facts: Facts) -> dict:
    """Return the inputs of a batch, whose conditions are absent where `dropped` (B,) is true."""
    result = dict(inputs)
    for name in inputs.keys() & CONDITIONS.keys():
        absent = CONDITIONS[name].absent(facts)
        if absent is not None:
            places = dropped.view(-1, *[1] * (inputs[name].ndim - 1))
            result[name] = inputs[name].masked_fill(places, absent)
    return result


def in_grids(inputs: dict[str, Tensor], facts: Facts) -> dict[str, Tensor]:
    """Return what grids show, given the inputs of held-out images."""
    names = inputs.keys() & CONDITIONS.keys()
    return inputs | {name: CONDITIONS[name].in_grids(inputs[name], facts) for name in names}


def network_fields(facts: Facts) -> dict[str, int]:
    """Return the fields of a ModelConfig that follow from the conditions."""
    return {f"{name}_count": len(row.known(facts)) for name, row in CONDITIONS.items()}


def check_images(image_set: ImageSet, trained: np.ndarray) -> None:
    """Raise UserError for conditions that a new run cannot learn from images with these indices."""
    for name in image_set.inputs.keys() & CONDITIONS.keys():
        fault = CONDITIONS[name].fault(image_set.inputs[name], trained, image_set.facts)
        if fault:
            raise UserError(f"{printable(image_set.name)}: {fault}")


def chosen_inputs(given: Given, facts: Facts, indices: Sequence[int], cfg: float | None) -> dict:
    """Return what is given for images with these B indices: (B, ...) or (1, ...) each, by name.

    Raises UserError for what the model does not know, or cannot do without, and for `cfg` without
    any of them.
    """
    inputs = {}
    for name, row in CONDITIONS.items():
        value = getattr(given, name)
        known = row.known(facts)
        if value in (None, ()):
            if known and row.missing:
                raise UserError(row.missing)
        elif known:
            inputs[name] = row.tensor(value, facts, indices)
        else:
            raise UserError(f"--{name}: the model was trained without {row.switch}")
    if cfg is not None and not inputs:
        known = [f"--{row.name} {', '.join(row.known(facts))}" for row in turned_on(facts).values()]
        needed = printable(" or ".join(known)) or "the model was trained without"
        raise UserError(f"--cfg needs a condition: {needed}")
    return inputs
