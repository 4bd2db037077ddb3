"""Presets and label schemas: frozen settings, read from YAML. No torch."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medlsdm.errors import ConfigError, SchemaError
from medlsdm.types import LabelSchema

Triple = tuple[int, int, int]
Positive = Annotated[int, Field(ge=1)]
Size = tuple[Positive, Positive, Positive]
Spacing = tuple[float, float, float]

HEAD_WIDTH = 32
"""Channels of one head of attention."""

LARGEST_SCALE = 1e6


class Settings(BaseModel):
    """Forbid unknown keys, numbers that are not finite, and changes after the fact."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AutoencoderConfig(Settings):
    """Shape the VQ-GAN of stage 1.

    ``strides`` is the compression per axis; the first factor of two is a space-to-depth stem, so
    no convolution runs at full resolution. ``channels`` and the numbers of residual blocks name one value
    for each scale after the stem, the finest first. There is one latent channel for each entry of
    ``levels``; ``codebook`` is the number of codes of the quantiser ``ema``. ``latent_noise`` is added to
    latents in training, so that they hold what stage 2 can predict and not the grain. ``texture_channels``
    is the width of the decoder that draws texture; 0 leaves it out, and volumes stay smooth.
    """

    strides: Triple = (4, 4, 4)
    channels: tuple[Positive, ...] = Field(default=(32, 64), min_length=1)
    encoder_blocks: tuple[int, ...] = (1, 1)
    decoder_blocks: tuple[int, ...] = (1, 1)
    quantiser: Literal["fsq", "ema", "none"] = "fsq"
    levels: tuple[int, ...] = (8, 8, 8, 8, 5, 5, 5, 5)
    codebook: int = Field(512, ge=2)
    label_width: int = Field(16, ge=1)
    label_dropout: float = Field(0.1, ge=0, le=1)
    latent_noise: float = Field(0.0, ge=0)
    texture_channels: int = Field(0, ge=0)
    texture_blocks: int = Field(3, ge=1)

    @property
    def latent_channels(self) -> int:
        """Return the number of latent channels: one for each entry of ``levels``, whatever the quantiser."""
        return len(self.levels)

    @property
    def patch(self) -> Triple:
        """Return the stem's space-to-depth factor for each axis."""
        x, y, z = (min(2, stride) for stride in self.strides)
        return x, y, z

    @property
    def down(self) -> tuple[Triple, ...]:
        """Return the factors by which each later scale shrinks the one before."""
        left = [stride // patch for stride, patch in zip(self.strides, self.patch, strict=True)]
        steps: list[Triple] = []
        while max(left) > 1:
            x, y, z = (min(2, n) for n in left)
            steps.append((x, y, z))
            left = [n // s for n, s in zip(left, steps[-1], strict=True)]
        return tuple(steps)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(s not in (1, 2, 4, 8) for s in self.strides):
            raise ValueError(f"strides {self.strides} are not all among 1, 2, 4 and 8")
        if len(self.channels) != 1 + len(self.down):
            raise ValueError(f"strides {self.strides} need {1 + len(self.down)} channels, not {len(self.channels)}")
        if not len(self.channels) == len(self.encoder_blocks) == len(self.decoder_blocks):
            raise ValueError("channels, encoder_blocks and decoder_blocks are not equally many")
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels {self.levels} are not all at least 2")
        return self


class ObjectiveConfig(Settings):
    """Say what the denoiser learns to predict, and how errors are weighed.

    ``min_snr`` caps the weight of times with little noise (``v`` and ``epsilon`` only). ``class_weight_cap``
    lets voxels of rare classes weigh up to that much more; 1 weighs all voxels alike. With
    ``reference_voxels``, latent volumes larger than that train at noisier times.
    """

    kind: Literal["flow", "v", "epsilon"] = "flow"
    loss: Literal["l1", "l2"] = "l2"
    min_snr: float | None = Field(default=None, gt=0)
    class_weight_cap: float = Field(default=1.0, ge=1)
    reference_voxels: int | None = Field(default=None, ge=1)


class DenoiserConfig(Settings):
    """Shape the semantic U-Net of stage 2, and say what it learns; ``channels`` names one width for each scale.

    ``norm: voxel`` looks at one voxel at a time, so that windows with a halo equal the whole. ``attention``
    is the number of the coarsest scales that have it. ``label_dropout`` is how often a whole map is hidden in
    training, ``partial_labels`` how often some of its classes are, ``modality_dropout`` how often the
    modality is. ``ema`` is the longest memory of the averaged weights; 0 keeps none.
    """

    channels: tuple[Positive, ...] = Field(default=(32, 64), min_length=1)
    blocks: int = Field(default=1, ge=1)
    label_width: int = Field(default=16, ge=1)
    embedding_width: int = Field(default=64, ge=8)
    norm: Literal["group", "voxel"] = "group"
    attention: int = Field(default=0, ge=0)
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    partial_labels: float = Field(default=0.0, ge=0, le=1)
    modality_dropout: float = Field(default=0.0, ge=0, le=1)
    ema: float = Field(default=0.0, ge=0, lt=1)
    objective: ObjectiveConfig = ObjectiveConfig()

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for width in self.channels[max(0, len(self.channels) - self.attention) :]:
            heads = max(1, width // HEAD_WIDTH)
            if width % heads:
                raise ValueError(f"attention over {width} channels: they do not divide into {heads} heads")
        return self


class StageConfig(Settings):
    """Say how one stage trains.

    ``crop`` cuts smaller training volumes than the preset's window. ``gradient_checkpointing`` saves
    memory for a third more time; ``compile`` and ``channels_last`` lose time on CPUs and may win on GPUs.
    ``optimiser`` is AdamW or Muon, which takes fewer steps.
    """

    steps: int = Field(ge=0)
    batch: int = Field(default=4, ge=1)
    crop: Size | None = None
    optimiser: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(default=2e-3, gt=0)
    warmup: int = Field(default=20, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    save_every: int = Field(default=200, ge=1)
    augment: Literal["none", "light", "strong"] = "none"
    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False


class AdversarialConfig(Settings):
    """Say how discriminators push stage 1 towards real texture.

    ``weight`` 0 takes their push away; with ``feature_matching`` 0 as well there are none.
    Discriminators begin to learn after ``start`` of all steps, and the autoencoder feels them ``warmup`` steps later.
    The push is ``weight`` times the ratio of the gradients' lengths at the decoder's last layer, at most
    ``limit``. ``slices`` is how many slices across each axis the 2D discriminators see in a step.
    """

    weight: float = Field(default=0.0, ge=0)
    feature_matching: float = Field(default=0.0, ge=0)
    r1: float = Field(default=0.0, ge=0)
    start: float = Field(default=0.25, ge=0, le=1)
    warmup: int = Field(default=100, ge=0)
    limit: float = Field(default=10.0, gt=0)
    discriminators: tuple[Literal["2d", "3d"], ...] = Field(default=("2d", "3d"), min_length=1)
    channels: int = Field(default=16, ge=4)
    slices: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)


class Stage1Losses(Settings):
    """Weigh the losses of stage 1; 0 switches one off.

    ``commitment`` draws latents to their codes with the quantiser ``ema``, and to 0 with ``none``.
    """

    l1: float = Field(default=1.0, ge=0)
    mse: float = Field(default=0.0, ge=0)
    gradient: float = Field(default=0.5, ge=0)
    ssim: float = Field(default=0.0, ge=0)
    perceptual: float = Field(default=0.0, ge=0)
    commitment: float = Field(default=0.25, ge=0)
    adversarial: AdversarialConfig = AdversarialConfig()


class Stage1Config(StageConfig):
    """Say how stage 1 trains, and for what."""

    losses: Stage1Losses = Stage1Losses()


class Stage2Config(StageConfig):
    """Say how stage 2 trains: on ``variants`` crops of each patient, encoded once: one central, others random."""

    variants: int = Field(default=3, ge=1)


class ReflowConfig(StageConfig):
    """Say how the denoiser learns to take few steps, after stage 2; 0 ``steps`` of training leave it out.

    It learns ``sampling.steps`` steps of ``euler``. ``guidance`` goes into what it learns and costs nothing later.
    """

    steps: int = Field(default=0, ge=0)
    guidance: float = Field(default=1.0, ge=0)


SamplerName = Literal["euler", "heun", "adams", "ddim", "dpm++", "ancestral"]


class SamplingConfig(Settings):
    """Say how a volume is drawn; guidance 1 means none.

    Guidance acts at times within ``guidance_interval`` (0 is data, 1 is noise). A ``shift`` above 1 takes
    more of the steps near noise.
    """

    sampler: SamplerName = "heun"
    steps: int = Field(default=6, ge=1)
    guidance: float = Field(default=1.0, ge=0)
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    shift: float = Field(default=1.0, gt=0)


class Preset(Settings):
    """Hold everything that shapes and trains a model. ``window`` is the largest training crop.

    ``reflow`` teaches the denoiser to take few steps, and ``texture`` then trains the autoencoder's texture
    decoder, where it has one.
    """

    name: str
    window: Size
    autoencoder: AutoencoderConfig
    denoiser: DenoiserConfig
    stage1: Stage1Config
    texture: StageConfig = StageConfig(steps=0)
    stage2: Stage2Config
    reflow: ReflowConfig = ReflowConfig()
    sampling: SamplingConfig

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for size in (self.window, *(stage.crop for stage in self._stages.values() if stage.crop)):
            if any(n % s for n, s in zip(size, self.autoencoder.strides, strict=True)):
                raise ValueError(f"window or crop {size} is no multiple of strides {self.autoencoder.strides}")
        if self.reflow.steps and (self.sampling.sampler != "euler" or self.denoiser.objective.kind != "flow"):
            raise ValueError("reflow takes a denoiser with the objective flow, and the sampler euler afterwards")
        return self

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the resolved settings."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @property
    def _stages(self) -> dict[str, StageConfig]:
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if isinstance(value, StageConfig)}

    def for_few_steps(self, steps: int) -> Preset:
        """Return the preset with a denoiser that learns, for half as long again, to draw in so many steps.

        Raises:
            ConfigError: The denoiser is no flow, or stage 2 has no steps.
        """
        if not self.stage2.steps:
            raise ConfigError(
                f"The preset {self.name!r} has no steps in stage 2 to take half of.", "Name a whole preset by --preset."
            )
        taught = self.stage2.model_dump(mode="json", exclude={"variants"}) | {
            "steps": -(-self.stage2.steps // 2),
            "learning_rate": self.stage2.learning_rate / 3,
            "guidance": self.sampling.guidance,
        }
        drawn = self.sampling.model_dump() | {"sampler": "euler", "steps": steps, "guidance": 1.0}
        return parse_preset(self.model_dump(mode="json") | {"reflow": taught, "sampling": drawn})

    def only_few_steps(self) -> Preset:
        """Return the preset with nothing to train but few steps, for a model that is trained otherwise."""
        stages = {name: stage for name, stage in self._stages.items() if name != "reflow"}
        return self.model_copy(update={n: s.model_copy(update={"steps": 0}) for n, s in stages.items()})

    def for_spacing(self, spacing: Spacing) -> Preset:
        """Return the preset for voxels of this size (R, A, S, in mm).

        A preset's strides are the compression of cubic voxels. Thick axes are compressed less, so that
        latent voxels are as near to cubes as can be: 1 x 1 x 5 mm with stride 4 becomes 4 x 4 x 1. Windows
        shrink along these axes as the strides do, so that latents keep their size.
        """
        auto, finest = self.autoencoder, min(spacing)
        x, y, z = (_stride(s, mm / finest) for s, mm in zip(auto.strides, spacing, strict=True))
        strides = (x, y, z)
        if strides == auto.strides:
            return self
        scales = 1 + len(auto.model_copy(update={"strides": strides}).down)
        names = ("channels", "encoder_blocks", "decoder_blocks")
        fitted = auto.model_copy(update={"strides": strides} | {name: getattr(auto, name)[:scales] for name in names})

        def shrunk(window: Triple) -> Triple:
            x, y, z = (n * now // old for n, now, old in zip(window, strides, auto.strides, strict=True))
            return x, y, z

        stages = {
            name: stage.model_copy(update={"crop": shrunk(stage.crop)})
            for name, stage in self._stages.items()
            if stage.crop
        }
        update: dict[str, Any] = {"autoencoder": fitted, "window": shrunk(self.window)} | stages
        return Preset.model_validate(self.model_copy(update=update).model_dump())

    def scaled(self, factor: float) -> Preset:
        """Return the preset with the steps of every stage multiplied by ``factor`` (at least one step)."""
        if not 0 < factor <= LARGEST_SCALE:
            hint = f"Give a number above 0, and at most {LARGEST_SCALE:g}."
            raise ConfigError(f"A step scale of {factor:g} makes no sense.", hint)
        stages = {
            name: stage.model_copy(update={"steps": max(1, round(stage.steps * factor))})
            for name, stage in self._stages.items()
            if stage.steps
        }
        return self.model_copy(update=stages)


def _stride(stride: int, thickness: float) -> int:
    """Return the compression up to ``stride`` that brings voxels ``thickness`` times as thick nearest to cubes."""
    options = [2**n for n in range(stride.bit_length())]
    return min(options, key=lambda option: abs(math.log(option * thickness / stride)))


def config_folder() -> Path:
    """Return ``configs/``: inside the installed package, else beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "presets").is_dir():
            return folder
    raise ConfigError("The folder configs/ is missing from this installation.", "Install medlsdm again.")


def _read_yaml(name_or_path: str, kind: str) -> dict[str, Any]:
    """Read a YAML mapping by path, or by name from ``configs/<kind>``."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        folder = config_folder() / kind
        path = folder / f"{name_or_path}.yaml"
        if path.parent != folder or not path.is_file():
            known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
            raise ConfigError(f"There is no {kind[:-1]} {name_or_path!r}.", f"Known: {known}; or give a .yaml file.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path.name} cannot be read as YAML.", "Check path and contents.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path.name} holds no settings.", "It must be a YAML mapping.")
    return data


def parse_preset(data: object) -> Preset:
    """Build a preset from plain values, as a card or a plan carries them."""
    try:
        return Preset.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "preset"
        raise ConfigError(f"The preset is not valid at {where}: {first['msg']}.", "Correct the setting.") from error


def load_preset(name_or_path: str) -> Preset:
    """Load a preset by name (``tiny``) or from a YAML file.

    Raises:
        ConfigError: There is none of that name, or a setting is wrong.
    """
    return parse_preset(_read_yaml(name_or_path, "presets"))


def load_schema(name_or_path: str) -> LabelSchema:
    """Load a label schema by name (``hippocampus``) or from a YAML file.

    Raises:
        ConfigError: There is none of that name.
        SchemaError: It names ids or classes twice, or lacks a field.
    """
    return LabelSchema.from_json(_read_yaml(name_or_path, "schemas"))


def schema_of_values(values: set[int]) -> LabelSchema:
    """Make a schema for label values whose names are not known: "label 1", "label 2", ..."""
    rows = [{"id": 0, "name": "background"}]
    rows += [{"id": v, "name": f"label {v}"} for v in sorted(values - {0})]
    if len(rows) < 2:
        raise SchemaError("The label maps hold background only.", "Check that they are label maps.")
    return LabelSchema.from_json({"name": "unnamed", "classes": rows})
