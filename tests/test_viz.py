"""`mgfc.viz`: what a record holds is what the model computes, and each figure shows what its record holds."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import randomise
from torch import Tensor, nn

from mgfc import CalibrationError, FeatureMaps, FineConfig, MGFCConfig, ReinConfig, get_calibration, viz, wrap_backbone
from mgfc.calibrators.statistics import SourceCalib
from mgfc.viz.pictures import palette, principal_colours

Figures = pytest.importorskip("matplotlib.figure")
EXAMPLES = Path(__file__).parents[1] / "examples"
FULL = MGFCConfig(rank=4, fine=FineConfig(layers="last:1"))
TITLES = {
    "coarse": ["image", "coarse: the image after calibration", "coarse: statistics of the channels"],
    "medium": [
        "medium: categories, blocks.2",
        "medium: how far patches moved, in % of their length",
        "medium: how far categories moved",
    ],
    "fine": ["image", "fine: detail let through, in %, blocks.2", "fine: detail added, in % of the token's length"],
    "features": ["features, without calibration", "features, with calibration"],
    "change": ["change per block, in % of the tokens' length"],
    "prediction": ["prediction, without calibration", "prediction, with calibration"],
}


def timm_vit(config: Any = FULL, in_chans: int = 3, **options: Any) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "reg_tokens": 2}
    vit = timm.create_model("vit_tiny_patch16_224", in_chans=in_chans, dynamic_img_size=True, **sizes, **options)
    wrap_backbone(vit, config)
    randomise(vit.calibration)
    return vit.eval()


def transformers_vit(config: Any = FULL) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    vit = wrap_backbone(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes)), config)
    randomise(vit.calibration)
    return vit.eval()


def predictor(vit: nn.Module, num_classes: int = 5) -> nn.Module:
    maps = FeatureMaps(vit, (2,))
    return nn.Sequential(maps, Last(), nn.Conv2d(maps.channels[0], num_classes, 1)).eval()


class Last(nn.Module):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[-1]


def one(vit: nn.Module, images: Tensor | None = None, predict: Any = None, **options: Any) -> viz.Record:
    images = torch.randn(1, 3, 40, 56) * 2 + 1 if images is None else images
    (found,) = viz.record(vit, images, predict, **options)
    return found


def titles(figure: Any) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def drawn(figure: Any) -> Iterator[np.ndarray]:
    """All numbers that a figure shows: pixels of pictures, ends of lines."""
    for axes in figure.axes:
        for picture in axes.images:
            yield np.asarray(picture.get_array())
        for line in axes.lines:
            yield np.asarray(line.get_xydata(), dtype=float)


class TestRecord:
    @pytest.mark.parametrize("make", [timm_vit, transformers_vit])
    def test_it_holds_what_the_model_computes(self, make: Callable[[], nn.Module]) -> None:
        vit = make()
        images, height = torch.randn(1, 3, 56, 112) * 2 + 1, 7 if make is timm_vit else 8
        found = one(vit, images, predictor(vit))
        grid = (height, 2 * height)
        calibration = get_calibration(vit)
        with torch.no_grad():
            (after,) = FeatureMaps(vit, (2,))(images)
            assert found.distance == calibration.distance().item() > 1
            with calibration.disabled():
                (bare,) = FeatureMaps(vit, (2,))(images)
        assert torch.equal(found.features[1], after[0].permute(1, 2, 0))
        assert found.features[0].shape == (*grid, 32) and not torch.equal(*found.features)
        assert found.learnt is not None and found.calibrated is not None and found.coarse is not None
        before = found.features[0]
        moved = (before - bare[0].permute(1, 2, 0)).norm(dim=-1) / bare[0].permute(1, 2, 0).norm(dim=-1)
        assert found.learnt[2] == pytest.approx(moved.mean().item(), rel=1e-5)
        assert found.blocks == tuple(calibration.block_names) and len(found.learnt) == len(found.calibrated) == 3
        assert found.coarse.before.square().mean().item() == pytest.approx(found.distance, rel=1e-5)
        assert found.coarse.after.abs().sum() < found.coarse.before.abs().sum()
        last = found.blocks[-1]
        assert list(found.medium) == list(found.blocks) and list(found.fine) == [last]
        categories = found.medium[last]
        assert categories.assignment.shape == (*grid, 16) and categories.shares.sum().item() == pytest.approx(1, rel=1e-5)
        assert categories.moved.shape == found.fine[last].added.shape == found.fine[last].share.shape == grid
        assert categories.moved.max() > 0 and found.fine[last].added.max() > 0
        assert found.num_classes == 5 and found.prediction is not None
        assert found.prediction[0].shape == images.shape[2:] and not torch.equal(*found.prediction)

    def test_before_is_without_statistics_and_with_what_was_learnt(self) -> None:
        vit, images = timm_vit(), torch.randn(1, 3, 40, 56) * 2 + 1
        found = one(vit, images)
        for stage in vit.calibration.modules():
            if isinstance(stage, SourceCalib):
                stage.strength = 0.0
        with torch.no_grad():
            (expected,) = FeatureMaps(vit, (2,))(images)
        assert torch.equal(found.features[0], expected[0].permute(1, 2, 0))
        still = one(vit, images)
        assert torch.equal(*still.features) and still.calibrated == (0.0, 0.0, 0.0) and still.coarse is not None
        assert torch.equal(still.picture, still.coarse.picture) and all(m.moved.max() == 0 for m in still.medium.values())

    def test_categories_near_the_prototypes_are_left_and_those_far_away_moved_towards_them(self) -> None:
        vit = timm_vit()
        for medium in one(vit).medium.values():
            far = medium.before > 1.01
            assert (medium.after[far & (medium.shares > 0.05)] < medium.before[far & (medium.shares > 0.05)]).all()
        layer, tokens = vit.calibration.layers["2"].medium, torch.randn(1, 12, 32)
        assignment = layer.assign(tokens)
        centroids = assignment.mT @ tokens / assignment.sum(dim=1).unsqueeze(-1)
        away = (layer.prototypes() - centroids).square()
        moments = layer.source.value
        variance = moments[:, 33:] / moments[:, :1] - layer.prototypes().square()
        assert torch.allclose(layer.deviations(tokens, assignment), (away / variance).mean(dim=-1).sqrt(), rtol=1e-3)

    def test_an_image_by_itself_gives_what_it_gives_among_others(self) -> None:
        vit, images = timm_vit(), torch.randn(3, 3, 32, 48)
        together = viz.record(vit, images)
        assert len(together) == 3
        assert torch.equal(together[1].features[1], one(vit, images[1:2]).features[1])

    @pytest.mark.parametrize("channels", [1, 2, 5])
    def test_any_number_of_channels(self, channels: int) -> None:
        images = torch.randn(1, channels, 32, 48)
        found = one(timm_vit(in_chans=channels), images)
        shown = images[0, :3] if channels > 2 else images[0, :1].expand(3, -1, -1)
        scaled = (shown - images.min()) / (images.max() - images.min())
        assert torch.allclose(found.picture, scaled.permute(1, 2, 0), atol=1e-5)
        plotted = viz.plot_coarse(found).axes[2].get_yticklabels()
        assert len(plotted) == 2 * channels and plotted[0].get_text() == "channel 0, mean"
        known = one(timm_vit(in_chans=channels), images, mean=[0.5] * channels, std=[0.2] * channels)
        assert torch.allclose(known.picture, (shown * 0.2 + 0.5).clamp(0, 1).permute(1, 2, 0), atol=1e-5)

    @pytest.mark.parametrize("name", ["windows", "units", "host", "half"])
    def test_other_layouts_hosts_and_precisions(self, name: str) -> None:
        config = MGFCConfig(rank=4, fine=FineConfig(layers="last:1"))
        sizes, dtype = (64, 96), torch.float32
        if name == "windows":
            small = {"embed_dim": 32, "depth": 3, "num_heads": 2, "window_size": 3, "global_attn_indexes": (2,)}
            model, grid, sizes = timm.create_model("samvit_base_patch16", img_size=64, **small), (4, 4), (64, 64)
        elif name == "units":
            small = {"embed_dim": 24, "stages": (1, 1, 2, 1), "num_heads": 1}
            model, grid = timm.create_model("hiera_tiny_224", img_size=(64, 96), **small), (2, 3)
        elif name == "half":
            small = {"embed_dim": 32, "depth": 3, "num_heads": 2}
            model, grid = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), **small).bfloat16(), (4, 6)
            dtype = torch.bfloat16
        else:
            transformers = pytest.importorskip("transformers")
            small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
            model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=small | {"image_size": 32, "patch_size": 8}))
            grid, sizes = (4, 4), (32, 32)
        wrap_backbone(model, config)
        calibration = get_calibration(model)
        randomise(calibration)
        found = one(model.eval(), torch.randn(1, 3, *sizes, dtype=dtype) + 1)
        last = found.blocks[-1]
        assert found.features[0].shape[:2] == found.medium[last].moved.shape == found.fine[last].added.shape == grid
        assert not torch.equal(*found.features) and all(item.isfinite().all() for item in found.features)
        assert found.features[1].dtype == torch.float32 and found.distance is not None and found.distance > 0
        assert f"medium: categories, {last}" in titles(viz.plot_overview(found))

    def test_an_image_is_shown_as_it_was(self) -> None:
        pixels = torch.rand(1, 3, 32, 48)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
        assert torch.allclose(one(timm_vit(), (pixels - mean) / std).picture, pixels[0].permute(1, 2, 0), atol=1e-6)

    @pytest.mark.parametrize(
        ("config", "learnt", "calibrated", "coarse", "medium"),
        [
            (MGFCConfig(rank=None), False, True, True, True),
            (MGFCConfig(rank=4, coarse=None), True, True, False, True),
            (MGFCConfig(rank=4, medium=None), True, True, True, False),
            (MGFCConfig(rank=4, coarse=None, medium=None), True, False, False, False),
            (ReinConfig(), True, False, False, False),
        ],
    )
    def test_what_an_adapter_lacks_is_not_there(
        self, config: Any, learnt: bool, calibrated: bool, coarse: bool, medium: bool
    ) -> None:
        found = one(timm_vit(config))
        assert found.baseline == ("without calibration" if calibrated else "bare backbone")
        there = found.learnt is not None, found.calibrated is not None, found.coarse is not None, bool(found.medium)
        assert there == (learnt, calibrated, coarse, medium) and not found.fine and (found.distance is not None) == coarse
        assert not torch.equal(*found.features)
        plotted = titles(viz.plot_overview(found))
        assert (TITLES["coarse"][1] in plotted) == coarse and (TITLES["medium"][2] in plotted) == medium
        curves = viz.plot_change(found).axes[0].get_legend().get_texts()
        assert len(curves) == learnt + calibrated
        for plot, has in ((viz.plot_coarse, coarse), (viz.plot_medium, medium), (viz.plot_fine, False)):
            if not has:
                with pytest.raises(CalibrationError, match=f"Expected a record of an adapter with a {plot.__name__[5:]} stage"):
                    plot(found)

    def test_fresh_calibrators_change_nothing_and_have_no_distance(self) -> None:
        vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=2, embed_dim=24, num_heads=2)
        found = one(wrap_backbone(vit, FULL), torch.randn(1, 3, 32, 48), predictor_of_nothing)
        assert torch.equal(*found.features) and found.distance is None and found.coarse is None and not found.medium
        assert found.learnt == found.calibrated == (0.0, 0.0)
        assert "distance" not in viz.plot_overview(found, "street.jpg").get_suptitle()

    def test_the_model_stays_as_it_is(self) -> None:
        vit = timm_vit()
        vit.train()
        vit.blocks[1].eval()

        def state() -> list[Any]:
            hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vit.modules()]
            strengths = [m.strength for m in vit.modules() if isinstance(m, SourceCalib)]
            return [hooks, strengths, [m.training for m in vit.modules()], torch.get_rng_state().tolist()]

        before, tensors = state(), {name: value.clone() for name, value in vit.state_dict().items()}
        one(vit, torch.ones(1, 3, 32, 48))
        with pytest.raises(ZeroDivisionError):
            one(vit, torch.ones(1, 3, 32, 48), lambda image: 1 / 0)
        assert state() == before
        assert all(torch.equal(value, tensors[name]) for name, value in vit.state_dict().items())

    @pytest.mark.parametrize(
        ("images", "options", "message"),
        [
            (torch.ones(3, 32, 32), {}, "expected finite images"),
            (torch.ones(1, 3, 32, 32) * torch.nan, {}, "expected finite images"),
            (torch.ones(0, 3, 32, 32), {}, "expected finite images"),
            (torch.ones(1, 3, 32, 32), {"mean": [0.0] * 3}, "Expected mean and std of 3 channels or neither"),
            (torch.ones(1, 3, 32, 32), {"mean": [0.0], "std": [1.0]}, "Expected mean and std of 3 channels or neither"),
            (torch.ones(1, 3, 32, 32), {"predict": lambda image: image[0]}, r"logits \(1, K, h, w\), found \(3, 32, 32\)"),
        ],
    )
    def test_what_cannot_be_measured(self, images: Tensor, options: dict[str, Any], message: str) -> None:
        with pytest.raises(CalibrationError, match=message):
            one(timm_vit(), images, **options)

    def test_calibrators_that_are_not_in_use(self) -> None:
        vit = timm_vit()
        with vit.calibration.disabled(), pytest.raises(CalibrationError, match="found them disabled"):
            one(vit)
        with vit.calibration.fused(), pytest.raises(CalibrationError, match="call unfuse"):
            one(vit)
        before = {name: value.clone() for name, value in vit.state_dict().items()}
        with pytest.raises(CalibrationError, match="found them observing"), vit.calibration.observing():
            one(vit)
        assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
        assert one(vit).distance is not None


def predictor_of_nothing(image: Tensor) -> Tensor:
    return image


class TestFigures:
    def test_under_autocast(self) -> None:
        vit = timm_vit()
        with torch.autocast("cpu", torch.bfloat16):
            found = one(vit, predict=predictor(vit))
            figure = viz.plot_overview(found)
        assert all(np.isfinite(values).all() for values in drawn(figure))

    @pytest.fixture
    def found(self) -> viz.Record:
        vit = timm_vit()
        return one(vit, predict=predictor(vit))

    @pytest.mark.parametrize("name", list(TITLES))
    def test_each_has_its_panels_and_finite_data(self, name: str, found: viz.Record, tmp_path: Path) -> None:
        figure = getattr(viz, f"plot_{name}")(found)
        assert isinstance(figure, Figures.Figure)
        assert [title for title in titles(figure) if not title.startswith("legend")] == TITLES[name]
        values = list(drawn(figure))
        assert values and all(np.isfinite(value).all() for value in values if value.size)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.savefig(tmp_path / "figure.png")

    def test_the_overview_has_them_all(self, found: viz.Record) -> None:
        figure = viz.plot_overview(found, "street.jpg")
        assert set(titles(figure)) >= {title for group in TITLES.values() for title in group}
        assert (
            figure.get_suptitle()
            == f"street.jpg\ndistance from the source: {found.distance:.1f} (the source's own: about 1 or less)"
        )

    def test_pictures_before_and_after_differ_as_the_record_does(self, found: viz.Record) -> None:
        for plot in (viz.plot_coarse, viz.plot_features, viz.plot_prediction):
            before, after = (axes.images[0].get_array() for axes in plot(found).axes[:2])
            assert before.shape == after.shape and not np.array_equal(before, after)
        same = replace(found, features=(found.features[0],) * 2, prediction=(found.prediction[0],) * 2)
        for plot in (viz.plot_features, viz.plot_prediction):
            before, after = (axes.images[0].get_array() for axes in plot(same).axes[:2])
            assert np.array_equal(before, after)

    def test_features_before_and_after_share_their_colours(self, found: viz.Record) -> None:
        longer = replace(found, features=(found.features[0], 2 * found.features[0]))
        before, after = (axes.images[0].get_array() for axes in viz.plot_features(longer).axes)
        assert not np.allclose(before, after, atol=0.05)

    def test_each_row_of_a_chart_leads_from_before_to_after(self, found: viz.Record) -> None:
        assert found.coarse is not None
        medium = found.medium["blocks.2"]
        order = [k for k in medium.shares.argsort(descending=True).tolist() if medium.shares[k] >= 0.005]
        for figure, before, after in (
            (viz.plot_coarse(found), found.coarse.before.flatten(), found.coarse.after.flatten()),
            (viz.plot_medium(found), medium.before[order], medium.after[order]),
        ):
            chart = figure.axes[2]
            ends = [list(line.get_xdata()) for line in chart.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 2]
            assert ends == [[start, stop] for start, stop in zip(before.tolist(), after.tolist(), strict=True)]
        learnt, calibrated = (list(line.get_ydata()) for line in viz.plot_change(found).axes[0].lines)
        assert learnt == [100 * v for v in found.learnt or ()] and calibrated == [100 * v for v in found.calibrated or ()]

    def test_a_block_can_be_chosen(self, found: viz.Record) -> None:
        assert titles(viz.plot_medium(found, "blocks.0"))[0] == "medium: categories, blocks.0"
        with pytest.raises(CalibrationError, match=r"Expected one of the blocks blocks\.2, found 'blocks\.0'"):
            viz.plot_fine(found, "blocks.0")

    def test_the_legend_names_the_classes_that_are_there(self, found: viz.Record) -> None:
        prediction = torch.zeros(8, 12, dtype=torch.long), torch.zeros(8, 12, dtype=torch.long)
        prediction[1][:2] = 3
        names = ["sky", "road", "tree", "car", "sign"]
        figure = viz.plot_prediction(replace(found, prediction=prediction, picture=torch.rand(8, 12, 3)), names)
        texts = [text.get_text() for text in figure.axes[2].texts]
        assert texts == ["before", "after", "sky", "100.0 %", "75.0 %", "car", "0.0 %", "25.0 %"]
        assert titles(figure)[2] == "legend; 25.0 % of the pixels changed class"
        colours = figure.axes[0].images[0].get_array(), figure.axes[1].images[0].get_array()
        assert np.array_equal(colours[0][4:], colours[1][4:]) and not np.array_equal(colours[0][:2], colours[1][:2])

    def test_names_and_colours_have_to_fit(self, found: viz.Record) -> None:
        with pytest.raises(CalibrationError, match=r"names of 5 classes and colours .* found 2 names"):
            viz.plot_prediction(found, ["sky", "road"])
        with pytest.raises(CalibrationError, match=r"colours \(4, 3\)"):
            viz.plot_overview(found, palette=torch.rand(4, 3))
        with pytest.raises(CalibrationError, match="Give `record` the argument `predict`"):
            viz.plot_prediction(replace(found, prediction=None))

    def test_many_classes_and_a_portrait(self, found: viz.Record) -> None:
        tall = torch.arange(40).repeat_interleave(12).view(40, 12)
        many = replace(found, prediction=(tall, tall), num_classes=40, picture=torch.rand(40, 12, 3))
        figure = viz.plot_prediction(many)
        assert figure.axes[2].texts[-1].get_text() == "and 24 more"
        assert figure.get_figheight() < 1.6 * figure.get_figwidth() / 3 + 1


class TestColours:
    def test_principal_components_share_a_basis_and_a_scale(self) -> None:
        first = torch.randn(4, 6, 8) * torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1, 0.1, 0.1, 0.1])
        here, there = principal_colours([first, first.flip(0)])
        assert torch.equal(here, there.flip(0)) and here.shape == (4, 6, 3) and 0 <= here.min() < here.max() <= 1
        for place in range(3):
            pair = torch.stack([here[..., place].flatten(), first[..., place].flatten()])
            assert torch.corrcoef(pair)[0, 1].abs() > 0.9
        assert principal_colours([torch.zeros(2, 2, 2)])[0].isfinite().all()

    def test_neighbours_in_the_palette_are_told_apart(self) -> None:
        colours = palette(16)
        assert all((a - b).norm() > 0.3 for a, b in pairwise(colours))
        assert torch.pdist(colours).min() > 0.08 and palette(0).shape == (0, 3)


class TestImports:
    def test_the_library_and_viz_load_without_matplotlib(self) -> None:
        code = "import sys, mgfc, mgfc.viz; assert 'matplotlib' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)
        code = "import sys, mgfc; assert 'mgfc.viz' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_without_matplotlib_the_plots_say_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = one(timm_vit())
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        for plot in (viz.plot_overview, viz.plot_coarse, viz.plot_change):
            with pytest.raises(ImportError, match=r'pip install "mgfc\[viz\]"'):
                plot(found)


@pytest.fixture(scope="module")
def score() -> Callable[[Any, str | None, int], float]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("albumentations")
    sys.path.append(str(EXAMPLES))
    from domain_generalization.corruptions import corrupt
    from streets import normalise

    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*same shape but other weights")  # the distance is of the image alone
        vit = wrap_backbone(transformers.Dinov2Model(config), EXAMPLES / "adapter").eval()

    @torch.no_grad()
    def run(image: Any, kind: str | None = None, strength: int = 0, seed: int = 0) -> float:
        pixels = normalise((image if kind is None else corrupt(image, kind, strength, seed)).resize((112, 84)))
        vit(pixels.unsqueeze(0))
        return vit.calibration.distance().item()

    return run


class TestDistance:
    """The score of an image as it comes from a wrapped model, on real and rendered images, with the committed adapter."""

    STRENGTHS = (1, 2)

    def test_each_scene_of_the_source_lies_nearer_than_itself_in_fog_or_at_night(self, score: Any) -> None:
        from streets import StreetScenes

        scenes = StreetScenes("synth_town", "val")
        clean = []
        for index in range(0, 100, 20):
            image = scenes[index][0]
            clean.append(score(image))
            for kind in ("fog", "night"):
                mild, strong = (score(image, kind, strength, index) for strength in self.STRENGTHS)
                assert clean[-1] < mild < strong, (index, kind)
        assert max(clean) < 2

    @pytest.mark.parametrize("source", ["examples", "camvid"])
    def test_photographs_lie_nearer_than_themselves_in_dense_fog_or_at_night(
        self, source: str, score: Any, request: pytest.FixtureRequest
    ) -> None:
        from mgfc.viz.files import read_image

        if source == "examples":
            paths = sorted((EXAMPLES / "images").glob("*.jpg"))
        else:
            root = request.getfixturevalue("shared")("data/camvid")
            names = (root / "splits" / "test_day.txt").read_text().split()[::30]
            paths = [next((root / "images").glob(f"{name}.*")) for name in names]
        assert len(paths) > 4
        for path in paths:
            image = read_image(path)
            assert score(image) < min(score(image, "fog", 2), score(image, "night", 2)), path.name
