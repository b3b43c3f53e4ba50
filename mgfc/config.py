"""What a calibration consists of: frozen dataclasses, strict in both directions of their dict form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

from mgfc.errors import ConfigError

Layers = str | tuple[int, ...] | list[int]
C = TypeVar("C", bound="_Config")

# No size that a vision transformer has comes near; whatever is built from a configuration stays small enough to be refused.
MAX_SIZE, MAX_NUMBER = 1 << 16, 1e9
_LAYERS = re.compile(r"all|(first|last):0*[1-9]\d{0,4}", re.ASCII)


def expect(condition: bool, where: str, expected: str, found: object) -> None:
    if not condition:
        shown = "a huge number" if isinstance(found, int) and found.bit_length() > 1000 else repr(found)
        raise ConfigError(f"{where}: expected {expected}, found {shown if len(shown) < 500 else shown[:500] + '...'}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


class _Config:
    """Validation and the dict form that all share."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict: nested configurations as dicts, tuples as lists."""
        items = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return {k: v.to_dict() if isinstance(v, _Config) else list(v) if isinstance(v, tuple) else v for k, v in items}

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """The inverse of `to_dict`; missing keys take their defaults.

        Raises:
            ConfigError: on an unknown key, a wrong type or an impossible value.
        """
        expect(isinstance(values, Mapping), cls.__name__, "a mapping of its fields", values)
        known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(known), key=str)
        if unknown:
            raise ConfigError(
                f"{cls.__name__}: unknown key {unknown[0]!r}; it has {', '.join(known)}. "
                "Remove the key, or upgrade mgfc if a newer version wrote it."
            )
        stages = _stage_classes() if cls is MGFCConfig else {}
        decoded = {}
        for key, value in values.items():
            if key in stages and value is not None:
                value = stages[key].from_dict(value)
            decoded[key] = tuple(value) if isinstance(value, list) else value
        return cls(**decoded)

    def _check_layers(self, layers: Layers) -> None:
        if isinstance(layers, list):
            layers = tuple(layers)
            object.__setattr__(self, "layers", layers)
        if isinstance(layers, str):
            valid = _LAYERS.fullmatch(layers) is not None
        else:
            is_tuple = isinstance(layers, tuple) and 0 < len(layers) <= MAX_SIZE
            valid = is_tuple and all(type(i) is int and abs(i) <= MAX_SIZE for i in layers)
        expect(valid, f"{type(self).__name__}.layers", '"all", "first:n", "last:n" or a tuple of block indices', layers)

    def _check_size(self, name: str, least: int = 1, most: int = MAX_SIZE, odd: bool = False, optional: bool = False) -> None:
        value, where = getattr(self, name), f"{type(self).__name__}.{name}"
        expected = f"an {'odd ' * odd}int > {least - 1}{' or None' * optional}"
        valid = (optional and value is None) or (type(value) is int and value >= least and (value % 2 == 1 or not odd))
        expect(valid, where, expected, value)
        expect(value is None or value <= most, where, f"at most {most}", value)

    def _check_share(self, name: str) -> None:
        value = getattr(self, name)
        valid = _is_number(value) and 0 <= value <= 1
        expect(valid, f"{type(self).__name__}.{name}", "a number from 0 to 1", value)

    def _check_weight(self, weight: float) -> None:
        expect(_is_number(weight) and weight >= 0, f"{type(self).__name__}.loss_weight", "a finite number >= 0", weight)


@dataclass(frozen=True)
class CoarseConfig(_Config):
    """The coarse stage: scene-level statistics of the image (see `CoarseCalib`).

    Args:
        strength: s, from 0 to 1: the share of the way to the source's statistics that a scene far from them is moved.
        randomise: share of training's images that are put into another light, colour, sharpness and noise, from 0 to 1.
        loss_weight: weight of the loss on which categories the scene holds; 0 turns it off.
    """

    strength: float = 1.0
    randomise: float = 0.0
    loss_weight: float = 0.0

    def __post_init__(self) -> None:
        self._check_share("strength")
        self._check_share("randomise")
        self._check_weight(self.loss_weight)


@dataclass(frozen=True)
class MediumConfig(_Config):
    """The medium stage: category-level statistics (see `MediumCalib`).

    Args:
        num_prototypes: categories K of each block.
        temperature: tau of the softmax over cosine similarities.
        strength: s, from 0 to 1: the share of the way to the source's prototype that a category far from it is moved.
        layers: which of the calibrated blocks have this stage: "all", "first:n" or "last:n" of them, or block indices
            (negative ones count from the end).
        loss_weight: weight of the loss on each patch's mix of categories; 0 turns it off.
        threshold: z0, the squared distance from the source's prototype up to which a category stays as it is, in variances
            of the source; higher for domains that differ in what they show.
    """

    num_prototypes: int = 16
    temperature: float = 0.05
    strength: float = 1.0
    layers: Layers = "last:8"
    loss_weight: float = 0.0
    threshold: float = 2.0

    def __post_init__(self) -> None:
        self._check_size("num_prototypes")
        for name in ("temperature", "threshold"):
            value = getattr(self, name)
            expect(_is_number(value) and value > 0, f"MediumConfig.{name}", "a finite number > 0", value)
        self._check_share("strength")
        self._check_layers(self.layers)
        self._check_weight(self.loss_weight)


@dataclass(frozen=True)
class FineConfig(_Config):
    """The fine stage: gated depth-wise high-pass (see `FineCalib`).

    Args:
        kernel_size: odd side of the high-pass kernel, in patches.
        layers: blocks that have this stage, as in `MediumConfig`.
        loss_weight: weight of the loss that lets detail through at the boundaries of the labels; 0 turns it off.
    """

    kernel_size: int = 3
    layers: Layers = "last:4"
    loss_weight: float = 0.0

    def __post_init__(self) -> None:
        self._check_size("kernel_size", least=2, most=255, odd=True)
        self._check_layers(self.layers)
        self._check_weight(self.loss_weight)


@dataclass(frozen=True)
class MGFCConfig(_Config):
    """The calibrators of one backbone.

    Args:
        rank: r of the low-rank adapters, at most the feed-forward networks' input width; None for calibration alone.
        layers: blocks that get a calibrator: "all", "first:n", "last:n" or block indices (negative ones count from the end).
        coarse: the coarse stage, or None to leave it out.
        medium: the medium stage, or None to leave it out.
        fine: the fine stage, or None to leave it out (the default).
        num_classes: categories of the labels; needed once a stage's `loss_weight` is above 0.

    Raises:
        ConfigError: on a wrong type or an impossible value.

    Examples:
        >>> MGFCConfig(rank=32, fine=None).to_dict()["fine"] is None
        True
    """

    rank: int | None = 16
    layers: Layers = "all"
    coarse: CoarseConfig | None = CoarseConfig()
    medium: MediumConfig | None = MediumConfig()
    fine: FineConfig | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        self._check_size("rank", optional=True)
        self._check_layers(self.layers)
        for name, stage_class in _stage_classes().items():
            stage = getattr(self, name)
            valid = stage is None or isinstance(stage, stage_class)
            expect(valid, f"MGFCConfig.{name}", f"a {stage_class.__name__} or None", stage)
        self._check_size("num_classes", optional=True)
        if self.rank is None and "coarse" in self.loss_weights:
            expected = "0 without low-rank adapters, which the loss reads and trains"
            expect(False, "CoarseConfig.loss_weight", expected, self.loss_weights["coarse"])
        if self.loss_weights:
            expected = "the number of label categories, since a loss_weight is above 0"
            expect(self.num_classes is not None, "MGFCConfig.num_classes", expected, None)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weights above 0, by granularity."""
        stages = {"coarse": self.coarse, "medium": self.medium, "fine": self.fine}
        return {name: stage.loss_weight for name, stage in stages.items() if stage is not None and stage.loss_weight > 0}


@dataclass(frozen=True)
class ReinConfig(_Config):
    """Rein's low-rank tokens (see `ReinCalib`), as `mgfc convert-rein` writes them.

    Args:
        num_tokens: learnt tokens m of each block.
        token_rank: their rank; None for tokens of full rank.
        layers: blocks that are refined, as in `MGFCConfig`.
        use_softmax: whether similarities to the tokens pass a softmax; a few checkpoints were trained without.
    """

    num_tokens: int = 100
    token_rank: int | None = 16
    layers: Layers = "all"
    use_softmax: bool = True

    def __post_init__(self) -> None:
        self._check_size("num_tokens", least=2)
        self._check_size("token_rank", optional=True)
        self._check_layers(self.layers)
        expect(isinstance(self.use_softmax, bool), "ReinConfig.use_softmax", "True or False", self.use_softmax)

    @property
    def loss_weights(self) -> dict[str, float]:
        """None: Rein has no losses of its own."""
        return {}


AdapterConfig: TypeAlias = MGFCConfig | ReinConfig


def _stage_classes() -> dict[str, type[_Config]]:
    return {"coarse": CoarseConfig, "medium": MediumConfig, "fine": FineConfig}
