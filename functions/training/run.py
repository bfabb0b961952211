"""What a training is: its data, its network, and all that its steps change."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from config import ConfigError, DiffusionConfig, Experiment, build_scheduler
from data.augmentation import augment
from data.batches import ImageFeeder, indices_of_steps
from data.conditions import (
    CONDITIONS,
    check_images,
    turned_on,
    with_conditions,
    without_conditions,
)
from data.datasets import ImageSet, split_images
from functions.denoiser import Denoiser
from functions.optimizers import LR_SCHEDULES, OPTIMIZERS
from functions.saved.checkpoint import (
    Checkpoint,
    SavedModel,
    Tensors,
    copy_tensors,
    write_tensors,
)
from functions.saved.run_folder import resume_command
from functions.support import processes
from functions.support.device import (
    COMPILED_DEVICES,
    arithmetic,
    choose_precision,
    fast_layout,
    set_deterministic,
)
from functions.support.errors import printable, quoted
from functions.support.settings import fields_with
from functions.training.draws import StepDraws, training_draws
from functions.training.metrics import TrainingWindow
from models.growing import grown_weights

# With a terminal SNR above this, x_T still shows the image. In the paper's 1000 steps it is 4e-5.
VISIBLE_SNR = 1e-3


class TrainingRun:
    """A training run, which saves and loads itself: a new one, or one that continues.

    Names are resolved by functions/training/opening.py alone: a run is given its images and its
    network, f(x_t, t, **inputs of the images), of any class.

    Raises ConfigError for images that do not fit the config or the checkpoint, for changes that a
    resumed run cannot make, and CheckpointError for a checkpoint that does not fit.

    Attributes:
        name, experiment, config: the experiment's name, the experiment, and its DiffusionConfig.
        folder: None for a new run until the Recorder makes it in `runs_folder`.
        denoiser, model: the model that is trained, and its network.
        ema_model: the network with the averaged weights; None without EMA.
        window: the steps since the last row of metrics.csv.
        step, total_steps: the number of steps done, and of the whole run. With fewer steps, as
            total_steps = step, the run ends before the next one, finished.
        share: this process's places in the effective batch.
        provenance: plain values for config.json and checkpoints: hashes of the images, ...
        earlier_provenance: that in the checkpoint; {} for a run that is not resumed.
    """

    # Whether train.py finds images and network by their names: not those of your own, from Python.
    is_named = False

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
        self.image_set = image_set
        self.runs_folder = runs_folder
        self.device = device
        self.earlier_provenance = checkpoint.contents["run"] if checkpoint else {}
        self.earlier = Experiment.from_dict(checkpoint.contents["config"]) if checkpoint else None
        self.step = self.earlier_provenance.get("step", 0)
        # A checkpoint is at RUN/checkpoints/FILE.
        self.folder = checkpoint.path.parents[1] if checkpoint else None

        # Data. Each process has its share of every effective batch.
        shape = tuple(image_set.images.shape[1:])
        channels, size, _ = experiment.model.image_shape
        if shape != (size, size, channels):
            raise ConfigError(
                f"the images of {printable(image_set.name)} are {shape} (height, width, channels), "
                f"and the network's {(size, size, channels)}"
            )
        self.split = split_images(self.image_set, config.split)
        self.steps_per_epoch = len(self.split.train_indices) // config.effective_batch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.share = processes.shard(config.effective_batch)
        if self.total_steps == 0:
            raise ConfigError(
                f"{config.dataset_name} has {len(self.split.train_indices)} training images, fewer "
                f"than one step's {config.effective_batch} (batch_size x gradient_accumulation); "
                "lower one of the two"
            )
        if config.effective_batch < processes.count():
            raise ConfigError(
                f"{processes.count()} processes cannot share an effective batch of "
                f"{config.effective_batch}"
            )
        if checkpoint:
            self.check_resumption()
        else:
            check_images(image_set, self.split.train_indices)
        self.feeder = ImageFeeder(image_set.images, device, image_set.inputs)
        self.window = TrainingWindow(device, config.effective_batch)

        # The network, and all that the steps change
        set_deterministic(config.deterministic)
        earlier = self.earlier_provenance.get("arithmetic", {}).get("precision")
        precision = choose_precision(config.precision, device, earlier)
        self.model = network.to(device, memory_format=fast_layout(device))
        scheduler = build_scheduler(vars(config))
        self.denoiser = Denoiser(self.model, scheduler, config.objective, precision)
        self.ema_model = None
        if config.ema_decay > 0:
            self.ema_model = copy.deepcopy(self.model).eval().requires_grad_(False)
        optimizer = OPTIMIZERS[config.optimizer]
        self.optimizer = optimizer(self.model, config.learning_rate, precision)
        # A group of parameters may have a rate of its own, which follows the same schedule.
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        # Gradients of float16 underflow unless the loss is scaled; elsewhere the scaler does
        # nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        if checkpoint:
            self.load(checkpoint)

        self.provenance = {
            "split_rule": self.split.rule,
            **self.split.hashes,
            **{name: [*values] for name, values in image_set.facts.items()},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            # This describes the model whose weights the run started from. None: random weights.
            "initial": self.earlier_provenance.get("initial"),
            # Whether these weights were those of a smaller network (models/growing.py).
            "grown": self.earlier_provenance.get("grown", False),
            # The bits of the results depend on these values.
            "arithmetic": {
                **arithmetic(device, precision),
                "processes": processes.count(),
                "batch_size": config.batch_size,
                # Compiled dropout draws other random numbers.
                "compiled": self.is_to_compile,
            },
        }

    @property
    def facts(self) -> dict:
        """Return what is known of the model, as the rows of CONDITIONS need it."""
        return vars(self.config) | vars(self.experiment.model) | self.image_set.facts

    @property
    def how_to_resume(self) -> str:
        """Return what one continues the run with, for messages."""
        if self.is_named:
            return resume_command(self.folder)
        return f"a TrainingRun of {self.folder} (docs/sampling.md)"

    @property
    def is_to_compile(self) -> bool:
        """Return whether the network is compiled for training."""
        config = self.config
        return config.compile and self.device.type in COMPILED_DEVICES and not config.deterministic

    @property
    def sample_denoiser(self) -> Denoiser:
        """Return the model that draws samples, with the EMA weights if there are any."""
        return replace(self.denoiser, network=self.ema_model or self.model)

    def check_resumption(self) -> None:
        """Raise ConfigError if images, labels or fields are not the run's, or no step is left."""
        for what in self.split.differences(self.earlier_provenance):
            rules = self.earlier_provenance.get("split_rule", ""), self.split.rule
            reason = " (held out then: {}; now: {})".format(*rules) if len({*rules}) > 1 else ""
            if "FFHQ" in rules[0] and self.config.dataset_name != "FFHQ":
                reason += "; FFHQ is split so only as --diffusion.dataset-name FFHQ"
            raise ConfigError(
                f"{self.folder} was {what} than {self.config.dataset_name} has{reason}; it "
                "cannot continue with these"
            )
        self.earlier.check_resumption(self.experiment)
        if self.step >= self.total_steps:
            raise ConfigError(
                f"the run is finished with {self.config.epochs} epochs of {self.steps_per_epoch:,} "
                f"steps, as {self.step:,} steps are done; to train it longer: "
                f"--resume {quoted(self.folder)} "
                f"--diffusion.epochs {self.step // self.steps_per_epoch + 1}"
            )

    def begin_with(self, initial: SavedModel) -> None:
        """Take over a model's weights, which grow if it is one of smaller images.

        Raises CheckpointError when they do not fit.
        """
        weights = initial.weights
        own = self.model.state_dict()
        # The weights of a condition stay if it means the same, as with labels of the same names.
        for row in CONDITIONS.values():
            if row.known(initial.facts) != row.known(self.facts):
                weights = row.renewed(weights, own)
        description = f"{initial.path}: {initial}"
        own_size = initial.model.image_size
        if own_size < self.experiment.model.image_size:
            weights = grown_weights(weights, self.model)
            description += f", grown from {own_size} px"
            self.provenance["grown"] = True
        # Images that these weights were trained on may be held out now, which only the user knows.
        if images := initial.config["diffusion"].get("dataset_name"):
            rule = initial.provenance.get("split_rule", "unknown")
            description += f"; trained on {printable(images)} (held out then: {rule})"
        copy_tensors(weights, own, initial.path)
        if self.ema_model:
            self.ema_model.load_state_dict(self.model.state_dict())
        self.provenance["initial"] = description

    def batches(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield this process's images of each step that is left, and their inputs.

        Images are uint8 (B, S, S, C), and the inputs of the network (B, ...) by name.
        """
        indices = indices_of_steps(
            self.split.train_indices,
            self.config.seed,
            self.config.effective_batch,
            self.share,
            range(self.step, self.total_steps),
        )
        return self.feeder.feed(indices)

    def draw(self, step: int) -> StepDraws:
        """Draw t, the noise and the augmentation of this process's images of a step."""
        draws = training_draws(
            self.config.seed,
            step,
            self.config.effective_batch,
            self.experiment.model.image_shape,
            self.config.timesteps_diff,
            self.device,
        )
        return StepDraws(*(draw[self.share.start : self.share.stop] for draw in draws))

    def augment(
        self, x_0: Tensor, inputs: dict[str, Tensor], draws: StepDraws, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flip and rotate x_0 (B, C, H, W), if the config says so, and drop some conditions."""
        config = self.config
        if config.use_augmentation:
            angle = None
            # Rotation is off at the end of a run, so that the network unlearns its tilt.
            if config.max_rotation and step / self.total_steps < 1 - config.rotation_free_end:
                angle = config.max_rotation * draws.rotation
            x_0 = augment(x_0, draws.flip, angle)
        inputs = with_conditions(inputs, x_0, vars(config))
        dropped = draws.condition_drop < config.condition_dropout
        return x_0, without_conditions(inputs, dropped, self.facts)

    def parts(self) -> dict[str, Tensors]:
        """Return the run's own tensors that the steps change, by a checkpoint's parts and names."""
        parts = {"model": self.model.state_dict()}
        if self.ema_model:
            parts["ema"] = self.ema_model.state_dict()
        parts["optimizer"] = {
            f"{moment}.{name}": tensor
            for name, p in self.model.named_parameters()
            for moment, tensor in self.optimizer.state[p].items()
        }
        parts["window"] = {"sums": self.window.sums, "skipped": self.window.skipped}
        return parts

    def contents(self) -> dict:
        """Return the plain values of a checkpoint or a snapshot."""
        run = {"experiment": self.name, "step": self.step, "total_steps": self.total_steps}
        run |= self.provenance
        return {"config": self.experiment.to_dict(), "run": run}

    def save(self, path: Path) -> None:
        """Write a checkpoint. Raises OSError, such as for a full disk."""
        # Random numbers and the position in the data follow from the seed and the step.
        write_tensors(path, self.parts(), {**self.contents(), "scaler": self.scaler.state_dict()})

    def save_snapshot(self, path: Path) -> None:
        """Write the weights to sample from, in float16. Raises OSError, such as for a full disk."""
        part = "ema" if self.ema_model else "model"
        weights = {name: tensor.half() for name, tensor in self.parts()[part].items()}
        write_tensors(path, {part: weights}, self.contents())

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's numbers. Raises CheckpointError when they do not fit."""
        for part, tensors in self.parts().items():
            saved = checkpoint.tensors(part)
            what = "moments" if part == "optimizer" else "weights"
            copy_tensors(saved, tensors, checkpoint.path, what)
        # The state is empty unless the precision was float16.
        scaler = checkpoint.contents.get("scaler")
        if scaler:
            self.scaler.load_state_dict(scaler)

    def describe(self) -> str:
        """Describe the run in a few lines (data, split, network, ...), followed by warnings."""
        config = self.config
        facts = self.provenance
        done = f"; {self.step:,} steps are done" if self.step else ""
        shift = config.log_snr_shift
        shifted = f", log-SNR shifted by {shift:g}" if shift else ""
        betas = "its own" if config.betas else config.beta_schedule
        compiled = ", compiled in the first step, for minutes" if self.is_to_compile else ""
        lines = [
            self.name,
            f"  data       {self.image_set.summary}",
            f"  split      {self.split.description}",
            f"  network    {facts['parameters']:,} parameters, {facts['arithmetic']['precision']}, "
            f"{self.device}{compiled}",
            f"  length     {self.total_steps:,} steps of {config.effective_batch} images: "
            f"{config.epochs} epochs of {self.steps_per_epoch:,} steps{done}",
            f"  objective  {config.objective} over {config.timesteps_diff} timesteps with "
            f"{betas} betas{shifted}, terminal SNR "
            f"{self.denoiser.scheduler.terminal_snr:.2g}",
        ]
        if facts["initial"]:
            lines.append(f"  begins as  {facts['initial']}")
        if self.earlier:
            changes = self.earlier.differences(self.experiment)
            for field, (earlier, now) in changes.items():
                lines.append(f"changed: {field} was {earlier}, is now {now}")
            departing = {f"diffusion.{name}" for name in fields_with(DiffusionConfig, "departs")}
            if not departing.isdisjoint(changes):
                lines.append("so from here on the run is another than without these changes")
        for warning in self.warnings():
            lines.append(f"warning: {warning}")
        return "\n".join(lines)

    def warnings(self) -> Iterator[str]:
        """Yield a warning for each setting that is allowed but probably not meant."""
        config = self.config
        steps = self.total_steps
        yield from self.experiment.warnings()
        snr = self.denoiser.scheduler.terminal_snr
        # Betas of one's own are those of the weights.
        if snr > VISIBLE_SNR and not config.betas:
            yield (
                f"terminal SNR {snr:.2g} (sqrt(alpha_bar_T) = {math.sqrt(snr / (1 + snr)):.3f}): "
                "x_T still carries the image, but sampling starts from pure noise; set "
                f"rescale_betas = True and beta_end = {DiffusionConfig.beta_end}"
            )
        if config.warmup_steps >= steps:
            yield (
                f"warmup_steps = {config.warmup_steps:,} and the run has {steps:,} steps: its "
                "learning rate never reaches learning_rate"
            )
        changed = config.condition_dropout != DiffusionConfig.condition_dropout
        if changed and not turned_on(vars(config)) and not self.image_set.inputs:
            yield "condition_dropout has no effect without a condition, such as labels = True"
        if self.step:
            # More epochs move a step back on its schedule.
            earlier_steps = self.earlier_provenance["total_steps"]
            last_rate = learning_rate(self.earlier.diffusion, self.step - 1, earlier_steps)
            rate = learning_rate(config, self.step, steps)
            if rate > 2 * last_rate:
                yield (
                    f"the learning rate was {last_rate:.3g} in the last step, of a run of "
                    f"{earlier_steps:,}, and is {rate:.3g} in the next, of a run of {steps:,}"
                )
        # A resumed run equals an uninterrupted one bit for bit only in the same arithmetic.
        for name, earlier in self.earlier_provenance.get("arithmetic", {}).items():
            now = self.provenance["arithmetic"].get(name)
            if earlier != now:
                yield (
                    f"{name} was {earlier}, is now {now}: no longer bit for bit like an "
                    "uninterrupted run"
                )


def learning_rate(config: DiffusionConfig, step: int, total_steps: int) -> float:
    """Return a step's learning rate: a linear warm-up, times the configured schedule."""
    rate = config.learning_rate * min(1.0, (step + 1) / (config.warmup_steps + 1))
    return rate * LR_SCHEDULES[config.lr_schedule](step, total_steps)
