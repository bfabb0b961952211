"""The named experiments, and two dataclasses with a comment for each field.

A preset is a function that returns an `Experiment`. Edit one, add another, or override any field
for one run: `python train.py faces --diffusion.epochs 10`. A config that cannot work raises
ConfigError, whose message says which values would work. Fields that name a network, an optimizer,
a schedule or a sampler are looked up in its table, where it is used.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

from functions.support.settings import (
    ConfigError,
    Presets,
    check_fields,
    from_fields,
    require,
    setting,
)

EXPERIMENTS = Presets()
DEFAULT_EXPERIMENT = "faces"


# `faces` trains in minutes on a laptop's CPU, on the people of the embedded emoji at 32 x 32.
# It is the paper's DDPM, but for the optimiser: with Muon instead of Adam, samples are as good
# in half the time (docs/speed.md).
@EXPERIMENTS
def faces() -> "Experiment":
    return Experiment(
        DiffusionConfig(
            dataset_name="emoji_people",
            learning_rate=2e-3,
            batch_size=16,
            use_augmentation=True,
            timesteps_diff=1000,
            optimizer="muon",
            epochs=25,
            gradient_accumulation=1,
            clip_grad_norm=1.0,
            warmup_steps=200,
            lr_schedule="cosine",
            ema_decay=0.998,
            log_every=25,
            validate_every=250,
            sample_every=500,
            checkpoint_every=500,
            snapshot_every=125,
            validation_samples=360,
        ),
        ModelConfig(
            lowest_resolution_size=None,
            dim_multiply=(1, 2, 4, 4),
            transformer_layers=(2,),
            base_dim=32,
            image_size=32,
            norm_groups=8,
        ),
    )


# `faces` with v and cosine betas, and with Adam for more epochs. docs/predicting-v.md
# says why, and what improves.
@EXPERIMENTS
def faces_v() -> "Experiment":
    return faces().override(
        objective="v",
        beta_schedule="cosine",
        optimizer="adam",
        learning_rate=1e-3,
        epochs=70,
        snapshot_every=175,
    )


# FFHQ at 64 x 64, for whoever has no GPU for a day: hours on a CPU (docs/ffhq.md). The
# optimiser is that of `faces`, and objective and betas are those of `faces-v`; both did best at
# 32 px. pretrained/ffhq-64 is of this preset, with 111 epochs of 3,600 photos.
@EXPERIMENTS
def ffhq_64() -> "Experiment":
    return faces().override(
        dataset_name="FFHQ",
        objective="v",
        beta_schedule="cosine",
        # 378,000 images of the whole set. For fewer photos, more epochs make as many steps.
        epochs=6,
        # Its length is 4% of the run.
        ema_decay=0.999,
        log_every=50,
        validate_every=1000,
        sample_every=2000,
        checkpoint_every=1000,
        checkpoint_minutes=10.0,
        # 8 snapshots of 15 MB
        snapshot_every=3000,
        validation_samples=1000,
        dim_multiply=(1, 2, 3, 4, 4),
        transformer_layers=(3,),
        image_size=64,
    )


# FFHQ at 32 x 32, where a CPU can train a wide network, and where it is decided how a face is
# built. A model of `ffhq_details` enlarges its samples (docs/ffhq.md).
@EXPERIMENTS
def ffhq_32() -> "Experiment":
    return ffhq_64().override(
        # 504,000 images of the whole set, and 16 snapshots of 32 MB. pretrained/ffhq-32 is of this
        # preset, with 140 epochs of 3,600 photos.
        batch_size=32,
        epochs=8,
        snapshot_every=1000,
        dim_multiply=(1, 2, 3, 3),
        transformer_layers=(2,),
        base_dim=64,
        image_size=32,
    )


# The details of FFHQ at 64 and at 128 px: one network doubles samples of `ffhq_32` twice
# (models/details.py, docs/ffhq.md).
@EXPERIMENTS
def ffhq_details() -> "Experiment":
    return ffhq_64().override(
        # What is noised are details, and this is 2 log(STD) of
        # functions/super_resolution/details.py. So images have as much noise at each timestep as
        # those of `ffhq_64`.
        log_snr_shift=-5.3185,
        # 378,000 images of the whole set, as for `ffhq_64`, whose rate was half of this.
        learning_rate=4e-3,
        warmup_steps=100,
        # 3 snapshots of 19 MB
        snapshot_every=8000,
        dim_multiply=(1, 2, 3),
        # Only the bottleneck has attention, so that large images cost little.
        transformer_layers=(),
        base_dim=64,
        image_size=128,
        norm_groups=16,
        network="details",
    )


# MNIST's digits, in grey, with labels. They are not mirrored, because most mirrored digits are
# no digits.
@EXPERIMENTS
def mnist() -> "Experiment":
    return faces_v().override(
        dataset_name="MNIST",
        use_augmentation=False,
        labels=True,
        epochs=1,
        dim_multiply=(1, 2, 4),
        image_size=28,
        channels=1,
    )


# The reference's first run (docs/ffhq.md) with its faults: 200 timesteps with the betas for
# 1000, and no EMA. The values that describe the reference are written out here, even those that
# are defaults. Fields without a counterpart in it, such as objective and optimizer, have their
# defaults. The next runs list their changes.
@EXPERIMENTS
def ffhq_run1() -> "Experiment":
    return Experiment(
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
            compile=True,
            snapshot_every=1770,
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


# The reference's second run: 1000 timesteps and EMA.
@EXPERIMENTS
def ffhq_run2() -> "Experiment":
    return ffhq_run1().override(
        timesteps_diff=1000, rescale_betas=True, ema_decay=0.9999, lowest_resolution_size=None
    )


# The reference's full run: twice the width, augmentation, 500 epochs. --resume RUN with a
# larger --diffusion.epochs trains longer.
@EXPERIMENTS
def ffhq_full() -> "Experiment":
    return ffhq_run2().override(
        use_augmentation=True,
        max_rotation=3.0,
        rotation_free_end=0.1,
        epochs=500,
        clip_grad_norm=1.0,
        warmup_steps=5000,
        # All GPUs wait while 3.9 GB are saved: about 12 s, as a CPU took 3 s per GB. On 8
        # H100s, 20,000 steps take about 700 s (estimate in benchmarks/NOTES.md), so saving
        # takes about 2% of the time. If steps are slow, checkpoint_minutes saves more often.
        checkpoint_every=20_000,
        snapshot_every=20_000,
        base_dim=128,
    )


# The full run with v and cosine betas, and the learning rate and dropout of `ffhq_day`.
@EXPERIMENTS
def ffhq_v() -> "Experiment":
    return ffhq_full().override(
        objective="v",
        beta_schedule="cosine",
        learning_rate=1e-4,
        lr_schedule="cosine",
        dropout=0.1,
    )


# FFHQ in a day on an H100, by an estimate (docs/ffhq.md): 590,400 steps. The network is that of
# `ffhq_run2`, but its groups have at least 4 channels, because those of 2 tint images a little
# (docs/what-did-not-help.md). Nobody has run this preset yet, so each value is one of a run at
# this size, or follows from our measurements. DiffAE (Preechakul et al. 2022) and DDPM-IP (Ning
# et al. 2023) trained on the same images at the same size.
@EXPERIMENTS
def ffhq_day() -> "Experiment":
    return ffhq_run2().override(
        # v and cosine betas prevent wrong colours (docs/predicting-v.md).
        objective="v",
        beta_schedule="cosine",
        # This is 2 log(64 / 128), for 128 px (Hoogeboom et al. 2023). A trial of ours at 64 px
        # did not forbid it (docs/what-did-not-help.md).
        log_snr_shift=-1.386,
        # DiffAE has batches of 32 x 4, and DDPM-IP of 8 x 16.
        batch_size=64,
        gradient_accumulation=2,
        # Both have this rate. EDM (Karras et al. 2022) has 2e-4 for batches of 256, which makes
        # 1.4e-4 for batches of 128 by the square root.
        learning_rate=1e-4,
        # Six runs of ours on photos at 32 px have a warm-up and a cosine to 0. With these, the
        # length of the EMA hardly matters (docs/what-did-not-help.md).
        warmup_steps=5000,
        lr_schedule="cosine",
        clip_grad_norm=1.0,
        # DiffAE's. Its length is 2% of the run.
        ema_decay=0.9999,
        # EDM augments, too. Without rotation, nothing has to be unlearned at the end.
        use_augmentation=True,
        # A 4090 sees 24 to 30 million images a day, by an estimate: 400 epochs.
        epochs=1200,
        # About 12 minutes on an H100
        validate_every=5000,
        checkpoint_every=5000,
        # 40 snapshots of 0.12 GB
        snapshot_every=15_000,
        # DiffAE and DDPM-IP have 0.1, and EDM 0.05. Each photo is seen 1,200 times.
        dropout=0.1,
        norm_groups=16,
    )


# The paper's CIFAR-10: 390 steps per epoch, 800,280 in total. Betas and objective are the
# defaults. The paper's FID of 3.17 is for samples made with sample.py --variance large.
@EXPERIMENTS
def cifar10() -> "Experiment":
    return Experiment(
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
            compile=True,
            snapshot_every=40_000,
            grid_images=64,
        ),
        ModelConfig(
            lowest_resolution_size=None,
            dim_multiply=(1, 2, 2, 2),
            transformer_layers=(1,),
            base_dim=128,
            image_size=32,
            dropout=0.1,
        ),
    )


@dataclass(frozen=True)
class DiffusionConfig:
    """The settings of data, diffusion and training. One *step* is one optimiser step."""

    # The data set: "emoji_faces" or "emoji_people" (embedded), "FFHQ", "CIFAR10", "MNIST", or the
    # path of a folder of images, a zip of one, or parquet files.
    dataset_name: str
    # The learning rate after the warm-up.
    learning_rate: float = setting(at_least=1e-9, at_most=1)
    # The most images in one forward pass. Half of it with twice the gradient_accumulation needs
    # about half of the memory, and gives the same result, but for dropout (docs/speed.md).
    batch_size: int
    # Flip training images at random, and rotate them if max_rotation > 0.
    use_augmentation: bool
    # T, the number of diffusion timesteps.
    timesteps_diff: int = setting(at_least=2, at_most=10**6, fixed_by_weights=True)

    # Data

    # The split of FFHQ by id: "reference" (63,000 images for training, 7,000 for validation) or
    # "official" (60,000 and 10,000).
    split: Literal["reference", "official"] = setting("reference", fixed=True)
    # Augmentation rotates training images by up to this many degrees, in either direction.
    max_rotation: float = setting(0.0, at_most=10)
    # The fraction of the steps, at the end of a run, in which no image is rotated, so that the
    # network unlearns the tilt.
    rotation_free_end: float = setting(0.1, at_most=1)
    # Up to this many unreadable images are skipped and listed. More are an error.
    max_bad_images: int = setting(0, at_least=0)
    # Give the network each image's label: its folder, or the class of MNIST, CIFAR10 or a parquet
    # file. `sample.py --label` then chooses what is drawn.
    labels: bool = setting(False, fixed=True)
    # The probability that training drops what an image's network is given beside it, such as its
    # label, so that it draws without that, too, as --cfg needs (Ho and Salimans 2022).
    condition_dropout: float = setting(0.1, at_most=1)

    # Noise schedule

    # Beta of the first timestep, for T = 1000.
    beta_start: float = setting(1e-4, fixed_by_weights=True)
    # Beta of the last timestep, for T = 1000.
    beta_end: float = setting(0.02, fixed_by_weights=True)
    # Multiply linear betas by 1000 / T, so that x_T is almost pure noise for any T.
    rescale_betas: bool = setting(True, fixed_by_weights=True)
    # The schedule of betas: "linear", or "cosine" (Nichol and Dhariwal 2021), which does not take
    # beta_start, beta_end and rescale_betas.
    beta_schedule: str = setting("linear", fixed_by_weights=True)
    # Added to the log-SNR, log(alpha_bar / (1 - alpha_bar)), of each timestep: below 0 there
    # is more noise, above 0 less. If betas suit 64 px, 2 log(64 / S) makes them suit S px
    # (Hoogeboom et al. 2023).
    log_snr_shift: float = setting(0.0, at_least=-10, at_most=10, fixed_by_weights=True)

    # Betas of one's own, one for each timestep, in place of those of beta_schedule.
    betas: tuple[float, ...] = setting((), no_flag=True, fixed_by_weights=True)

    # Objective

    # What the network predicts: "eps", the noise; or "v", a linear combination of noise and x_0.
    objective: str = setting("eps", fixed_by_weights=True)

    # Optimisation

    # "adam"; or "muon", which moves each weight matrix by the orthogonal factor of its momentum,
    # and all other parameters as Adam does.
    optimizer: str = setting("adam", fixed=True)
    # Length of the run, in passes over the training images. With --resume RUN and more of them, a
    # finished run trains longer.
    epochs: int = setting(45, at_most=10**6)
    # Batches per step. The effective batch is batch_size times gradient_accumulation, whatever the
    # number of processes, which share it.
    gradient_accumulation: int = 4
    # Largest gradient norm; larger gradients are scaled down to it. 0: no clipping.
    clip_grad_norm: float = 0.0
    # Steps over which the learning rate rises linearly from 0.
    warmup_steps: int = setting(0, at_least=0)
    # The learning rate after the warm-up: "constant", or "cosine", which falls to 0 along a half
    # cosine over the whole run.
    lr_schedule: str = "constant"
    # Decay of the weights' moving average (EMA), per step. 0: no EMA; samples use the raw weights.
    ema_decay: float = setting(0.9999, at_most=0.999999)
    # Precision of the network. "auto" is the fastest that the hardware supports. On CUDA, "float32"
    # is as PyTorch sets it, which is TF32 in convolutions.
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # On CUDA, compile the network in the first step, which takes minutes and makes the others of
    # large networks shorter (docs/speed.md). Not with deterministic = True.
    compile: bool = False
    # Seed of all random numbers. PyTorch takes 64 bits.
    seed: int = setting(0, at_least=0, at_most=2**64 - 1, fixed=True)
    # On CUDA, use only deterministic kernels, which are slower. On CPUs all kernels are
    # deterministic.
    deterministic: bool = False

    # Recording, which does not change the weights

    # Steps between rows of metrics.csv.
    log_every: int = 50
    # Steps between validations of the raw and the EMA weights. Each also draws losses.png.
    validate_every: int = 800
    # Steps between grids of samples. 0: none.
    sample_every: int = setting(4000, at_least=0)
    # Steps between checkpoints.
    checkpoint_every: int = 800
    # The longest time between checkpoints, in minutes. 0: no limit.
    checkpoint_minutes: float = 30.0
    # The number of newest checkpoints that are kept.
    keep_checkpoints: int = 3
    # Steps between snapshots: the weights to sample from, in float16, which are never deleted.
    # sample.py --guide uses them. 0: none.
    snapshot_every: int = setting(0, at_least=0)
    # Held-out triples (image, t, noise) in a validation. All validations use the same triples.
    validation_samples: int = setting(1000, at_most=10**6)
    # Images in a grid of samples.
    grid_images: int = setting(16, at_most=1000)
    # The sampler of the grids, "ddpm", "ddim" or "dpm++", with its default settings.
    grid_sampler: str = "dpm++"
    # Network calls per sample of a grid, or T if that is less.
    grid_steps: int = 20

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def effective_batch(self) -> int:
        """The number of images in one step, over all processes."""
        return self.batch_size * self.gradient_accumulation


@dataclass(frozen=True)
class ModelConfig:
    """The network, and the arguments of `models.unet.UNet`."""

    # Height and width of the features in the bottleneck. None: what follows from image_size and
    # dim_multiply.
    lowest_resolution_size: int | None = None
    # Channels of each level, from the full resolution down, as multiples of base_dim.
    dim_multiply: tuple[int, ...] = setting((1,), at_most=1024)
    # Levels with self-attention, which is no transformer; the name is the reference's. Level 0 is
    # the full resolution. The bottleneck always has it.
    transformer_layers: tuple[int, ...] = setting((), at_least=0)
    # Channels of a level whose multiplier in dim_multiply is 1.
    base_dim: int = setting(64, at_least=4, at_most=2**14)

    # Height and width of the images.
    image_size: int = setting(128, at_most=2**14)
    # Colour channels: 3, and files are read as RGB; or 1, and they are read as grey. Arrays of your
    # own may have any number.
    channels: int = 3
    # Dropout probability in every residual block.
    dropout: float = setting(0.0, at_most=0.99)
    # Groups of each GroupNorm. A group needs at least 4 channels, so narrow networks need fewer.
    norm_groups: int = 32
    # The network, by its name in models/networks.py: "unet"; "details", which draws the details of
    # images that it is given at half the size; or "diffusers", which comes from there.
    network: str = "unet"
    # What it is built by beside these fields; "diffusers" has the arguments of a UNet2DModel.
    arguments: dict | None = setting(None, no_flag=True)
    # The number of labels, which the data decide; 0 without labels.
    label_count: int = setting(0, at_least=0, at_most=10**6, no_flag=True)

    def __post_init__(self) -> None:
        check_fields(self)

        def check(name, fits, requirement):
            require(name, getattr(self, name), fits, requirement)

        check("base_dim", self.base_dim % 2 == 0, "even and at least 4")

        check("dim_multiply", self.dim_multiply, "a list of one or more")
        # Each level but the first halves the size.
        levels = len(self.dim_multiply)
        factor = 2 ** (levels - 1)
        check(
            "image_size",
            self.image_size % factor == 0,
            f"a multiple of {factor}, as the {levels} levels of dim_multiply halve it",
        )
        lowest = self.image_size // factor
        check(
            "lowest_resolution_size",
            self.lowest_resolution_size in (None, lowest),
            f"{lowest}, which {levels} levels make of an image_size of {self.image_size}",
        )
        check(
            "transformer_layers",
            max(self.transformer_layers, default=0) < levels,
            f"levels between 0 and {levels - 1}, as dim_multiply has {levels}",
        )

        divisor = math.gcd(*self.dims)
        check(
            "norm_groups",
            divisor % self.norm_groups == 0,
            f"a divisor of {divisor}, as the levels' channels are {list(self.dims)}",
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        return self.channels, self.image_size, self.image_size

    @property
    def dims(self) -> tuple[int, ...]:
        """The number of channels of each level."""
        return tuple(self.base_dim * multiplier for multiplier in self.dim_multiply)


@dataclass(frozen=True)
class Experiment:
    """All settings that a run's result depends on."""

    diffusion: DiffusionConfig
    model: ModelConfig

    def override(self, **changes) -> "Experiment":
        """Return a copy with some fields of either part replaced, which have no name in common.

        Raises ConfigError for fields that neither part has, and if they do not fit.
        """
        model = {name: changes.pop(name) for name in vars(self.model) if name in changes}
        if unknown := sorted(changes.keys() - vars(self.diffusion).keys()):
            names = ", ".join(unknown)
            raise ConfigError(f"neither DiffusionConfig nor ModelConfig has {names}")
        return Experiment(replace(self.diffusion, **changes), replace(self.model, **model))

    def differences(self, other: "Experiment") -> dict[str, tuple]:
        """Return the fields that differ: {"diffusion.epochs": (value, value in `other`), ...}."""
        others = other.to_dict()
        return {
            f"{part}.{name}": (value, others[part].get(name))
            for part, fields in self.to_dict().items()
            for name, value in fields.items()
            if value != others[part].get(name)
        }

    def to_dict(self) -> dict:
        """Return the fields as nested dicts, with lists for tuples, as JSON stores them."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_dict(config: dict) -> "Experiment":
        """Invert `to_dict`. Raises ConfigError for fields that are missing, unknown or wrong."""
        return Experiment(
            from_fields(DiffusionConfig, config["diffusion"]),
            from_fields(ModelConfig, config["model"]),
        )
