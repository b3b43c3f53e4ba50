"""Configurations: strict, frozen, and the same after a trip through JSON."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from mgfc import CoarseConfig, ConfigError, FineConfig, MediumConfig, MGFCConfig, MGFCError
from mgfc.layers import select_layers

CONFIGS = [
    MGFCConfig(),
    MGFCConfig(rank=1),
    MGFCConfig(layers="last:6"),
    MGFCConfig(layers="first:1", coarse=None),
    MGFCConfig(layers=(0, -1, 5)),
    MGFCConfig(coarse=None, medium=None, fine=None),
    MGFCConfig(num_classes=19),
    MGFCConfig(rank=None),
    MGFCConfig(coarse=CoarseConfig(strength=1, randomise=0.5, loss_weight=0.5), num_classes=1),
    MGFCConfig(medium=MediumConfig(num_prototypes=7, temperature=1, strength=0, loss_weight=1), num_classes=11),
    MGFCConfig(fine=FineConfig(kernel_size=7, layers="last:2", loss_weight=1e-3), num_classes=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_round_trip_through_json(config: MGFCConfig) -> None:
    again = MGFCConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again == config and hash(again) == hash(config) and repr(again) == repr(config)
    assert pickle.loads(pickle.dumps(config)) == config


def test_defaults() -> None:
    assert MGFCConfig().to_dict() == {
        "rank": 16,
        "layers": "all",
        "coarse": {"strength": 1.0, "randomise": 0.0, "loss_weight": 0.0},
        "medium": {
            "num_prototypes": 16,
            "temperature": 0.05,
            "strength": 1.0,
            "layers": "last:8",
            "loss_weight": 0.0,
            "threshold": 2.0,
        },
        "fine": None,
        "num_classes": None,
    }
    assert MGFCConfig().loss_weights == {}


def test_missing_keys_take_their_defaults() -> None:
    assert MGFCConfig.from_dict({}) == MGFCConfig()
    assert MGFCConfig.from_dict({"fine": {}, "rank": 3}) == MGFCConfig(rank=3, fine=FineConfig())
    assert FineConfig().to_dict() == {"kernel_size": 3, "layers": "last:4", "loss_weight": 0.0}
    assert MGFCConfig.from_dict({"medium": None}) == MGFCConfig(medium=None) != MGFCConfig()


def test_layers_may_be_a_list() -> None:
    config = MGFCConfig(layers=[3, 4], medium=MediumConfig(layers=[4]))
    assert config == MGFCConfig(layers=(3, 4), medium=MediumConfig(layers=(4,)))
    assert hash(config) and config.layers == (3, 4)


@pytest.mark.parametrize(
    ("values", "owner", "key"),
    [
        ({"ranks": 3}, "MGFCConfig", "ranks"),
        ({"rank": 3, "dropout": 0.1}, "MGFCConfig", "dropout"),
        ({"coarse": {"tokens": 8}}, "CoarseConfig", "tokens"),
        ({"coarse": {"layers": "first:6"}}, "CoarseConfig", "layers"),
        ({"medium": {"prototypes": 8}}, "MediumConfig", "prototypes"),
        ({"fine": {"kernel": 3}}, "FineConfig", "kernel"),
        ({1: 2, "b": 3}, "MGFCConfig", 1),
    ],
    ids=str,
)
def test_an_unknown_key_is_named_with_the_known_ones(values: dict[Any, Any], owner: str, key: object) -> None:
    known = "strength, randomise, loss_weight" if owner == "CoarseConfig" else "layers"
    with pytest.raises(ConfigError, match=rf"^{owner}: unknown key {key!r}; it has .*{known}.*upgrade mgfc"):
        MGFCConfig.from_dict(values)


NAN, INF = float("nan"), float("inf")
WRONG = [
    ({"rank": True}, "MGFCConfig.rank: expected an int > 0 or None, found True"),
    ({"rank": "48"}, "MGFCConfig.rank: expected an int > 0 or None, found '48'"),
    ({"rank": 4.0}, "MGFCConfig.rank"),
    ({"rank": 0}, "MGFCConfig.rank"),
    ({"rank": -1}, "MGFCConfig.rank"),
    ({"rank": INF}, "MGFCConfig.rank"),
    ({"num_classes": True}, "MGFCConfig.num_classes: expected an int > 0 or None, found True"),
    ({"num_classes": 0}, "MGFCConfig.num_classes"),
    ({"num_classes": "19"}, "MGFCConfig.num_classes"),
    ({"coarse": {"strength": True}}, "CoarseConfig.strength: expected a number from 0 to 1, found True"),
    ({"coarse": {"strength": 1.5}}, "CoarseConfig.strength"),
    ({"coarse": {"randomise": 1.5}}, "CoarseConfig.randomise: expected a number from 0 to 1, found 1.5"),
    ({"coarse": {"randomise": True}}, "CoarseConfig.randomise"),
    ({"coarse": {"randomise": NAN}}, "CoarseConfig.randomise"),
    ({"coarse": {"randomise": None}}, "CoarseConfig.randomise"),
    ({"medium": {"strength": -0.1}}, "MediumConfig.strength: expected a number from 0 to 1, found -0.1"),
    ({"medium": {"strength": NAN}}, "MediumConfig.strength"),
    ({"coarse": {"loss_weight": NAN}}, "CoarseConfig.loss_weight: expected a finite number >= 0, found nan"),
    ({"coarse": {"loss_weight": -0.1}}, "CoarseConfig.loss_weight"),
    ({"medium": {"num_prototypes": 0}}, "MediumConfig.num_prototypes"),
    ({"medium": {"temperature": 0}}, "MediumConfig.temperature: expected a finite number > 0, found 0"),
    ({"medium": {"temperature": INF}}, "MediumConfig.temperature"),
    ({"medium": {"threshold": 0}}, "MediumConfig.threshold: expected a finite number > 0, found 0"),
    ({"medium": {"threshold": True}}, "MediumConfig.threshold"),
    ({"medium": {"loss_weight": INF}}, "MediumConfig.loss_weight"),
    ({"medium": {"loss_weight": True}}, "MediumConfig.loss_weight"),
    ({"medium": {"loss_weight": "1"}}, "MediumConfig.loss_weight"),
    ({"fine": {"kernel_size": 4}}, "FineConfig.kernel_size: expected an odd int > 1, found 4"),
    ({"fine": {"kernel_size": 1}}, "FineConfig.kernel_size"),
    ({"fine": {"kernel_size": -3}}, "FineConfig.kernel_size"),
    ({"fine": {"kernel_size": 3.0}}, "FineConfig.kernel_size"),
    ({"fine": {"loss_weight": None}}, "FineConfig.loss_weight"),
    ({"fine": 3}, "FineConfig: expected a mapping of its fields, found 3"),
    ({"fine": [3]}, "FineConfig: expected a mapping"),
    ({"medium": "default"}, "MediumConfig: expected a mapping"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MGFCConfig.from_dict(values)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, (MGFCError, ValueError))


LAYERS = ["", "some", "last", "last:", "last:0", "last:x", "last:-1", "last:1.5", "middle:2", "ALL", "all:2", "first:1:2"]
LAYERS += [(), (1.0,), (True,), ("0",), None, 3, ((0,),), {0: 1}]


@pytest.mark.parametrize("owner", [MGFCConfig, MediumConfig, FineConfig])
@pytest.mark.parametrize("layers", LAYERS, ids=repr)
def test_wrong_layers(owner: type, layers: object) -> None:
    with pytest.raises(ConfigError) as caught:
        owner(layers=layers)
    expected = '"all", "first:n", "last:n" or a tuple of block indices'
    assert str(caught.value) == f"{owner.__name__}.layers: expected {expected}, found {layers!r}."


@pytest.mark.parametrize("stage", ["coarse", "medium", "fine"])
def test_a_stage_must_be_of_its_own_class(stage: str) -> None:
    other = FineConfig() if stage == "coarse" else CoarseConfig()
    for value in (other, {"layers": "all"}, True):
        with pytest.raises(ConfigError, match=rf"MGFCConfig\.{stage}: expected a {stage.title()}Config or None"):
            MGFCConfig(**{stage: value})


@pytest.mark.parametrize("values", [None, [], "rank=3", 3])
def test_from_dict_wants_a_mapping(values: Any) -> None:
    with pytest.raises(ConfigError, match="MGFCConfig: expected a mapping of its fields"):
        MGFCConfig.from_dict(values)


@pytest.mark.parametrize("stage", [CoarseConfig(loss_weight=1), MediumConfig(loss_weight=0.1), FineConfig(loss_weight=2)])
def test_losses_need_the_number_of_classes(stage: Any) -> None:
    name = type(stage).__name__.removesuffix("Config").lower()
    with pytest.raises(ConfigError, match=r"MGFCConfig\.num_classes: expected the number of label categories.*found None"):
        MGFCConfig(**{name: stage})
    assert MGFCConfig(**{name: stage}, num_classes=5).loss_weights == {name: stage.loss_weight}


@pytest.mark.parametrize(("config", "name"), [(MGFCConfig(), "rank"), (FineConfig(), "kernel_size"), (CoarseConfig(), "new")])
def test_frozen(config: Any, name: str) -> None:
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        setattr(config, name, 5)


def test_to_dict_is_a_copy() -> None:
    config = MGFCConfig(layers=(0, 1))
    values = config.to_dict()
    values["layers"].append(2)
    values["coarse"]["strength"] = 1
    assert config == MGFCConfig(layers=(0, 1))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", (0, 1, 2, 3)),
        ("first:2", (0, 1)),
        ("first:4", (0, 1, 2, 3)),
        ("last:1", (3,)),
        ("last:4", (0, 1, 2, 3)),
        ((0,), (0,)),
        ((-1, 0), (0, 3)),
        ((3, 1, 1, -1), (1, 3)),
        ((-4,), (0,)),
    ],
    ids=str,
)
def test_select_layers(layers: Any, expected: tuple[int, ...]) -> None:
    assert select_layers(layers, 4, "layers") == expected


@pytest.mark.parametrize("layers", ["first:5", "last:5", "last:999", (4,), (-5,), (0, 12)], ids=str)
def test_layers_beyond_the_backbone(layers: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        select_layers(layers, 4, "MGFCConfig.layers")
    assert "MGFCConfig.layers: expected " in str(caught.value) and "4 blocks" in str(caught.value)
    assert f"found {layers!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", (2, 4, 7)),
        ("first:1", (2,)),
        ("last:2", (4, 7)),
        ("last:9", (2, 4, 7)),
        ("first:9", (2, 4, 7)),
        ((-1, 2), (2, 7)),
    ],
    ids=str,
)
def test_a_stage_counts_among_the_calibrated_blocks_and_takes_all_if_they_are_few(
    layers: Any, expected: tuple[int, ...]
) -> None:
    assert select_layers(layers, 8, "layers", among=(2, 4, 7)) == expected


def test_a_stage_names_calibrated_blocks_only() -> None:
    with pytest.raises(ConfigError, match=r"expected calibrated blocks, that is, \(2, 4, 7\), found \(3,\)"):
        select_layers((3,), 8, "layers", among=(2, 4, 7))
