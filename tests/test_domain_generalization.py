"""The benchmark's parts: peers against their equations, corruptions, splits, statistics, and runs that resume."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import same
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers")
pytest.importorskip("albumentations")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from domain_generalization import __main__ as command  # noqa: E402
from domain_generalization import crops, metrics, pack, plan, report, scenes, suite, tables, training, variants  # noqa: E402
from domain_generalization.alignment import ALPHA, BLOCKS, ClassConditionalHead, aligned_statistics  # noqa: E402
from domain_generalization.corruptions import corrupt  # noqa: E402
from domain_generalization.domains import KINDS, SOURCES, STRENGTHS, Target, chosen, spread, targets  # noqa: E402
from domain_generalization.inputs import CONTROLS, Clahe, MatchHistogram, Standardise  # noqa: E402
from domain_generalization.methods import METHODS  # noqa: E402
from domain_generalization.peers.haar import HaarTokens, haar, inverse_haar  # noqa: E402
from domain_generalization.peers.rein import Rein  # noqa: E402
from domain_generalization.scoring import normalise, score  # noqa: E402
from domain_generalization.variants import AFTERWARDS, ALIGNMENTS  # noqa: E402
from streets import StreetScenes, TrainingCrops  # noqa: E402
from tiny import tiny_dinov2  # noqa: E402

from mgfc import Calibration  # noqa: E402


def tokens_of(vit: nn.Module, images: Tensor) -> Tensor:
    return vit(images, output_hidden_states=True).hidden_states[-1]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 42, 70)


class TestMethods:
    @pytest.mark.parametrize(
        "method",
        ["frozen", "full", "lora_attention", "lora_all", "dora_all", "adaptformer", "mgfc", "mgfc_patches", "mgfc_lora"],
    )
    def test_starts_as_the_bare_backbone(self, method: str, images: Tensor) -> None:
        vit = tiny_dinov2()
        bare = tokens_of(vit, images)
        METHODS[method](vit, **({"rank": 8} if "mgfc" in method else {}))
        torch.testing.assert_close(tokens_of(vit, images), bare, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_without_the_class_token_it_is_as_the_frozen_layer_leaves_it(self, images: Tensor) -> None:
        adapted: dict[str, Tensor] = {}
        for method in ("frozen", "mgfc", "mgfc_patches"):
            torch.manual_seed(0)
            vit = tiny_dinov2().eval()
            METHODS[method](vit, **({"rank": 8} if "mgfc" in method else {}))
            torch.manual_seed(1)
            for name, parameter in vit.named_parameters():
                if name.endswith("low_rank.up"):
                    parameter.normal_()
            layer = vit.encoder.layer[0].mlp.fc1
            layer.register_forward_hook(lambda *call, method=method: adapted.setdefault(method, call[-1]))
            vit(images)
        assert torch.equal(adapted["mgfc_patches"][:, :1], adapted["frozen"][:, :1])
        torch.testing.assert_close(adapted["mgfc_patches"][:, 1:], adapted["mgfc"][:, 1:])
        assert not torch.allclose(adapted["mgfc"][:, :1], adapted["frozen"][:, :1])

    def test_soma_moves_minor_components_and_keeps_the_function(self, images: Tensor) -> None:
        vit = tiny_dinov2()
        bare = tokens_of(vit, images)
        weight = vit.encoder.layer[0].mlp.fc1.weight.detach().clone()
        METHODS["soma"](vit, rank=4)
        torch.testing.assert_close(tokens_of(vit, images), bare, rtol=1e-4, atol=1e-4)
        layer = vit.encoder.layer[0].mlp.fc1
        minor = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        singular = torch.linalg.svdvals(weight)
        torch.testing.assert_close(torch.linalg.svdvals(minor)[:4], singular[-4:], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.linalg.svdvals(layer.base_layer.weight)[:-4], singular[:-4], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("method", METHODS)
    def test_all_that_it_trains_gets_a_gradient_and_nothing_else(self, method: str, images: Tensor) -> None:
        vit = tiny_dinov2()
        before = {name: p.detach().clone() for name, p in vit.named_parameters()}
        METHODS[method](vit, **({"rank": 8} if "mgfc" in method else {}))
        trained = {name for name, p in vit.named_parameters() if p.requires_grad}
        if method == "full":
            assert trained == set(before) - {"embeddings.mask_token"}
        elif method == "frozen":
            assert not trained
            return
        else:
            assert not trained & set(before)
        vit.train()
        for _ in range(3):  # what is behind a zero gate or matrix gets its gradient later
            tokens = tokens_of(vit, images)
            (tokens.float() ** 3).mean().backward()
            with torch.no_grad():
                for name, parameter in vit.named_parameters():
                    if parameter.grad is not None and name in trained:
                        parameter -= 0.1 * parameter.grad.sign()
        # The last block's class token and final norm do not reach the patches of its own output.
        unreached = {"layernorm.weight", "layernorm.bias"} if method == "full" else set()
        without = {name for name, p in vit.named_parameters() if name in trained and (p.grad is None or not p.grad.any())}
        assert without <= unreached, without

    def test_prompts_leave_no_tokens_behind_and_change_the_others(self, images: Tensor) -> None:
        vit = tiny_dinov2()
        bare = tokens_of(vit, images)
        METHODS["vpt_deep"](vit)
        prompted = tokens_of(vit, images)
        assert prompted.shape == bare.shape
        assert not torch.allclose(prompted, bare)


class TestRein:
    def test_is_its_equations(self) -> None:
        rein = Rein(depth=2, dim=12, num_tokens=5, rank=3)
        with torch.no_grad():
            rein.scale.fill_(0.7)
        patches = torch.randn(1, 6, 12)
        tokens = rein.a[1] @ rein.b[1]
        expected = []
        for patch in patches[0]:
            logits = torch.stack([patch @ token / math.sqrt(12) for token in tokens])
            weights = logits.softmax(0)
            drawn = sum(weights[k] * rein.token_to_feature(tokens[k]) for k in range(1, 5))
            expected.append(patch + 0.7 * rein.delta(patch + drawn))
        torch.testing.assert_close(rein(patches, 1)[0], torch.stack(expected))


class TestHaar:
    def test_inverse(self) -> None:
        maps = torch.randn(2, 3, 6, 10)
        torch.testing.assert_close(inverse_haar(haar(maps)), maps)

    def test_a_constant_is_in_the_low_band_alone_and_edges_in_their_own(self) -> None:
        assert not haar(torch.ones(1, 1, 4, 6))[1:].any()
        stripes = torch.tensor([1.0, -1.0]).repeat(3).expand(1, 1, 4, 6)
        low, horizontal, vertical, diagonal = haar(stripes)
        assert horizontal.any()
        assert not low.any()
        assert not vertical.any()
        assert not diagonal.any()
        assert haar(stripes.mT)[2].any()

    def test_patches_keep_their_places_on_an_odd_grid(self) -> None:
        module = HaarTokens(depth=1, dim=8)
        with torch.no_grad():
            module.scale.fill_(1)
        patches = torch.randn(1, 5 * 7, 8)
        changed = patches.clone().view(1, 5, 7, 8)
        changed[:, 4, 6] += 1
        with torch.no_grad():
            module.high.normalise = False
            delta = (module(changed.view(1, 35, 8), (5, 7), 0) - module(patches, (5, 7), 0)).view(5, 7, 8).abs().sum(-1)
        assert delta[4, 6] > 0
        assert not delta[:4, :6].any()


class TestCorruptions:
    photograph = Image.fromarray(
        np.uint8(127 + 80 * np.sin(np.linspace(0, 9, 120))[None, :, None] * np.cos(np.linspace(0, 7, 90))[:, None, None])
        + np.zeros((1, 1, 3), np.uint8)
    )

    @pytest.mark.parametrize("kind", KINDS)
    def test_seeded_and_stronger_by_strength(self, kind: str) -> None:
        clean = np.asarray(self.photograph, dtype=float)
        copies = [np.asarray(corrupt(self.photograph, kind, strength, seed=5), dtype=float) for strength in STRENGTHS]
        for strength, copy in zip(STRENGTHS, copies, strict=True):
            assert np.array_equal(copy, np.asarray(corrupt(self.photograph, kind, strength, seed=5)))
            assert copy.shape == clean.shape
        distances = [np.abs(copy - clean).mean() for copy in copies]
        assert 0 < distances[0] < distances[1] < distances[2], distances

    def test_another_seed_is_another_draw(self) -> None:
        first, second = (np.asarray(corrupt(self.photograph, "noise", 0, seed)) for seed in (1, 2))
        assert not np.array_equal(first, second)

    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match=r"Expected one of fog, night.*found 'hail'"):
            corrupt(self.photograph, "hail", 0, 0)


class TestDomains:
    def test_no_frame_is_in_two_roles(self, shared: Callable[[str], Path]) -> None:
        data = shared("data")
        for source in SOURCES.values():
            roles = [source.train, source.val, *source.development.values(), *source.test.values()]
            if source.in_domain != source.val:
                roles.append(source.in_domain)
            parts = [place.split(":") for place in roles]
            frames = [f"{dataset}/{frame}" for dataset, split in parts for frame in StreetScenes(data / dataset, split).names]
            assert len(frames) == len(set(frames))

    def test_spread(self) -> None:
        assert spread(10, 5) == [0, 2, 4, 6, 8]
        assert spread(3, 5) == [0, 1, 2]
        assert len(set(spread(577, 48))) == 48

    def test_each_unseen_set_comes_clean_and_in_every_corruption(self) -> None:
        found = targets(SOURCES["camvid_day"], "test")
        corrupted = {f"{name}, {kind}" for name in ("dusk", "cities") for kind in KINDS}
        assert set(found) == {"val", "in-domain", "dusk", "cities"} | corrupted
        assert found["cities, fog"] == Target("labelme_scenes:test", "fog")
        assert set(targets(SOURCES["camvid_day"], "val")) == {"val"}

    def test_corrupted_frames_are_a_quarter_and_take_the_strengths_in_turn(self) -> None:
        names = [str(i) for i in range(100)]
        assert len(chosen(names, Target("camvid:test_day"), 40)) == 40
        found = chosen(names, Target("camvid:test_day", "fog"), 40)
        assert [strength for _, strength in found] == [0, 1, 2] * 3
        assert len({name for name, _ in found}) == 9


TINY = {"steps": 4, "batch_size": 2, "crop": (28, 42), "size": (42, 56), "count": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random scenes under the names of the real splits; those of many cities are square."""
    root = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    places = {p for s in SOURCES.values() for p in (s.train, s.val, s.in_domain, *s.development.values(), *s.test.values())}
    for place in sorted(places):
        dataset, split = place.split(":")
        shape = (60, 60) if dataset == "labelme_scenes" else (60, 80)
        for folder in ("images", "labels", "splits"):
            (root / dataset / folder).mkdir(parents=True, exist_ok=True)
        names = [f"{split}{index}" for index in range(4)]
        (root / dataset / "splits" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            smooth = Image.fromarray(draw.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(shape[::-1])
            smooth.save(root / dataset / "images" / f"{name}.jpg")
            blocks = Image.fromarray(draw.choice([0, 1, 2, 3, 255], (6, 8)).astype(np.uint8))
            blocks.resize(shape[::-1], Image.Resampling.NEAREST).save(root / dataset / "labels" / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("backbone") / "tiny"
    tiny_dinov2(num_hidden_layers=12).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def packed(data: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "tiny"
    pack.write(folder, data, backbone, TINY, "test", list(SOURCES), quality=95)
    return folder


@pytest.fixture
def places(packed: Path, tmp_path: Path) -> training.Places:
    return training.Places(packed, tmp_path / "weights", tmp_path / "crops", torch.device("cpu"))


class TestPack:
    def test_images_are_those_of_the_data_at_the_size_and_labels_at_their_own(self, data: Path, packed: Path) -> None:
        found = scenes.read(packed, Target("camvid:test_dusk"), 42)
        names = ["test_dusk0", "test_dusk2"]
        assert found.images.shape == (2, 42, 56, 3)
        for name, image, label in zip(names, found.images, found.labels, strict=True):
            with Image.open(data / "camvid" / "images" / f"{name}.jpg") as original:
                expected = np.asarray(original.resize((56, 42), Image.Resampling.BILINEAR), dtype=float)
            assert np.abs(image - expected).mean() < 5
            assert np.array_equal(label, np.asarray(Image.open(data / "camvid" / "labels" / f"{name}.png")))

    def test_square_images_stay_square(self, packed: Path) -> None:
        found = scenes.read(packed, Target("labelme_scenes:test"), 42)
        assert found.images.shape == (2, 42, 42, 3)
        assert found.labels.shape == (2, 60, 60)

    def test_corrupted_images_have_the_labels_of_the_clean_ones(self, data: Path, packed: Path) -> None:
        found = scenes.read(packed, Target("camvid:test_dusk", "contrast"), 42)
        labels = [np.asarray(Image.open(data / "camvid" / "labels" / f"test_dusk{i}.png")) for i in spread(4, 3)]
        assert np.array_equal(found.labels, np.stack(labels))
        clean = scenes.read(packed, Target("camvid:test_dusk"), 42)
        assert found.images.std(axis=(1, 2)).mean() < 0.6 * clean.images.std(axis=(1, 2)).mean()

    def test_sets_to_train_on_are_whole_with_labels_at_the_size(self, packed: Path) -> None:
        found = scenes.read_training(packed, "synth_town:train", (42, 56))
        assert len(found) == 4
        assert found.labels.shape == (4, 42, 56)
        assert set(np.unique(found.labels)) <= {0, 1, 2, 3, 255}

    def test_the_backbone_is_the_given_one_in_half_precision(self, backbone: Path, packed: Path, images: Tensor) -> None:
        loaded, again = scenes.load_backbone(packed), scenes.load_backbone(packed)
        given = type(loaded).from_pretrained(backbone).eval()
        expected = {name: value.to(torch.bfloat16).float() for name, value in given.state_dict().items()}
        assert same(loaded.state_dict(), expected)
        torch.testing.assert_close(tokens_of(loaded.eval(), images), tokens_of(given, images), rtol=0.1, atol=0.1)
        loaded.requires_grad_(False)
        assert all(p.requires_grad for p in again.parameters())

    def test_all_or_nothing(self, data: Path, backbone: Path, packed: Path, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="is there already"):
            pack.write(packed, data, backbone, TINY, "test", list(SOURCES), quality=90)
        with pytest.raises(FileNotFoundError):
            pack.write(tmp_path / "out", tmp_path, backbone, TINY, "test", list(SOURCES), quality=90)
        assert not list(tmp_path.iterdir())
        with pytest.raises(SystemExit, match=r"No images in .*seq_0006R0.*pack"):
            scenes.read(packed, Target("camvid:seq_0006R0"), 42)


class TestCrops:
    stream = crops.Stream("synth_town", 3, steps=3, batch_size=2, crop=(28, 42), size=(42, 56))

    def test_kept_crops_are_those_of_the_stream_from_any_step_on(self, packed: Path, tmp_path: Path) -> None:
        pairs = scenes.read_training(packed, "synth_town:train", (42, 56)).pairs()
        expected = TrainingCrops(pairs, (28, 42), 3, 0, 6)
        found = list(crops.batches(self.stream, tmp_path, packed, 1, torch.device("cpu")))
        assert len(found) == 2
        for step, (images, labels) in enumerate(found, start=1):
            for place in range(2):
                image, label = expected[2 * step + place]
                torch.testing.assert_close(images[place], image)
                assert torch.equal(labels[place], label)

    def test_streams_too_large_to_keep_are_the_same(
        self, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = list(crops.batches(self.stream, tmp_path / "kept", packed, 1, torch.device("cpu")))
        monkeypatch.setattr(crops, "LARGEST", 0)
        made = list(crops.batches(self.stream, tmp_path / "made", packed, 1, torch.device("cpu")))
        assert not (tmp_path / "made").exists()
        for first, second in zip(kept, made, strict=True):
            torch.testing.assert_close(first, second)


def pictures(count: int, low: int, high: int) -> np.ndarray:
    return np.random.default_rng(low).integers(low, high, (count, 30, 40, 3), dtype=np.uint8)


class TestInputs:
    def test_standardised_images_have_the_mean_and_spread_of_the_source_s_images(self) -> None:
        source, (image,) = np.concatenate([pictures(1, 0, 100), pictures(1, 90, 250)]), pictures(1, 30, 60)
        found = Standardise(source)(image)
        np.testing.assert_allclose(found.mean(axis=(0, 1)), source.mean(axis=(1, 2)).mean(axis=0), atol=0.05)
        np.testing.assert_allclose(found.std(axis=(0, 1)), source.std(axis=(1, 2)).mean(axis=0), atol=0.05)

    def test_matched_histograms_have_the_quantiles_of_the_source(self) -> None:
        source, (image,) = pictures(3, 100, 200), pictures(1, 30, 250)
        found = MatchHistogram(source)(image)
        at = np.linspace(0.05, 0.95, 10)
        expected = np.mean([np.quantile(one, at, axis=(0, 1)) for one in source], axis=0)
        np.testing.assert_allclose(np.quantile(found, at, axis=(0, 1)), expected, atol=1.5)

    def test_clahe_stretches_a_flat_image(self) -> None:
        (image,) = pictures(1, 100, 120)
        found = Clahe()(image)
        assert found.shape == image.shape and found.dtype == np.uint8
        assert found.std() > 1.5 * image.std()


class TestMetrics:
    def test_iou_by_hand(self) -> None:
        confusion = metrics.Confusion(torch.device("cpu"))
        confusion.add(torch.tensor([[[0, 0, 1], [1, 2, 0]]]), torch.tensor([[[0, 1, 1], [1, 1, 255]]]))
        # Class 0: one of two; class 1: two of four. Class 2 is in no label.
        assert confusion.iou() == {"sky": 50.0, "building": 50.0}

    @pytest.mark.parametrize(("by", "expected"), [(0, 100), (3, 100), (4, 0)])
    def test_boundaries_may_be_three_pixels_off(self, by: int, expected: float) -> None:
        labels, found = (torch.zeros(1, 20, 40, dtype=torch.uint8) for _ in range(2))
        labels[:, :, 20:] = 3
        found[:, :, 20 + by :] = 3
        boundaries = metrics.Boundaries(torch.device("cpu"))
        boundaries.add(found, labels)
        assert boundaries.f_score() == pytest.approx(expected)

    def test_boundaries_of_another_class_or_beside_ignored_pixels_do_not_count(self) -> None:
        labels = torch.zeros(1, 20, 40, dtype=torch.uint8)
        labels[:, :, 20:] = 3
        other = torch.where(labels == 3, 5, labels)
        boundaries = metrics.Boundaries(torch.device("cpu"))
        boundaries.add(other, labels)
        assert boundaries.f_score() == pytest.approx(50)  # sky's is right, road's is not
        labels[:, :, 21:24] = 255
        boundaries = metrics.Boundaries(torch.device("cpu"))
        boundaries.add(other, labels)
        assert not boundaries.counts[..., : metrics.K].any()

    def test_scatter_by_hand(self) -> None:
        maps = torch.randn(2, 6, 3, 4)
        classes = torch.randint(0, 3, (2, 3, 4))
        classes[0, 0, 0] = metrics.K
        scatter = metrics.Scatter(6, torch.device("cpu"))
        for image in range(2):
            scatter.add(maps[image : image + 1], classes[image : image + 1])
        tokens = F.layer_norm(maps.permute(0, 2, 3, 1), (6,))[classes < metrics.K].double()
        kinds = classes[classes < metrics.K]
        means = torch.stack([tokens[kinds == k].mean(0) for k in range(3)])
        within = (tokens - means[kinds]).square().sum()
        between = (means[kinds] - tokens.mean(0)).square().sum()
        assert scatter.ratio() == pytest.approx((between / within).item(), rel=1e-5)

    def test_a_patch_has_the_class_of_most_of_its_pixels(self) -> None:
        labels = torch.full((1, 4, 6), 255, dtype=torch.uint8)
        labels[0, :, :2] = 1
        labels[0, :3, 1] = 2
        labels[0, 0, 2:4] = 3  # a quarter of the second patch, the rest without labels
        assert metrics.patch_classes(labels, (1, 3)).tolist() == [[[1, metrics.K, metrics.K]]]


class TestAlignment:
    def test_statistics_go_half_way_to_the_source_s_at_the_entrance_of_a_block(
        self, packed: Path, places: training.Places
    ) -> None:
        model = training.build(tiny_settings(method="vpt_deep", options={}), places).eval()
        source = scenes.read_training(packed, "synth_town:train", (42, 56))
        entered: list[Tensor] = []
        first = model[0].backbone.encoder.layer[BLOCKS[0]]
        hooks = len(first._forward_pre_hooks)
        first.register_forward_pre_hook(lambda _, args: entered.append(args[0][:, 1:13]))
        before: list[Tensor] = []
        previous = model[0].backbone.encoder.layer[BLOCKS[0] - 1]
        previous.register_forward_hook(lambda _, args, out: before.append(out[:, 1:]))
        pixels = torch.from_numpy(np.concatenate([source.images, 255 - source.images]))
        with aligned_statistics(model, source), torch.no_grad():
            entered.clear()
            before.clear()
            model(normalise(pixels))
        assert len(first._forward_pre_hooks) == hooks + 1
        (found,), (plain,) = entered, before
        assert plain.shape == found.shape == (8, 12, 32)
        for of in (lambda x: x.mean(1), lambda x: x.std(1, correction=0)):
            expected = ALPHA * of(plain[:4]).mean(0) + (1 - ALPHA) * of(plain)
            torch.testing.assert_close(of(found), expected, rtol=1e-3, atol=1e-3)

    def test_classes_go_half_way_to_the_source_s_and_unknown_ones_stay(self) -> None:
        class Recorder(nn.Module):
            def forward(self, maps: list[Tensor]) -> Tensor:
                self.last = maps[-1]
                return torch.eye(metrics.K)[[0, 0, 3, 3, 5, 5]].T.view(1, -1, 1, 6)

        means = torch.randn(metrics.K + 1, 4)
        held = torch.ones(metrics.K + 1, dtype=torch.bool)
        held[5] = False
        head = Recorder()
        tokens = torch.randn(1, 4, 1, 6)
        ClassConditionalHead(head, means, held)([tokens])
        moved = head.last - tokens
        for first, kind in ((0, 0), (2, 3)):
            expected = ALPHA * (means[kind] - tokens[0, :, 0, first : first + 2].mean(1))
            torch.testing.assert_close(moved[0, :, 0, first : first + 2], expected[:, None].expand(4, 2))
        assert not moved[..., 4:].any()


def tiny_settings(**changes: Any) -> training.Settings:
    values: dict[str, Any] = {"method": "mgfc", "source": "camvid_day", "seed": 0, "lr": 1e-3, "split": "test"}
    values |= TINY | {"options": {"rank": 8}}
    return training.Settings(**(values | changes))


class TestVariants:
    @pytest.mark.parametrize("name", ["as trained", *ALIGNMENTS])
    def test_each_image_is_by_itself(self, name: str, packed: Path, places: training.Places) -> None:
        images = normalise(torch.from_numpy(scenes.read_training(packed, "camvid:train_day", (42, 56)).images))
        with variant(name, tiny_settings(), places) as model, torch.inference_mode():
            torch.testing.assert_close(model(images)[2:3], model(images[2:3]), rtol=1e-3, atol=1e-4)

    def test_a_score_is_the_sum_over_all_batches(self, packed: Path, places: training.Places) -> None:
        model = training.build(tiny_settings(), places)
        five = [0, 1, 2, 3, 0]
        found = scenes.read_training(packed, "camvid:train_day", (42, 56))
        found = scenes.Scenes(found.images[five], found.labels[five])
        with torch.inference_mode():
            logits = F.interpolate(model.eval()(normalise(torch.from_numpy(found.images))), size=(42, 56), mode="bilinear")
        confusion = metrics.Confusion(torch.device("cpu"))
        confusion.add(logits.argmax(1), torch.from_numpy(found.labels))
        scored = score(model, found, lambda image: image)
        assert scored.iou == pytest.approx(confusion.iou(), abs=0.1)
        assert 0 < scored.boundary < 100 and scored.scatter > 0

    def test_ablations_change_the_calibration_alone(self, places: training.Places) -> None:
        settings = tiny_settings()
        pixels = normalise(torch.rand(1, 42, 56, 3) * 40)
        with variant("as trained", settings, places) as plain, variant("without coarse", settings, places) as without:
            config = without[0].backbone.calibration.config
            assert config.coarse is None and config.medium is not None
            assert same(training.trained_parameters(plain), training.trained_parameters(without))
            with torch.inference_mode():
                assert not same(plain(pixels), without(pixels))

    def test_what_was_not_trained_cannot_be_restored(self, places: training.Places) -> None:
        with pytest.raises(ValueError, match=r"Not trained: 0\.backbone\.calibration"):
            variants.plain_model(tiny_settings(), training.Trained({}, {}), places)

    @pytest.mark.skipif(not hasattr(Calibration, "observing"), reason="until mgfc has it")
    @pytest.mark.parametrize("method", ["frozen", "full", "lora_all", "rein", "vpt_deep", "mgfc"])
    def test_calibration_after_training_fills_statistics_and_leaves_what_was_trained(
        self, method: str, places: training.Places
    ) -> None:
        settings = tiny_settings(method=method, options={})
        pixels = normalise(torch.rand(1, 42, 56, 3) * 40)
        trained = training.trained_or_train(settings, places)
        with variant(variants.AFTERWARDS, settings, places) as model, torch.inference_mode():
            calibration = model[0].backbone.calibration
            assert calibration.num_batches == 1  # four images of the source at once
            assert not model.training
            state = model.state_dict()
            for name in training.trained_parameters(training.build(settings, places)):
                torch.testing.assert_close(state[name], trained.state[name])
            calibrated = model(pixels)
            with calibration.disabled():
                assert not same(model(pixels), calibrated)


@contextmanager
def variant(name: str, settings: training.Settings, places: training.Places) -> Iterator[nn.Module]:
    trained = training.trained_or_train(settings, places)
    plain = variants.plain_model(settings, trained, places)
    with variants.model_of(name, plain, settings, trained, places) as model:
        yield model


def record(seed: int, **changes: Any) -> report.Record:
    """Day 40 and fog 20, 30 by dusk: on average 25; a thin class by day alone."""
    miou = {"val": 50.0, "day": 40.0, "dusk": 30.0, "day, fog": 20.0, "dusk, fog": 30.0, "day, noise": 10.0} | changes
    iou = {name: {"sky": value, "pole": value / 2} if "day" in name else {"sky": value} for name, value in miou.items()}
    return {"settings": {"seed": seed}, "miou": miou, "iou": iou, "boundary": miou}


class TestReport:
    def test_means_weigh_sets_and_corruptions_alike(self) -> None:
        one = record(0)
        names = ("clean", "corrupted", "unseen", "in-domain", "fog", "dusk, fog", "boundary")
        unseen = (40 + 30 + 25 + 10) / 4
        assert [report.score(one, of) for of in names] == [35, 17.5, unseen, 50, 25, 30, unseen]

    def test_thin_classes_count_where_there_are_any(self) -> None:
        assert report.score(record(0), "thin") == (20 + 10 + 5) / 3

    def test_paired_interval(self) -> None:
        # Differences 1, 2, 3: mean 2, sd 1, half width 4.303 / sqrt(3).
        found = report.difference({0: 11.0, 1: 22.0, 2: 33.0, 7: 0.0}, {0: 10.0, 1: 20.0, 2: 30.0})
        assert found.pairs == 3
        assert found.mean == pytest.approx(2)
        assert found.half_width == pytest.approx(2.4843, abs=1e-3)
        assert str(found) == "+2.00 [-0.48, +4.48]"

    def test_one_seed_has_no_interval(self) -> None:
        assert str(report.difference({0: 1.0}, {0: 2.0})) == "-1.00 (one seed)"


def full_record(method: str, seed: int, dusk: float, variant: str = "as trained", **changes: Any) -> report.Record:
    settings = training.Settings(
        method, "synth_town", seed, **({"lr": 1e-3, "split": "test"} | plan.SCALES["medium"] | changes)
    )
    iou = {name: {"sky": value, "pole": value} for name, value in (("val", 50.0), ("dusk", dusk), ("dusk, fog", dusk - 10))}
    miou = {name: values["sky"] for name, values in iou.items()}
    cost = {"parameters": 1000, "seconds_per_step": 0.5, "peak_memory_mib": 100.0, "machine": "CPU, 1 thread", "torch": "2"}
    cost |= {"seconds_per_image": 0.1, "control_seconds_per_image": 0.002}
    figures = {
        "calibration": {"medium": {"layers": "last:8"}} if variant == AFTERWARDS else None,
        "miou": miou,
        "boundary": miou,
        "scatter": miou,
        "iou": iou,
    }
    return json.loads(json.dumps({"settings": asdict(settings), "variant": variant, **cost, **figures}))


FORMER = {"calibration": {"medium": {"layers": "last:4"}}}
AGAIN = {"machine": "another one"}


class TestTables:
    @pytest.fixture
    def found(self, tmp_path: Path) -> dict[str, str]:
        seeds = range(3)
        runs = [full_record("rein", seed, 99.0, lr=1e-4) for seed in range(4)]  # of an earlier search
        runs += [full_record("mgfc", seed, 40.0 + 2 * seed, AFTERWARDS) | AGAIN for seed in seeds]
        runs += [full_record("mgfc", seed, 20.0) for seed in seeds]  # before its last step
        runs += [full_record("rein", seed, 39.0 + seed) for seed in seeds]
        runs += [full_record("rein", seed, 41.0 + seed, "CLAHE") for seed in seeds]
        runs += [full_record("rein", seed, 42.0 + seed, AFTERWARDS) | AGAIN for seed in seeds]
        runs += [full_record("haar", seed, 38.0 + seed, lr=1e-2) for seed in seeds]
        runs += [full_record("haar", seed, 37.0 + seed, "classes aligned", lr=1e-2) for seed in seeds]
        runs += [full_record("mgfc", seed, 38.0 + 2 * seed, "without coarse") for seed in seeds]
        runs += [full_record("mgfc", seed, 41.0 + seed, "without coarse and medium") for seed in seeds]
        for variant in ("as trained", AFTERWARDS):
            runs += [full_record("mgfc", seed, 37.0 + 2 * seed, variant, options={"fine": {}}) for seed in seeds]
            runs += [full_record("mgfc", 0, 99.0, variant, options={"rank": 8})]
            runs += [full_record("mgfc", 0, 99.0, variant, split="development")]
            runs += [full_record("mgfc", 5, 99.0, variant, **plan.SCALES["small"])]
            runs += [full_record("mgfc", 6, 99.0, variant, steps=150)]
        (tmp_path / "medium").mkdir()
        (tmp_path / "medium" / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
        former = [full_record("rein", seed, 45.0 + seed, AFTERWARDS) | FORMER for seed in seeds]
        former += [full_record("haar", seed, 43.0 + seed, AFTERWARDS, lr=1e-2) | FORMER for seed in seeds]
        former += [full_record("mgfc", seed, 44.0 + seed, AFTERWARDS) | FORMER for seed in seeds]
        (tmp_path / "medium" / tables.FOUR_BLOCKS).write_text("".join(json.dumps(run) + "\n" for run in former))
        repeated = [full_record("rein", seed, 40.0 + seed) | AGAIN for seed in seeds]
        repeated += [full_record("mgfc", seed, 40.0 + seed, "without coarse and medium") | AGAIN for seed in seeds]
        (tmp_path / "medium" / tables.REPEATED).write_text("".join(json.dumps(run) + "\n" for run in repeated))
        short = [full_record("rein", s, 0.0, steps=20, split="val") | {"seconds_per_step": 0.5 + s**2} for s in seeds]
        (tmp_path / "medium" / "cost.jsonl").write_text("".join(json.dumps(run) + "\n" for run in short))
        return tables.sections(tmp_path, "medium", min_seeds=3)

    def test_peers_are_ranked_and_paired_at_one_scale_and_on_test_frames(self, found: dict[str, str]) -> None:
        first, second, third = found["synth_town peers"].splitlines()[2:]
        assert first.startswith("| Haar-frequency tokens (FADA's idea) | 0.01 * | 3 |")
        assert second.startswith(
            "| Rein, low-rank tokens | 0.001 | 3 | 50.00 ± 0.00 | 40.00 ± 1.00 | 30.00 ± 1.00 | 35.00 ± 1.00 | 35.00 ± 1.00 |"
        )
        assert second.endswith("| +0.00 [+0.00, +0.00] | +2.00 [-0.48, +4.48] |")
        assert third.startswith("| **mgfc** | 0.001 | 3 | 50.00 ± 0.00 | 42.00 ± 2.00 |") and third.endswith("|  |  |")

    def test_controls_stand_beside_the_same_models_as_trained(self, found: dict[str, str]) -> None:
        header, _, _, rein, _ = found["synth_town controls"].splitlines()
        assert header == "| unseen mIoU | as trained | CLAHE | classes aligned | calibrated after training |"
        assert rein == "| Rein, low-rank tokens | 35.00 ± 1.00 | 37.00 ± 1.00 |  |  |", "the last one is of another training"

    def test_leads_are_over_the_best_peer_in_each_form(self, found: dict[str, str]) -> None:
        plain, controlled, aligned, calibrated = found["synth_town leads"].splitlines()[2:]
        assert calibrated.startswith(
            "| with mgfc's calibration on it | Rein, low-rank tokens, calibrated after training, medium on last:4 | "
            "41.00 ± 1.00 |"
        )
        assert "| -4.00 [-6.48, -1.52] |" in calibrated
        assert plain.startswith("| as trained | Rein, low-rank tokens, as trained | 35.00 ± 1.00 |")
        assert controlled.startswith("| with its best input control | Rein, low-rank tokens, CLAHE | 37.00 ± 1.00 |")
        assert "| +0.00 [-2.48, +2.48] |" in controlled
        assert aligned.startswith(
            "| with its best test-time alignment | Haar-frequency tokens (FADA's idea), classes aligned |"
        )

    def test_ablations_of_evaluation_and_training_are_paired_with_the_default(self, found: dict[str, str]) -> None:
        rows = found["synth_town ablations"].splitlines()[2:]
        names = ["| default", "| without coarse", "| without coarse and medium", "| with the fine stage"]
        assert [row.split(" | ")[0] for row in rows] == names
        assert "| -2.00 [-2.00, -2.00] |" in rows[1]
        assert "| -3.00 [-3.00, -3.00] |" in rows[3]

    def test_gains_are_of_the_same_training_with_each_default(self, found: dict[str, str]) -> None:
        assert [row.split(" | ")[:4] for row in found["synth_town gains"].splitlines()[2:]] == [
            ["| Rein, low-rank tokens", "last:4", "35.00 ± 1.00", "41.00 ± 1.00"],
            ["| Rein, low-rank tokens", "last:8", "36.00 ± 1.00", "38.00 ± 1.00"],
            ["| Haar-frequency tokens (FADA's idea)", "last:4", "34.00 ± 1.00", "39.00 ± 1.00"],
            ["| **mgfc**", "last:4", "37.00 ± 1.00", "40.00 ± 1.00"],
            ["| **mgfc**", "last:8", "36.00 ± 1.00", "37.00 ± 2.00"],
        ]
        assert "| +6.00 [+6.00, +6.00] |" in found["gains"] and "| +2.00 [+2.00, +2.00] |" in found["gains"]

    def test_one_machine_needs_one_file(self, tmp_path: Path) -> None:
        runs = [full_record("rein", seed, 39.0 + seed, variant) for seed in range(3) for variant in ("as trained", AFTERWARDS)]
        (tmp_path / "medium").mkdir()
        (tmp_path / "medium" / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
        found = tables.sections(tmp_path, "medium", min_seeds=3)
        (rein,) = found["synth_town gains"].splitlines()[2:]
        assert rein.startswith("| Rein, low-rank tokens | last:8 | 35.00 ± 1.00 | 35.00 ± 1.00 |")
        assert "35.00 ± 1.00 | 35.00 ± 1.00" in found["synth_town controls"]
        assert "four blocks" not in " ".join(found)

    def test_targets_and_classes(self, found: dict[str, str]) -> None:
        assert found["synth_town targets"].splitlines()[0] == "| method | in-domain | dusk | fog |"
        assert "| **mgfc** | 50.0 | 42.0 | 32.0 |" in found["synth_town targets"]
        assert "| **mgfc** | 42.0 | 42.0 |" in found["synth_town classes"]

    def test_summary_and_protocol(self, found: dict[str, str]) -> None:
        assert "| Rein, low-rank tokens | 1,000 | 35.00 ± 1.00 | +2.00 [-0.48, +4.48] | 37.00 ± 1.00 |" in found["summary"]
        assert found["protocol"].startswith("300 steps of 4 crops of 196 x 266 from images of 280 x 378; 40 images")

    def test_cost_is_the_median_of_runs_of_its_own(self, found: dict[str, str]) -> None:
        assert found["cost"].splitlines()[2].startswith("| Rein, low-rank tokens | 1,000 | 1.50 | 100 | 100.0 |")

    def test_no_runs(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"No runs at the scale 'medium' .* run the suite `peers` first"):
            tables.sections(tmp_path, "medium")

    def test_the_plot_is_the_same_for_the_same_results(self, found: dict[str, str], tmp_path: Path) -> None:
        drawn = [tmp_path / "first.svg", tmp_path / "second.svg"]
        for path in drawn:
            tables.show(tmp_path, "medium", path)
        assert drawn[0].read_bytes() == drawn[1].read_bytes()


class TestSearch:
    def test_goes_on_until_the_best_has_neighbours_and_repeats_the_best_two(self) -> None:
        scores = {1e-4: 1.0, 3e-4: 2.0, 1e-3: 4.0, 3e-3: 5.0, 1e-2: 3.0}
        found: plan.Found = {100: {}, 101: {}}
        rounds = []
        while trials := plan.next_trials("mgfc", found):
            rounds.append(trials)
            for lr, seed in trials:
                found[seed][lr] = scores[lr]
        assert rounds == [
            [(3e-4, 100), (1e-3, 100), (3e-3, 100)],
            [(1e-2, 100)],
            [(1e-3, 101), (3e-3, 101)],
        ]

    def test_goes_down_as_well(self) -> None:
        assert plan.next_trials("full", {100: {1e-5: 3.0, 3e-5: 2.0, 1e-4: 1.0}, 101: {}}) == [(3e-6, 100)]

    def test_the_mean_over_seeds_decides_and_an_unfinished_search_nothing(self, tmp_path: Path) -> None:
        values = {(3e-3, 100): 1, (1e-2, 100): 4, (3e-2, 100): 3, (1e-2, 101): 1, (3e-2, 101): 3}
        (tmp_path / "medium").mkdir()
        with (tmp_path / "medium" / "tuning.jsonl").open("w") as file:
            for (lr, seed), value in values.items():
                if seed == 101 and lr == 3e-2:
                    with pytest.raises(SystemExit, match="run the suite `tuning` first"):
                        plan.tuned_lr(tmp_path, "rein")
                made = {"method": "rein", "lr": lr, "seed": seed}
                file.write(json.dumps({"settings": made, "miou": {"val": value}}) + "\n")
                file.flush()
        assert plan.tuned_lr(tmp_path, "rein") == 3e-2


class TestRuns:
    def test_resumes_where_it_was(self, places: training.Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings, checkpoint = tiny_settings(average=0.5), tmp_path / "run.checkpoint"
        whole = training.build(settings, places)
        training.train(whole, settings, places, tmp_path / "never")

        class PowerCutError(Exception):
            pass

        calls = 0
        cross_entropy = F.cross_entropy

        def fail(*args: Any, **options: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise PowerCutError
            return cross_entropy(*args, **options)

        interrupted = training.build(settings, places)
        monkeypatch.setattr(F, "cross_entropy", fail)
        monkeypatch.setattr(training, "SAVE_EVERY", 0)
        with pytest.raises(PowerCutError):
            training.train(interrupted, settings, places, checkpoint)
        monkeypatch.setattr(F, "cross_entropy", cross_entropy)
        resumed = training.build(settings, places)
        training.train(resumed, settings, places, checkpoint)
        assert same(resumed.state_dict(), whole.state_dict())

    @pytest.mark.parametrize("method", ["full", "dora_all", "soma", "vpt_deep", "mgfc"])
    def test_kept_weights_are_the_trained_model(
        self, method: str, places: training.Places, monkeypatch: pytest.MonkeyPatch, images: Tensor
    ) -> None:
        settings = tiny_settings(method=method, options={})
        models = []
        train = training.train
        monkeypatch.setattr(training, "train", lambda model, *rest: (models.append(model), train(model, *rest))[1])
        trained = training.trained_or_train(settings, places)
        again = training.trained_or_train(tiny_settings(method=method, options={}, split="development", count=1), places)
        assert same(trained.state, again.state)
        (model,) = models  # trained once
        restored = training.restored(training.build(settings, places), trained)
        with torch.no_grad():
            torch.testing.assert_close(restored.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-4)

    def test_heads_start_alike_whatever_the_method(self, places: training.Places) -> None:
        models = [training.build(tiny_settings(method=method, options={}), places) for method in ("frozen", "rein", "haar")]
        assert same(models[0][1].state_dict(), models[1][1].state_dict())
        assert same(models[0][1].state_dict(), models[2][1].state_dict())

    def test_command_trains_once_and_scores_what_has_no_record(
        self, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(plan.SCALES, "medium", TINY)
        words = "run --method mgfc --source synth_town --seed 3 --lr 1e-3 --device cpu"
        words += f" --packed {packed} --results {tmp_path} --weights {tmp_path / 'weights'} --crops {tmp_path / 'crops'}"
        command.main([*words.split(), "--variants", "as trained", "CLAHE"])
        monkeypatch.setattr(training, "train", None)
        command.main(words.split())
        command.main(words.split())
        found = report.read(tmp_path / "medium" / "runs.jsonl")
        assert [line["variant"] for line in found][:2] == ["as trained", "CLAHE"]
        assert sorted(line["variant"] for line in found) == sorted(variants.variants("mgfc"))
        for line in found:
            assert (
                set(line["miou"])
                == set(line["boundary"])
                == set(line["scatter"])
                == set(targets(SOURCES["synth_town"], "test"))
            )
            assert line["settings"]["lr"] == 1e-3
            assert line["parameters"] > 0 and line["seconds_per_step"] > 0 and line["seconds_per_image"] > 0
            assert (line["control_seconds_per_image"] > 0) == (line["variant"] in CONTROLS)

    def test_suite_does_what_is_missing_and_the_table_shows_it(
        self, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(plan.SCALES, "medium", TINY | {"steps": 2, "batch_size": 1})
        monkeypatch.setattr(plan, "LADDER", plan.STARTS["rein"])
        words = f"--packed {packed} --results {tmp_path} --weights {tmp_path / 'weights'} --crops {tmp_path / 'crops'}"
        rest = ["--device", "cpu", *words.split()]
        with pytest.raises(SystemExit, match=r"No learning rate for rein.*run the suite `tuning` first"):
            command.main(["suite", "peers", "--methods", "rein", *rest])
        command.main(["suite", "tuning", "--methods", "rein", "haar", *rest])
        tuning = report.read(tmp_path / "medium" / "tuning.jsonl")
        assert {run["settings"]["method"] for run in tuning} == {"rein"}
        first, second = ([r["settings"]["lr"] for r in tuning if r["settings"]["seed"] == s] for s in plan.TUNING_SEEDS)
        assert first == list(plan.STARTS["rein"]) and len(second) == 2
        assert all(run["settings"]["split"] == "val" and set(run["miou"]) == {"val"} for run in tuning)
        found = [(run["miou"]["val"], run["settings"]["lr"]) for run in tuning]
        best = max(second, key=lambda lr: sum(value for value, tried in found if tried == lr))
        for _ in range(2):
            command.main(["suite", "peers", "--methods", "frozen", "rein", "--seeds", "0", *rest])
        runs = report.read(tmp_path / "medium" / "runs.jsonl")
        made = [(run["settings"]["method"], run["settings"]["source"], run["variant"]) for run in runs]
        of_frozen = [variant for method, source, variant in made if (method, source) == ("frozen", "synth_town")]
        assert of_frozen == ["as trained", "input standardised", AFTERWARDS]  # it is none of those
        assert len(made) == len(set(made)) == 2 * (len(variants.variants("rein")) + len(of_frozen))
        assert made[0][0] == "rein"  # one of those that matter most
        assert {run["settings"]["lr"] for run in runs if run["settings"]["method"] == "rein"} == {best}
        capsys.readouterr()
        command.main(["table", "--results", str(tmp_path)])
        printed = capsys.readouterr().out
        assert "Rein, low-rank tokens | " in printed
        assert "head on the frozen backbone | 0 |" in printed

    def test_processes_share_crops_and_a_failed_run_is_named(
        self, places: training.Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'examples'}")
        good = tiny_settings(method="frozen", options={}, split="val")
        bad = tiny_settings(method="mgfc", options={"rank": 999}, split="val")
        file = tmp_path / "runs.jsonl"
        todo = [(bad, ("as trained",)), (good, ("as trained",))]
        with pytest.raises(SystemExit, match=r"1 runs failed, the first one: .*\"rank\": 999.*ConfigError"):
            suite.run_all(todo, places, file, jobs=2, threads=1)
        (line,) = report.read(file)
        assert line["settings"]["method"] == "frozen"
        assert len(list(places.crops.iterdir())) == 1

    def test_the_order_of_a_table_is_by_what_matters_most(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan, "tuned_lr", lambda *_: 1e-3)
        args = command.parse_arguments(["suite", "peers", "--results", str(tmp_path)])
        made = list(plan.peers(args))
        assert len(made) == 11 * 3 * 2
        assert {run.method for run in made[:30]} == set(plan.FIRST)
        assert [(run.seed, run.source) for run in made[:6]] == [(0, "synth_town")] * 5 + [(0, "camvid_day")]
