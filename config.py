"""What a run is made of: experiments by name, and two dataclasses with a comment for each field.

Edit `experiments` or add to it, or override any field for one run:
`python train.py faces --diffusion.epochs 10`.
A config that could not work is refused when it is made, with a sentence that says what would fit.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import get_args, get_type_hints

from functions.prediction import OBJECTIVES
from functions.samplers import SAMPLERS


def experiments() -> dict[str, "Experiment"]:
    """Return EXPERIMENTS, by name. One that is close to another says where it differs."""
    # Minutes on a laptop's CPU: the people of the embedded emoji set at 32 x 32.
    faces = Experiment(
        DiffusionConfig(
            dataset_name="emoji_people",
            learning_rate=2e-3,
            batch_size=16,
            use_augmentation=True,
            timesteps_diff=1000,
            epochs=70,
            gradient_accumulation=1,
            clip_grad_norm=1.0,
            warmup_steps=200,
            lr_schedule="cosine",
            ema_decay=0.998,
            recompute="none",
            log_every=25,
            validate_every=250,
            sample_every=500,
            checkpoint_every=500,
            validation_samples=360,
        ),
        ModelConfig(
            lowest_resolution_size=4,
            dim_multiply=(1, 2, 4, 4),
            transformer_layers=(2,),
            base_dim=32,
            image_size=32,
            norm_groups=8,
        ),
    )

    # The same with v and cosine betas, at a lower rate: docs/whole-before-detail.md says why, and
    # what is better.
    faces_v = faces.override(
        {"objective": "v", "beta_schedule": "cosine", "learning_rate": 1e-3},
        {},
    )

    # The reference's first run (see README), faults included: 200 steps of betas that are meant
    # for 1000, and no EMA. Every value is written out, and so are the changes of the runs after it.
    ffhq_run1 = Experiment(
        DiffusionConfig(
            dataset_name="FFHQ",
            learning_rate=3e-5,
            batch_size=20,
            use_augmentation=False,
            timesteps_diff=200,
            split="reference",
            beta_start=1e-4,
            beta_end=0.02,
            rescale_betas=False,
            epochs=45,
            gradient_accumulation=4,
            clip_grad_norm=0.0,
            warmup_steps=0,
            lr_schedule="constant",
            ema_decay=0.0,
            precision="auto",
            seed=0,
            grid_images=20,
        ),
        ModelConfig(
            lowest_resolution_size=8,
            dim_multiply=(1, 2, 2, 4, 8),
            transformer_layers=(3,),
            base_dim=64,
            image_size=128,
            channels=3,
            dropout=0.0,
            norm_groups=32,
        ),
    )

    # Its second run: 1000 steps, for which the betas are meant, and EMA.
    ffhq_run2 = ffhq_run1.override(
        {"timesteps_diff": 1000, "rescale_betas": True, "ema_decay": 0.9999},
        {},
    )

    # Its full run: twice the width, augmentation, 500 epochs. Go on after them with --resume and
    # more --diffusion.epochs.
    ffhq_full = ffhq_run2.override(
        {
            "use_augmentation": True,
            "max_rotation": 3.0,
            "rotation_free_end": 0.1,
            "epochs": 500,
            "clip_grad_norm": 1.0,
            "warmup_steps": 5000,
            # All GPUs wait while 3.9 GB are saved, some 5 s at the 1.25 s a GB that a CPU took. On
            # 8 H100, 8000 steps take some 210 s by the estimate in benchmarks/NOTES.md. So saving
            # takes some 2% of the time. Where steps are slow, checkpoint_minutes saves before.
            "checkpoint_every": 8000,
        },
        {"base_dim": 128},
    )

    # The full run with v and mixed t.
    ffhq_v = ffhq_full.override({"objective": "v", "t_sampling": "mixed"}, {})

    # The paper's CIFAR-10: 390 steps an epoch, 800,280 in all. Betas, objective and the like are
    # the defaults. Its FID of 3.17 was measured on what is here sample.py --variance large.
    cifar10 = Experiment(
        DiffusionConfig(
            dataset_name="CIFAR10",
            learning_rate=2e-4,
            batch_size=128,
            use_augmentation=True,
            timesteps_diff=1000,
            epochs=2052,
            gradient_accumulation=1,
            clip_grad_norm=1.0,
            warmup_steps=5000,
            ema_decay=0.9999,
            grid_images=64,
        ),
        ModelConfig(
            lowest_resolution_size=4,
            dim_multiply=(1, 2, 2, 2),
            transformer_layers=(1,),
            base_dim=128,
            image_size=32,
            dropout=0.1,
        ),
    )

    return {
        "faces": faces,
        "faces-v": faces_v,
        "ffhq-run1": ffhq_run1,
        "ffhq-run2": ffhq_run2,
        "ffhq-full": ffhq_full,
        "ffhq-v": ffhq_v,
        "cifar10": cifar10,
    }


class ConfigError(ValueError):
    """A field's value does not fit; the message names the field, the value and what would."""


# These may change when a run is resumed, as they do not touch the weights.
BOOK_KEEPING = (
    "log_every",
    "validate_every",
    "sample_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_every",
    "max_skipped_steps",
    "validation_samples",
    "bits_per_dim_every",
    "bits_per_dim_images",
    "grid_images",
    "grid_sampler",
    "grid_steps",
)
# How the values of each type are called.
FITTING = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a text",
    tuple[int, ...]: "a list of integers, such as [1, 2, 4]",
    tuple[float, ...]: "a list of finite numbers, such as [0.05, 0.1]",
}
# These integers may be 0; all others are at least 1.
MAY_BE_ZERO = (
    "warmup_steps",
    "max_bad_images",
    "seed",
    "keep_every",
    "bits_per_dim_every",
    "transformer_layers",
)
# These limits are far above any use. Beyond them, tables and layers would take all memory.
# All other integers may have 64 bits.
LARGEST = {"timesteps_diff": 10**6, "image_size": 2**14, "base_dim": 2**14, "dim_multiply": 1024}
# These texts are chosen from a list.
CHOICES = {
    "split": ("reference", "official"),
    "beta_schedule": ("linear", "cosine"),
    "objective": OBJECTIVES,
    "t_sampling": ("uniform", "mixed"),
    "lr_schedule": ("constant", "cosine"),
    "recompute": ("none", "norms", "blocks"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("auto", "off"),
    "grid_sampler": SAMPLERS,
    "dialect": ("ho", "diffusers"),
}


@dataclass(frozen=True)
class DiffusionConfig:
    """The data, the diffusion process and the training. One *step* is one optimiser step."""

    # The data set: "emoji_faces" or "emoji_people" (embedded), "FFHQ", "CIFAR10", or the path of a
    # folder, zip or npz.
    dataset_name: str
    # Adam's learning rate, reached after the warm-up.
    learning_rate: float
    # Images in one forward pass. Lower it, and raise gradient_accumulation, when memory is short.
    batch_size: int
    # Flip training images at random, and rotate them if max_rotation > 0.
    use_augmentation: bool
    # T, the number of noising steps.
    timesteps_diff: int = field(metadata={"flag": "timesteps"})

    # Data

    # How to split the full FFHQ: "reference" (63,000 train, 7,000 validate) or "official" (60,000
    # and 10,000).
    split: str = "reference"
    # Largest rotation in degrees, to either side; angles are uniform up to it.
    max_rotation: float = 0.0
    # The last share of the steps, in which rotation is off so that its tilt is unlearned.
    rotation_free_end: float = 0.1
    # Unreadable images that are left out (and listed) before it counts as an error.
    max_bad_images: int = 0

    # Noise schedule

    # Beta of the first step, for T = 1000.
    beta_start: float = 1e-4
    # Beta of the last step, for T = 1000.
    beta_end: float = 0.02
    # Multiply betas by 1000 / T, so that x_T is noise for any T.
    rescale_betas: bool = True
    # "linear" or "cosine" (Nichol and Dhariwal 2021). Cosine betas have no use for the three above.
    beta_schedule: str = "linear"

    # Objective

    # What the network predicts and is compared with: the noise "eps", or "v", a mix with x_0.
    objective: str = "eps"
    # How t is drawn in training: "uniform", or "mixed": every second t log-normal in the noise
    # level, as in EDM.
    t_sampling: str = "uniform"

    # Optimisation

    # Length of the run, in passes over the training images.
    epochs: int = 45
    # Forward passes in a step. The effective batch is batch_size times this.
    gradient_accumulation: int = 4
    # Largest gradient norm. 0: no clipping.
    clip_grad_norm: float = 0.0
    # Steps over which the learning rate rises from 0.
    warmup_steps: int = 0
    # "constant", or "cosine": the learning rate falls to 0 in a half cosine over the whole run.
    lr_schedule: str = "constant"
    # Decay of the weights' moving average, per step. 0: no average, samples use the raw weights.
    ema_decay: float = 0.9999
    # Precision of the network: "float32", "bfloat16", "float16", or "auto", the fastest that the
    # hardware has.
    precision: str = "auto"
    # What backward computes again to save memory: "none"; "norms", nearly free at 128 px; "blocks",
    # for least memory. A compiled network computes nothing again.
    recompute: str = "norms"
    # On CUDA, compile the network where that pays off in this run ("auto"), or never ("off").
    compile: str = "auto"
    # Seed of everything that is drawn.
    seed: int = 0
    # On CUDA, take only kernels that repeat bit for bit, which are slower. Those of the CPU do.
    deterministic: bool = False

    # Book-keeping, in steps; none of it changes the weights

    # Steps between rows of metrics.csv.
    log_every: int = 50
    # Steps between validations of the raw and the EMA weights; losses.png is drawn after each.
    validate_every: int = 800
    # Steps between sample grids.
    sample_every: int = 4000
    # Steps between checkpoints, to resume and sample from.
    checkpoint_every: int = 800
    # Save a checkpoint also when the last one is so many minutes old. 0: never.
    checkpoint_minutes: float = 30.0
    # How many of the newest checkpoints are kept.
    keep_checkpoints: int = 3
    # Keep the checkpoints of every so many steps for good. 0: none.
    keep_every: int = 0
    # Stop after so many steps in a row whose loss or gradients were not finite numbers.
    max_skipped_steps: int = 20
    # Held-out (image, t, noise) triples in a validation, the same each time.
    validation_samples: int = 1000
    # Epochs between measurements of the variational bound (see evaluate.py). 0: none.
    bits_per_dim_every: int = 0
    # Held-out images for it. Each takes 36 network calls with 1000 timesteps.
    bits_per_dim_images: int = 64
    # Images in a sample grid while training.
    grid_images: int = 16
    # The sampler of that grid, with its defaults: a name that sample.py --sampler takes.
    grid_sampler: str = "dpm++"
    # Its network calls, at most T.
    grid_steps: int = 20

    def __post_init__(self) -> None:
        check_types(self)
        check = partial(require, self)
        check(
            "dataset_name",
            bool(self.dataset_name),
            "a data set's name or the path to a folder or zip",
        )
        check("learning_rate", 0 < self.learning_rate <= 1, "above 0 and at most 1, such as 3e-5")
        check("timesteps_diff", self.timesteps_diff >= 2, "at least 2; the paper has 1000")
        check("max_rotation", 0 <= self.max_rotation <= 10, "between 0 and 10 degrees")
        check("rotation_free_end", 0 <= self.rotation_free_end <= 1, "between 0 and 1")
        check("clip_grad_norm", 0 <= self.clip_grad_norm < math.inf, "0 (off) or more, such as 1.0")
        check("checkpoint_minutes", 0 <= self.checkpoint_minutes < math.inf, "0 (off) or more")
        check(
            "ema_decay", 0 <= self.ema_decay < 1, "at least 0 (no EMA) and below 1, such as 0.9999"
        )

        rising = self.beta_start <= self.beta_end
        check("beta_start", 0 < self.beta_start < 1, "between 0 and 1, such as 1e-4")
        check("beta_end", rising, f"at least beta_start = {self.beta_start:g}")
        if self.beta_schedule == "cosine":
            # Cosine betas have no use for these three. Whoever sets one means linear betas.
            unset = (self.beta_start, self.beta_end, self.rescale_betas) == (1e-4, 0.02, True)
            fitting = '"linear" when beta_start, beta_end or rescale_betas are changed'
            check("beta_schedule", unset, fitting)
        else:
            scale = 1000 / self.timesteps_diff if self.rescale_betas else 1
            fitting = (
                f"below {1 / scale:g} with timesteps_diff = {self.timesteps_diff}, "
                "so that every beta stays below 1"
            )
            check("beta_end", scale * self.beta_end < 1, fitting)

    @property
    def effective_batch(self) -> int:
        """Images that one optimiser step sees."""
        return self.batch_size * self.gradient_accumulation


@dataclass(frozen=True)
class ModelConfig:
    """The U-Net; the fields are the arguments of `models.unet.UNet`."""

    # Height and width in the bottleneck.
    lowest_resolution_size: int
    # Channels of each level, from the full resolution down, in units of base_dim.
    dim_multiply: tuple[int, ...]
    # Levels with self-attention, counted from 0. The bottleneck has it too.
    transformer_layers: tuple[int, ...] = field(metadata={"flag": "attention_levels"})
    # Channels at the full resolution, before its multiplier.
    base_dim: int

    # Height and width of the images.
    image_size: int = 128
    # Colour channels; 3, as images are read as RGB.
    channels: int = 3
    # Dropout probability in every residual block.
    dropout: float = 0.0
    # Groups of each GroupNorm. Narrow networks want fewer: leave at least 4 channels a group.
    norm_groups: int = 32
    # Details of the network: "ho", as in the paper's code; or "diffusers", as in that library's
    # default networks (docs/other-models.md).
    dialect: str = "ho"

    def __post_init__(self) -> None:
        check_types(self)
        check = partial(require, self)
        check("channels", self.channels == 3, "3: images are read as RGB")
        check("base_dim", self.base_dim >= 4 and self.base_dim % 2 == 0, "even and at least 4")
        check("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")

        # Halving leads from image_size to lowest_resolution_size, with a multiplier for each size.
        levels = len(self.dim_multiply)
        lowest = self.lowest_resolution_size
        check("dim_multiply", 0 < levels <= 15, "a list of 1 to 15 integers")
        sizes = [lowest << doublings for doublings in range(15)]
        halving = self.image_size in sizes
        check("image_size", halving, f"lowest_resolution_size = {lowest} times a power of 2")
        sizes = [size for size in reversed(sizes) if size <= self.image_size]
        fitting = (
            f"one multiplier for each resolution, {', '.join(map(str, sizes))}; "
            f"{levels} of them reach {lowest * 2 ** (levels - 1)} pixels"
        )
        check("dim_multiply", levels == len(sizes), fitting)

        known = all(level < levels for level in self.transformer_layers)
        fitting = f"levels between 0 and {levels - 1}, as dim_multiply has {levels}"
        check("transformer_layers", known, fitting)

        divisor = math.gcd(*self.dims)
        dims = ", ".join(map(str, self.dims))
        fitting = f"a divisor of {divisor}, as the levels have {dims} channels"
        check("norm_groups", divisor % self.norm_groups == 0, fitting)
        # Attention is in these levels, and in the bottleneck, which has the last level's channels.
        attending = [self.dims[level] for level in (*self.transformer_layers, levels - 1)]
        fitting = 'such that attention has heads of 8 channels, with dialect "diffusers"'
        heads = self.dialect == "ho" or all(channels % 8 == 0 for channels in attending)
        check("base_dim", heads, fitting)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.image_size, self.image_size

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.base_dim * multiplier for multiplier in self.dim_multiply)


@dataclass(frozen=True)
class Experiment:
    """All that defines a run's result."""

    diffusion: DiffusionConfig
    model: ModelConfig

    def override(self, diffusion: dict, model: dict) -> "Experiment":
        """Return a copy with some fields replaced, which is checked again."""
        return Experiment(replace(self.diffusion, **diffusion), replace(self.model, **model))

    def resumed(self, diffusion: dict, model: dict) -> "Experiment":
        """Return what `override` does, for a run that goes on.

        Raises ConfigError, with their names, for fields that such a run cannot change.
        """
        changed = self.override(diffusion, model)
        # Another GPU may lack bfloat16, so precision may change.
        may_change = {*BOOK_KEEPING, "epochs", "recompute", "compile", "precision"}
        # Another GPU's memory may want other passes. The step stays the same if its batch does, but
        # for dropout.
        if changed.diffusion.effective_batch == self.diffusion.effective_batch:
            may_change |= {"batch_size", "gradient_accumulation"}

        fixed = self.differences(changed).keys() - {f"diffusion.{field}" for field in may_change}
        if fixed:
            names = ", ".join(sorted(fixed))
            raise ConfigError(f"a resumed run cannot change {names}; start a new run for that")
        return changed

    def differences(self, other: "Experiment") -> dict[str, tuple]:
        """Return the fields that differ: {"diffusion.epochs": (own value, the other's), ...}."""
        theirs = other.to_dict()
        differences = {}
        for part, fields in self.to_dict().items():
            for name, value in fields.items():
                if value != theirs[part][name]:
                    differences[f"{part}.{name}"] = (value, theirs[part][name])
        return differences

    def warnings(self) -> list[str]:
        """Return what is allowed and probably not meant."""
        warnings = []
        groups = self.model.norm_groups
        channels_of_group = min(self.model.dims) / groups
        if channels_of_group < 2:
            warnings.append(
                f"norm_groups = {groups} leaves {channels_of_group:g} channel a group at the "
                "narrowest level; the norm then erases each channel's mean and samples come out "
                "tinted: leave at least 4"
            )
        if self.diffusion.max_rotation > 0 and not self.diffusion.use_augmentation:
            warnings.append("max_rotation has no effect without use_augmentation = True")
        return warnings

    def to_dict(self) -> dict:
        """Return plain containers, as JSON has them, for checkpoints."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_dict(config: dict) -> "Experiment":
        """Invert `to_dict`. Raises ConfigError when fields are missing or unknown."""
        try:
            # Runs of earlier versions have no such field, and their grids are made by ddpm.
            diffusion = DiffusionConfig(**{"grid_sampler": "ddpm"} | config["diffusion"])
            return Experiment(diffusion, ModelConfig(**config["model"]))
        except (KeyError, TypeError) as error:
            why = repr(str(error)[:200])
            raise ConfigError(
                f"the saved config does not fit this version in 'diffusion' or 'model': {why}"
            ) from error


def check_types(config: DiffusionConfig | ModelConfig) -> None:
    """Bring each field to its annotated type where nothing is lost, or raise ConfigError."""
    for name, wanted in get_type_hints(type(config)).items():
        check = partial(require, config, name)
        value = getattr(config, name)

        # A field is a single item, or a tuple of items, which JSON has as a list.
        kind, *several = get_args(wanted) or [wanted]
        items = value if several else [value]
        kinds = (float, int) if kind is float else (kind,)
        fits = isinstance(items, (list, tuple)) and all(type(item) in kinds for item in items)
        check(fits, FITTING[wanted])
        if several:
            # A single number has a check of its own, which nan fails.
            check(all(abs(item) < math.inf for item in items), FITTING[wanted])

        integers = [item for item in items if type(item) is int]
        if kind is not float:
            least = 0 if name in MAY_BE_ZERO else 1
            check(all(item >= least for item in integers), f"{least} or more")
        most = LARGEST.get(name, 2**63 - 1)
        check(all(abs(item) <= most for item in integers), f"at most {most:,}")

        choices = CHOICES.get(name, (value,))
        check(value in choices, " or ".join(f'"{choice}"' for choice in choices))

        # A frozen dataclass sets itself up in this way.
        brought = tuple(map(kind, items))
        object.__setattr__(config, name, brought if several else brought[0])


def require(config: DiffusionConfig | ModelConfig, field: str, fits: bool, fitting: str) -> None:
    """Raise ConfigError unless a field fits, with what would."""
    if not fits:
        value = f"{getattr(config, field)!r:.100}"
        raise ConfigError(f"{type(config).__name__}: {field} is {value}; it must be {fitting}")


EXPERIMENTS = experiments()
DEFAULT_EXPERIMENT = "faces"
