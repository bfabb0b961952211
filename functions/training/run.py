"""A training: its network, all that its steps change, and how that is saved and loaded."""

import copy
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import Experiment
from data.datasets import ImageSet
from data.labels import check_labels
from functions.denoiser import Denoiser, inputs_of, no_inputs_of
from functions.noise_scheduler import build_scheduler
from functions.optimizers import OPTIMIZERS
from functions.saved.checkpoint import (
    Checkpoint,
    SavedModel,
    Tensors,
    copy_tensors,
    write_tensors,
)
from functions.saved.run_folder import path_of
from functions.support.device import (
    COMPILED_DEVICES,
    choose_precision,
    fast_layout,
    set_deterministic,
)
from functions.support.errors import printable, quoted
from functions.training.data import TrainingData
from functions.training.description import check_resumption, describe, provenance_of
from functions.training.metrics import Window
from functions.training.resuming import resume_command
from models.networks import NETWORKS
from models.unet import with_other_labels


class TrainingRun:
    """A training run, which saves and loads itself: a new one, or one that continues.

    Names are resolved by functions/training/opening.py alone: a run is given its images and its
    network, f(x_t, t, **inputs of the images), of any class.

    Raises ConfigError for images that do not fit the config or the checkpoint, for changes that a
    resumed run cannot make, and CheckpointError for a checkpoint that does not fit.

    Attributes:
        name, experiment, config: the experiment's name, the experiment, and its DiffusionConfig.
        folder: None for a new run until the Recorder makes it in `runs_folder`.
        data: its images, and what each step gets of them.
        denoiser, model: the model that is trained, and its network.
        ema_model: the network with the averaged weights; None without EMA.
        ema_ramp: whether the EMA forgets its first weights (functions/ema.py).
        window: the steps since the last row of metrics.csv.
        step, total_steps: the number of steps done, and of the whole run. With fewer steps, as
            total_steps = step, the run ends before the next one, finished.
        provenance: what its files say of it, which no step reads.
        earlier: the checkpoint from which it goes on; None for a run that is not resumed.
    """

    def __init__(
        self,
        name: str,
        experiment: Experiment,
        image_set: ImageSet,
        network: nn.Module,
        runs_folder: Path,
        device: torch.device,
        checkpoint: Checkpoint | None = None,
    ):
        self.name = name
        self.experiment = experiment
        self.config = config = experiment.diffusion
        self.runs_folder = runs_folder
        self.device = device
        data_class = TrainingData
        if "low" in inputs_of(network):
            from functions.super_resolution.pieces import DetailsData as data_class
        self.data = data_class(experiment, image_set, device, no_inputs_of(network))
        self.total_steps = self.data.total_steps
        self.earlier = checkpoint
        facts = checkpoint.contents["run"] if checkpoint else {}
        self.step = facts.get("step", 0)
        # A checkpoint is at RUN/checkpoints/FILE.
        self.folder = checkpoint.path.parents[1] if checkpoint else None
        if checkpoint:
            check_resumption(checkpoint, experiment, self.data)
        elif "label" in image_set.inputs:
            label, trained = image_set.inputs["label"], self.data.split.train_indices
            check_labels(image_set.name, label, image_set.label_names, trained)

        set_deterministic(config.deterministic)
        earlier = facts.get("arithmetic", {}).get("precision")
        precision = choose_precision(config.precision, device, earlier)
        self.model = network.to(device, memory_format=fast_layout(device))
        scheduler = build_scheduler(vars(config))
        self.denoiser = Denoiser(self.model, scheduler, config.objective, precision)
        self.ema_model = None
        if config.ema_decay > 0:
            # It shares the buffers, such as a batch norm's means, which no gradient changes.
            shared = {id(buffer): buffer for buffer in self.model.buffers()}
            self.ema_model = copy.deepcopy(self.model, shared).eval().requires_grad_(False)
        self.ema_ramp = True
        # An optimizer that multiplies matrices may do so in the network's precision.
        is_half = precision in (torch.float16, torch.bfloat16)
        with torch.autocast(device.type, precision if is_half else None, enabled=is_half):
            self.optimizer = OPTIMIZERS[config.optimizer](self.model, config.learning_rate)
        for group in self.optimizer.param_groups:
            # The rate of a group moves in proportion to its first one.
            group.setdefault("initial_lr", group["lr"])
        # Gradients of float16 underflow unless the loss is scaled; elsewhere the scaler does
        # nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        self.window = Window()
        self.provenance = provenance_of(
            self.data, self.denoiser, self.is_to_compile, facts.get("initial")
        )
        if checkpoint:
            self.load(checkpoint)

    @property
    def how_to_resume(self) -> str:
        """Return what one continues the run with, for messages."""
        if self.experiment.model.network not in NETWORKS:
            return f"a TrainingRun of {self.folder} (docs/python.md)"
        return resume_command(self.folder)

    @property
    def how_to_sample(self) -> str:
        """Return what one samples from the run with, for messages."""
        if self.experiment.model.network not in NETWORKS:
            return "load_denoiser (docs/python.md)"
        if "low" in inputs_of(self.model):
            return f"python edit.py enlarge FILE {quoted(self.folder)}"
        return f"python sample.py {quoted(self.folder)}"

    @property
    def is_finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    def epoch(self) -> float:
        """The number of epochs done, a fraction included."""
        return self.step / self.data.steps_per_epoch

    @property
    def is_to_compile(self) -> bool:
        """Return whether the network is compiled for training."""
        config = self.config
        return config.compile and self.device.type in COMPILED_DEVICES and not config.deterministic

    @property
    def sample_denoiser(self) -> Denoiser:
        """Return the model that draws samples, with the EMA weights if there are any."""
        return replace(self.denoiser, network=self.ema_model or self.model)

    def file(self, kind: str) -> Path:
        """Return the path of the file of a kind, such as "checkpoints", after the steps so far.

        Its folder is made, should it have been deleted.
        """
        path = path_of(self.folder, kind, self.step)
        path.parent.mkdir(exist_ok=True)
        return path

    def describe(self) -> str:
        """Describe the run in a few lines (data, split, network, ...), followed by warnings."""
        return describe(self.name, self.experiment, self.data, self.provenance, self.earlier)

    def begin_with(self, initial: SavedModel) -> None:
        """Take over a model's weights. Raises CheckpointError when they do not fit."""
        weights = initial.weights
        own = self.model.state_dict()
        if initial.label_names != self.data.image_set.label_names:
            weights = with_other_labels(weights, own)
        description = f"{initial.path}: {initial}"
        # An average that starts from trained weights must not forget them, so its decay does not
        # rise slowly.
        self.ema_ramp = False
        # Images that these weights were trained on may be held out now, which only the user knows.
        if images := initial.config["diffusion"].get("dataset_name"):
            rule = initial.provenance.get("split_rule", "unknown")
            description += f"; trained on {printable(images)} (held out then: {rule})"
        copy_tensors(weights, own, initial.path)
        if self.ema_model:
            self.ema_model.load_state_dict(self.model.state_dict())
        self.provenance["initial"] = description

    def parts(self) -> dict[str, Tensors]:
        """Return the run's own tensors that the steps change, by a checkpoint's parts and names."""
        parts = {"model": self.model.state_dict()}
        if self.ema_model:
            parts["ema"] = self.ema_model.state_dict()
        state = self.optimizer_state()
        parts["optimizer"] = {k: value for k, value in state.items() if torch.is_tensor(value)}
        return parts

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's tensors and numbers by KEY.PARAMETER, such as exp_avg.NAME."""
        return {
            f"{key}.{name}": value
            for name, p in self.model.named_parameters()
            for key, value in self.optimizer.state.get(p, {}).items()
        }

    def contents(self) -> dict:
        """Return the plain values of a checkpoint or a snapshot."""
        # Facts of one's own images may have any name.
        run = {**self.provenance, "experiment": self.name, "step": self.step}
        run |= {"total_steps": self.total_steps, "ema_ramp": self.ema_ramp}
        return {"config": self.experiment.to_dict(), "run": run}

    def save(self, path: Path) -> None:
        """Write a checkpoint. Raises OSError, such as for a full disk."""
        # Random numbers and the position in the data follow from the seed and the step.
        numbers = {
            key: value
            for key, value in self.optimizer_state().items()
            if not torch.is_tensor(value)
        }
        more = {"scaler": self.scaler.state_dict(), "window": asdict(self.window)}
        write_tensors(path, self.parts(), {**self.contents(), "optimizer": numbers, **more})

    def save_snapshot(self, path: Path) -> None:
        """Write the weights to sample from, in float16. Raises OSError, such as for a full disk.

        Buffers, and weights with a number that float16 does not have, stay as they are.
        """
        part = "ema" if self.ema_model else "model"
        weights = self.parts()[part]
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            halved = weights[name].half()
            if parameter.dtype == torch.float32 and halved.isfinite().all():
                weights[name] = halved
        write_tensors(path, {part: weights}, self.contents())

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's numbers. Raises CheckpointError when they do not fit."""
        parts = self.parts()
        del parts["optimizer"]
        for part, tensors in parts.items():
            copy_tensors(checkpoint.tensors(part), tensors, checkpoint.path)
        numbers = checkpoint.contents["optimizer"]
        self.load_optimizer(checkpoint.tensors("optimizer") | numbers)
        self.window = Window(**checkpoint.contents["window"])
        # The state is empty unless the precision was float16.
        scaler = checkpoint.contents.get("scaler")
        if scaler:
            self.scaler.load_state_dict(scaler)
        self.ema_ramp = checkpoint.contents["run"]["ema_ramp"]

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Invert `optimizer_state`, also before the optimizer's first step."""
        parameters = dict(self.model.named_parameters())
        own = self.optimizer.state_dict()
        moved = [p for group in self.optimizer.param_groups for p in group["params"]]
        indices = {p: i for i, p in enumerate(moved)}
        states = defaultdict(dict)
        for path, value in state.items():
            key, _, name = path.partition(".")
            p = parameters[name]
            if torch.is_tensor(value) and value.shape == p.shape:
                # A moment lies in memory as its parameter does.
                value = torch.empty_like(p, dtype=value.dtype).copy_(value)
            states[indices[p]][key] = value
        self.optimizer.load_state_dict({**own, "state": dict(states)})
