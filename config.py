"""What a run is made of: the experiments by name, and two dataclasses with a comment for each field.

Edit `experiments` or add to it, or override any field for one run: `python train.py faces --diffusion.epochs 10`.
A config that could not work is refused when it is made, with a sentence that says what would fit.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import get_type_hints


def experiments() -> dict[str, "Experiment"]:
    """EXPERIMENTS, by name. What the FFHQ runs share is written out in each, so that each can be read by itself."""
    faces_network = ModelConfig(
        lowest_resolution_size=4,
        dim_multiply=(1, 2, 4, 4),
        transformer_layers=(2,),
        base_dim=32,
        image_size=32,
        norm_groups=8,
    )
    return {
        # Minutes on a laptop's CPU: people of the embedded emoji set at 32 x 32.
        "faces": Experiment(
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
            faces_network,
        ),
        # The same with v and cosine betas, at a lower rate: docs/whole-before-detail.md says why, and what is better.
        "faces-v": Experiment(
            DiffusionConfig(
                dataset_name="emoji_people",
                learning_rate=1e-3,
                batch_size=16,
                use_augmentation=True,
                timesteps_diff=1000,
                objective="v",
                beta_schedule="cosine",
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
            faces_network,
        ),
        # First run of the reference (see README), faults included: betas meant for 1000 steps over 200, no EMA.
        "ffhq-run1": Experiment(
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
        ),
        # Its second run: 1000 steps and EMA.
        "ffhq-run2": Experiment(
            DiffusionConfig(
                dataset_name="FFHQ",
                learning_rate=3e-5,
                batch_size=20,
                use_augmentation=False,
                timesteps_diff=1000,
                split="reference",
                beta_start=1e-4,
                beta_end=0.02,
                rescale_betas=True,
                epochs=45,
                gradient_accumulation=4,
                clip_grad_norm=0.0,
                warmup_steps=0,
                lr_schedule="constant",
                ema_decay=0.9999,
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
        ),
        # The full run: twice the width, augmentation, 500 epochs; go on with --resume and more --diffusion.epochs.
        "ffhq-full": Experiment(
            DiffusionConfig(
                dataset_name="FFHQ",
                learning_rate=3e-5,
                batch_size=20,
                use_augmentation=True,
                timesteps_diff=1000,
                split="reference",
                max_rotation=3.0,
                rotation_free_end=0.1,
                beta_start=1e-4,
                beta_end=0.02,
                rescale_betas=True,
                epochs=500,
                gradient_accumulation=4,
                clip_grad_norm=1.0,
                warmup_steps=5000,
                lr_schedule="constant",
                ema_decay=0.9999,
                precision="auto",
                seed=0,
                grid_images=20,
            ),
            ModelConfig(
                lowest_resolution_size=8,
                dim_multiply=(1, 2, 2, 4, 8),
                transformer_layers=(3,),
                base_dim=128,
                image_size=128,
                channels=3,
                dropout=0.0,
                norm_groups=32,
            ),
        ),
        # The full run with v and mixed t.
        "ffhq-v": Experiment(
            DiffusionConfig(
                dataset_name="FFHQ",
                learning_rate=3e-5,
                batch_size=20,
                use_augmentation=True,
                timesteps_diff=1000,
                split="reference",
                max_rotation=3.0,
                rotation_free_end=0.1,
                beta_start=1e-4,
                beta_end=0.02,
                rescale_betas=True,
                objective="v",
                t_sampling="mixed",
                epochs=500,
                gradient_accumulation=4,
                clip_grad_norm=1.0,
                warmup_steps=5000,
                lr_schedule="constant",
                ema_decay=0.9999,
                precision="auto",
                seed=0,
                grid_images=20,
            ),
            ModelConfig(
                lowest_resolution_size=8,
                dim_multiply=(1, 2, 2, 4, 8),
                transformer_layers=(3,),
                base_dim=128,
                image_size=128,
                channels=3,
                dropout=0.0,
                norm_groups=32,
            ),
        ),
        # The paper's CIFAR-10: 390 steps an epoch, 800,280 in all; sample.py --variance large is what its 3.17 had.
        "cifar10": Experiment(
            DiffusionConfig(
                dataset_name="CIFAR10",
                learning_rate=2e-4,
                batch_size=128,
                use_augmentation=True,
                timesteps_diff=1000,
                max_rotation=0.0,
                beta_start=1e-4,
                beta_end=0.02,
                rescale_betas=True,
                beta_schedule="linear",
                objective="eps",
                t_sampling="uniform",
                epochs=2052,
                gradient_accumulation=1,
                clip_grad_norm=1.0,
                warmup_steps=5000,
                lr_schedule="constant",
                ema_decay=0.9999,
                precision="auto",
                seed=0,
                grid_images=64,
            ),
            ModelConfig(
                lowest_resolution_size=4,
                dim_multiply=(1, 2, 2, 2),
                transformer_layers=(1,),
                base_dim=128,
                image_size=32,
                channels=3,
                dropout=0.1,
                norm_groups=32,
                dialect="ho",
            ),
        ),
    }


class ConfigError(ValueError):
    """A field's value does not fit; the message names the field, the value and what would."""


# Book-keeping: what may also change when a run is resumed, as it does not touch the weights.
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
    "grid_steps",
)
# Of the integers; the others are at least 1
MAY_BE_ZERO = (
    "warmup_steps",
    "max_bad_images",
    "seed",
    "keep_every",
    "bits_per_dim_every",
    "transformer_layers",
)
# Far above any use; beyond, tables and layers would take all memory. All others have 64 bits.
LARGEST = {"timesteps_diff": 10**6, "image_size": 2**14, "base_dim": 2**14, "dim_multiply": 1024}
# Of the texts
CHOICES = {
    "split": ("reference", "official"),
    "beta_schedule": ("linear", "cosine"),
    "objective": ("eps", "v"),
    "t_sampling": ("uniform", "mixed"),
    "lr_schedule": ("constant", "cosine"),
    "recompute": ("none", "norms", "blocks"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("auto", "off"),
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
    timesteps_diff: int

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
    # Of the network: "float32", "bfloat16", "float16", or "auto", the fastest that the hardware has.
    precision: str = "auto"
    # What backward computes again to save memory: "none"; "norms", nearly free at 128 px; "blocks",
    # for least memory.
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
    # Steps of the default sampler for that grid, at most timesteps_diff. sample.py takes all T.
    grid_steps: int = 50

    def __post_init__(self) -> None:
        check_types(self)
        require(
            bool(self.dataset_name),
            self,
            "dataset_name",
            "a data set's name or the path to a folder or zip",
        )
        require(
            0 < self.learning_rate <= 1,
            self,
            "learning_rate",
            "above 0 and at most 1, such as 3e-5",
        )
        require(self.timesteps_diff >= 2, self, "timesteps_diff", "at least 2; the paper has 1000")
        require(0 <= self.max_rotation <= 10, self, "max_rotation", "between 0 and 10 degrees")
        require(0 <= self.rotation_free_end <= 1, self, "rotation_free_end", "between 0 and 1")
        require(0 < self.beta_start < 1, self, "beta_start", "between 0 and 1, such as 1e-4")
        require(
            self.beta_start <= self.beta_end,
            self,
            "beta_end",
            f"at least beta_start = {self.beta_start:g}",
        )
        unused = (self.beta_start, self.beta_end, self.rescale_betas) == (1e-4, 0.02, True)
        fitting = '"linear" when beta_start, beta_end or rescale_betas are changed'
        require(self.beta_schedule == "linear" or unused, self, "beta_schedule", fitting)
        scale = 1000 / self.timesteps_diff if self.rescale_betas else 1
        fitting = f"below {1 / scale:g} with timesteps_diff = {self.timesteps_diff}, so that every beta stays below 1"
        require(
            self.beta_schedule == "cosine" or scale * self.beta_end < 1, self, "beta_end", fitting
        )
        require(
            0 <= self.clip_grad_norm < math.inf,
            self,
            "clip_grad_norm",
            "0 (off) or more, such as 1.0",
        )
        require(
            0 <= self.checkpoint_minutes < math.inf, self, "checkpoint_minutes", "0 (off) or more"
        )
        require(
            0 <= self.ema_decay < 1,
            self,
            "ema_decay",
            "at least 0 (no EMA) and below 1, such as 0.9999",
        )

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
    # Levels with self-attention (there is no transformer), counted from 0. The bottleneck has it too.
    transformer_layers: tuple[int, ...]
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
        require(self.channels == 3, self, "channels", "3: images are read as RGB")
        require(
            self.base_dim >= 4 and self.base_dim % 2 == 0, self, "base_dim", "even and at least 4"
        )
        levels, lowest = len(self.dim_multiply), self.lowest_resolution_size
        require(0 < levels <= 15, self, "dim_multiply", "a list of 1 to 15 integers")
        sizes = [
            self.image_size >> level for level in range((self.image_size // lowest).bit_length())
        ]
        fits = sizes and lowest << (len(sizes) - 1) == self.image_size
        require(fits, self, "image_size", f"lowest_resolution_size = {lowest} times a power of 2")
        fitting = f"one multiplier for each resolution, {', '.join(map(str, sizes))}; {levels} of them reach "
        require(
            levels == len(sizes), self, "dim_multiply", f"{fitting}{lowest << (levels - 1)} pixels"
        )
        fitting = f"levels between 0 and {levels - 1}, as dim_multiply has {levels}"
        require(
            all(level < levels for level in self.transformer_layers),
            self,
            "transformer_layers",
            fitting,
        )
        fitting = f"a divisor of {math.gcd(*self.dims)}, as the levels have {', '.join(map(str, self.dims))} channels"
        require(math.gcd(*self.dims) % self.norm_groups == 0, self, "norm_groups", fitting)
        require(0 <= self.dropout < 1, self, "dropout", "at least 0 and below 1")
        fits = self.dialect == "ho" or math.gcd(*self.dims) % 8 == 0
        require(
            fits,
            self,
            "base_dim",
            'a multiple of 8, for heads of 8 channels, with dialect "diffusers"',
        )

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
        """A copy with some fields replaced, checked again."""
        return Experiment(replace(self.diffusion, **diffusion), replace(self.model, **model))

    def resumed(self, diffusion: dict, model: dict) -> "Experiment":
        """As `override`, for a run that goes on: `ConfigError` names the fields that it cannot change.

        batch_size and gradient_accumulation may change if their product does not: that is for another GPU's memory.
        """
        changed = self.override(diffusion, model)
        may_change = {
            f"diffusion.{field}" for field in ("epochs", "recompute", "compile", *BOOK_KEEPING)
        }
        if changed.diffusion.effective_batch == self.diffusion.effective_batch:
            may_change |= {"diffusion.batch_size", "diffusion.gradient_accumulation"}
        fixed = self.differences(changed).keys() - may_change
        if fixed:
            raise ConfigError(
                f"a resumed run cannot change {', '.join(sorted(fixed))}; start a new run for that"
            )
        return changed

    def differences(self, other: "Experiment") -> dict[str, tuple]:
        """The fields that differ: {"diffusion.epochs": (own value, the other's), ...}."""
        own, others = self.to_dict(), other.to_dict()
        pairs = {
            f"{part}.{field}": (value, others[part][field])
            for part in own
            for field, value in own[part].items()
        }
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def to_dict(self) -> dict:
        """Plain containers, as JSON has them, for checkpoints."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_dict(config: dict) -> "Experiment":
        """The inverse of `to_dict`; `ConfigError` when fields are missing or unknown."""
        try:
            return Experiment(
                DiffusionConfig(**config["diffusion"]), ModelConfig(**config["model"])
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"the saved config does not fit this version: {str(error)[:200]!r}"
            ) from error


def check_types(config: DiffusionConfig | ModelConfig) -> None:
    """Bring numbers and lists to the annotated type where nothing is lost, or raise `ConfigError`."""
    named = {int: "an integer", float: "a number", bool: "True or False", str: "a text"}
    for name, wanted in get_type_hints(type(config)).items():
        value = getattr(config, name)
        items, kind = ([value], wanted) if wanted in named else (value, int)
        kinds = {float, int} if kind is float else {kind}
        fits = isinstance(items, (list, tuple)) and all(type(item) in kinds for item in items)
        require(fits, config, name, named.get(wanted, "a list of integers, such as [1, 2, 4]"))
        least, most = int(name not in MAY_BE_ZERO), LARGEST.get(name, 2**63 - 1)
        ints = [item for item in items if type(item) is int]
        require(
            kind is float or all(item >= least for item in ints), config, name, f"{least} or more"
        )
        require(all(abs(item) <= most for item in ints), config, name, f"at most {most:,}")
        choices = CHOICES.get(name, (value,))
        require(value in choices, config, name, " or ".join(f'"{choice}"' for choice in choices))
        # How a frozen dataclass sets itself up
        object.__setattr__(config, name, kind(value) if wanted in named else tuple(value))


def require(fits: bool, config: DiffusionConfig | ModelConfig, field: str, fitting: str) -> None:
    """`ConfigError` unless it fits."""
    if not fits:
        raise ConfigError(
            f"{type(config).__name__}: {field} is {getattr(config, field)!r:.100}; it must be {fitting}"
        )


EXPERIMENTS = experiments()
DEFAULT_EXPERIMENT = "faces"
