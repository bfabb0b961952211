"""What a network can get beside x_t and t: the conditions, a row of CONDITIONS each.

A row says how a condition is read from a data set or follows from x_0, what stands for none, what
is saved of it, and how it is chosen for a drawing. Training, validation, grids, sampling, edits,
evaluation and manifests go through the rows, and name none. How a condition enters the network
stands in models/unet.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.decode import BadImage
from data.packed import ImageSet
from data.sources import Source
from functions.support.errors import UserError, short
from functions.support.settings import setting

# What is known of a model: the fields of its DiffusionConfig, the `facts` of its ImageSet, which
# its provenance has, and `image_shape` (C, H, W).
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """What a drawing can ask of the conditions: a field has the name of its row."""

    # The labels to draw, of a model that was trained with labels. Image i gets the label i mod K of
    # these K.
    label: tuple[str, ...] = setting(())


class Condition:
    """A row of CONDITIONS. What a class does not define is as for a number that is always given."""

    # The name of the network's argument and of the field of `Given`. Weights of the condition alone
    # have names that begin with NAME_embedding.
    name: str
    # The field of DiffusionConfig with which a training turns the condition on.
    switch: str
    # The facts that say what its values mean. They are saved with a model.
    saved: tuple[str, ...] = ()
    # The error of a drawing that gives no value, if the model cannot do without one
    missing = ""

    def read(self, image_set: ImageSet, source: Source) -> ImageSet:
        """Return the set with the condition's values (N, ...) in `inputs`, and its `facts`."""
        return image_set

    def of_x_0(self, x_0: Tensor) -> Tensor | None:
        """Return the values (B, ...) that follow from images x_0 (B, C, H, W), if they do."""
        return None

    def absent(self, facts: Facts) -> float | None:
        """Return the value that stands for none; with None, the condition is never dropped."""
        return None

    def network(self, facts: Facts) -> dict[str, Any]:
        """Return the fields of a ModelConfig that follow from the condition."""
        return {}

    def fault(self, values: np.ndarray, trained: np.ndarray, facts: Facts) -> str:
        """Return why a new run cannot learn values (N, ...) from the images `trained`, or ""."""
        return ""

    def warnings(self, facts: Facts) -> Iterator[str]:
        """Yield a warning for what is allowed, but probably not meant."""
        return iter(())

    def known(self, facts: Facts) -> str:
        """Return in words what a model knows; "" if it was trained without the condition."""
        return "a number" if facts.get(self.switch) else ""

    def same(self, facts: Facts, others: Facts) -> bool:
        """Return whether the condition means the same to both models."""

        def meaning(of: Facts) -> tuple:
            return bool(self.known(of)), [[*of.get(name, ())] for name in self.saved]

        return meaning(facts) == meaning(others)

    def chosen(self, given: Given, facts: Facts, indices: Sequence[int]) -> Tensor | None:
        """Return the tensor (B, ...) or (1, ...) that is given for images with these B indices.

        None: nothing is given. Raises UserError for what the model does not know.
        """
        value = getattr(given, self.name)
        if value in (None, ()):
            return None
        if not self.known(facts):
            raise UserError(f"--{self.name}: the model was trained without {self.switch}")
        return self.tensor(value, facts, indices)

    def tensor(self, value: Any, facts: Facts, indices: Sequence[int]) -> Tensor:
        """Return the tensor of a value that is given, as `chosen` does."""
        return torch.tensor([value])

    def in_grids(self, values: Tensor, facts: Facts) -> Tensor:
        """Return what the grids of a training show, given the values of held-out images."""
        return values


class Label(Condition):
    """The folder or the class of an image, as an index of the fact `label_names`."""

    name = "label"
    switch = "labels"
    saved = ("label_names",)

    def read(self, image_set: ImageSet, source: Source) -> ImageSet:
        """Return the set with the label of each image, from 0 on in the order of their names.

        Raises UserError for an image without one, and for fewer than two labels.
        """
        members = [source.members[image_id] for image_id in image_set.ids]
        try:
            labels = [each.label() if callable(each.label) else each.label for each in members]
        except BadImage as error:
            raise UserError(f"{short(image_set.name)}: the labels {error}") from error
        if None in labels:
            member = members[labels.index(None)]
            raise UserError(
                f"{short(image_set.name)} has no label for {short(member.name)}: folders are "
                "labels, or the column label of a parquet file; FFHQ has none"
            )
        # Numbers are sorted as such.
        names = sorted({*labels}, key=lambda name: (int(name) if name.isdecimal() else inf, name))
        if len(names) < 2:
            name = short(names[0])
            raise UserError(f"{short(image_set.name)} has one label, {name}; two are needed")
        indices = {name: index for index, name in enumerate(names)}
        label = np.array([indices[name] for name in labels])
        counts = np.bincount(label)
        summary = f"{image_set.summary}; {len(names)} labels of {counts.min():,} to "
        return replace(
            image_set,
            summary=f"{summary}{counts.max():,} images",
            inputs=image_set.inputs | {"label": label},
            facts=image_set.facts | {"label_names": names},
        )

    def absent(self, facts: Facts) -> int:
        # The last row of the network's table
        return len(facts["label_names"])

    def network(self, facts: Facts) -> dict[str, int]:
        return {"label_count": len(facts.get("label_names", ()))}

    def fault(self, values: np.ndarray, trained: np.ndarray, facts: Facts) -> str:
        names = facts.get("label_names", ())
        if not {*values.tolist()} <= {*range(len(names))}:
            return "labels must be indices of the fact label_names"
        unseen = [name for index, name in enumerate(names) if index not in values[trained]]
        return unseen and (
            f"no training image has the label {short(unseen[0])!r}, as all with it are held out; "
            "add images of it, or let folders train/ and val/ decide"
        )

    def warnings(self, facts: Facts) -> Iterator[str]:
        names = sorted(facts.get("label_names", ()), key=str.casefold)
        for name, following in pairwise(names):
            if name.casefold() == following.casefold():
                yield f"labels differ in case alone: {short(name)!r}, {short(following)!r}"

    def known(self, facts: Facts) -> str:
        return ", ".join(repr(short(name)) for name in facts.get("label_names", ()))

    def tensor(self, value: Sequence[str], facts: Facts, indices: Sequence[int]) -> Tensor:
        names = [*facts["label_names"]]
        for name in value:
            if not name or name not in names:
                raise UserError(
                    f"--label: {short(name)!r} is no label of the model, which has "
                    f"{self.known(facts)}"
                )
        return torch.tensor([names.index(value[i % len(value)]) for i in indices])

    def in_grids(self, values: Tensor, facts: Facts) -> Tensor:
        return torch.arange(len(facts["label_names"]), device=values.device)


CONDITIONS: dict[str, Condition] = {row.name: row for row in (Label(),)}


def turned_on(diffusion: Mapping[str, Any]) -> dict[str, Condition]:
    """Return the conditions that the fields of a DiffusionConfig turn on."""
    return {name: row for name, row in CONDITIONS.items() if diffusion.get(row.switch)}


def with_conditions(inputs: dict[str, Tensor], x_0: Tensor, diffusion: Mapping) -> dict:
    """Return the inputs of images x_0 (B, C, H, W) with the conditions that follow from x_0."""
    values = {name: row.of_x_0(x_0) for name, row in turned_on(diffusion).items()}
    return inputs | {name: value for name, value in values.items() if value is not None}


def without_conditions(inputs: dict[str, Tensor], dropped: Tensor, facts: Facts) -> dict:
    """Return the inputs of a batch, whose conditions are absent where `dropped` (B,) is true."""
    result = dict(inputs)
    for name in inputs.keys() & CONDITIONS.keys():
        absent = CONDITIONS[name].absent(facts)
        if absent is not None:
            places = dropped.view(-1, *[1] * (inputs[name].ndim - 1))
            result[name] = inputs[name].masked_fill(places, absent)
    return result


def network_fields(facts: Facts) -> dict[str, Any]:
    """Return the fields of a ModelConfig that follow from the conditions."""
    return {key: value for row in CONDITIONS.values() for key, value in row.network(facts).items()}


def check_images(image_set: ImageSet, trained: np.ndarray) -> None:
    """Raise UserError for conditions that a new run cannot learn from images with these indices."""
    for name in image_set.inputs.keys() & CONDITIONS.keys():
        fault = CONDITIONS[name].fault(image_set.inputs[name], trained, image_set.facts)
        if fault:
            raise UserError(f"{short(image_set.name)}: {fault}")


def in_grids(inputs: dict[str, Tensor], facts: Facts) -> dict[str, Tensor]:
    """Return what grids show, given the inputs of held-out images."""
    rows = {name: CONDITIONS.get(name, Condition()) for name in inputs}
    return {name: rows[name].in_grids(values, facts) for name, values in inputs.items()}


def chosen_inputs(given: Given, facts: Facts, indices: Sequence[int]) -> dict[str, Tensor]:
    """Return what is given for images with these B indices: (B, ...) or (1, ...) each, by name.

    Raises UserError for what the model does not know, or cannot do without.
    """
    inputs = {}
    for name, row in CONDITIONS.items():
        value = row.chosen(given, facts, indices)
        if value is not None:
            inputs[name] = value
        elif row.missing and row.known(facts):
            raise UserError(row.missing)
    return inputs


def check_given(given: Given, facts: Facts, cfg: float | None) -> None:
    """Raise UserError for what the model does not know, and for `cfg` without a condition."""
    chosen = [row.chosen(given, facts, [0]) for row in CONDITIONS.values()]
    if cfg is not None and chosen.count(None) == len(chosen):
        known = {name: row.known(facts) for name, row in CONDITIONS.items()}
        flags = " or ".join(f"a --{name}: {text}" for name, text in known.items() if text)
        raise UserError(
            f"--cfg needs {flags}" if flags else "--cfg: the model was trained without conditions"
        )
