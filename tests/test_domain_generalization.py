"""The benchmark's parts: peers against their equations, corruptions, splits, statistics, and runs that resume."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
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
from domain_generalization import plan, report, tables, training  # noqa: E402
from domain_generalization.corruptions import KINDS, STRENGTHS, corrupt  # noqa: E402
from domain_generalization.domains import SOURCES, Target, open_split, spread, targets  # noqa: E402
from domain_generalization.methods import METHODS  # noqa: E402
from domain_generalization.peers.haar import HaarTokens, haar, inverse_haar  # noqa: E402
from domain_generalization.peers.rein import Rein  # noqa: E402
from tiny import tiny_dinov2  # noqa: E402


def tokens_of(vit: nn.Module, images: Tensor) -> Tensor:
    return vit(images, output_hidden_states=True).hidden_states[-1]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 42, 70)


class TestMethods:
    @pytest.mark.parametrize(
        "method", ["frozen", "full", "lora_attention", "lora_all", "dora_all", "adaptformer", "mgfc", "mgfc_lora"]
    )
    def test_starts_as_the_bare_backbone(self, method: str, images: Tensor) -> None:
        vit = tiny_dinov2()
        bare = tokens_of(vit, images)
        METHODS[method](vit, **({"rank": 8} if "mgfc" in method else {}))
        torch.testing.assert_close(tokens_of(vit, images), bare, rtol=1e-5, atol=1e-5)

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
    @pytest.mark.parametrize("name", SOURCES)
    def test_no_frame_is_in_two_roles(self, name: str, shared: Callable[[str], Path]) -> None:
        data, source = shared("data"), SOURCES[name]
        roles = [source.train, source.val, *source.development.values(), *source.test.values()]
        if source.in_domain != source.val:
            roles.append(source.in_domain)
        frames = [f"{place.split(':')[0]}/{frame}" for place in roles for frame in open_split(data, place).names]
        assert len(frames) == len(set(frames))

    def test_spread(self) -> None:
        assert spread(10, 5) == [0, 2, 4, 6, 8]
        assert spread(3, 5) == [0, 1, 2]
        assert spread(3, None) == [0, 1, 2]
        assert len(set(spread(577, 48))) == 48

    def test_corrupted_copies_come_in_all_strengths_with_the_labels_of_the_clean_image(
        self, shared: Callable[[str], Path]
    ) -> None:
        found = targets(shared("data"), SOURCES["synth_town"], "test", 24)
        assert set(found) == {"day", "dusk", *KINDS}
        clean = [np.asarray(label) for _, label in Target(found["noise"].scenes, found["noise"].count)]
        noisy = list(found["noise"])
        assert len(noisy) == 2 * 6
        assert all(np.array_equal(label, expected) for (_, label), expected in zip(noisy, clean, strict=True))


def record(seed: int, day: float, fog: float, val: float = 50.0) -> dict[str, Any]:
    return {"settings": {"seed": seed}, "miou": {"val": val, "day": day, "fog": fog}}


class TestReport:
    def test_means(self) -> None:
        one = record(0, 40, 20)
        assert [report.score(one, of) for of in ("unseen", "clean", "corrupted", "in-domain", "fog")] == [30, 40, 20, 50, 20]

    def test_paired_interval(self) -> None:
        # Differences 1, 2, 3: mean 2, sd 1, half width 4.303 / sqrt(3).
        found = report.difference({0: 11.0, 1: 22.0, 2: 33.0, 7: 0.0}, {0: 10.0, 1: 20.0, 2: 30.0})
        assert found.pairs == 3
        assert found.mean == pytest.approx(2)
        assert found.half_width == pytest.approx(2.4843, abs=1e-3)
        assert str(found) == "+2.00 [-0.48, +4.48]"

    def test_one_seed_has_no_interval(self) -> None:
        assert str(report.difference({0: 1.0}, {0: 2.0})) == "-1.00 (one seed)"


def full_record(
    method: str, seed: int, dusk: float, options: dict[str, Any] | None = None, height: int = 168, lr: float = 1e-3
) -> report.Record:
    settings = training.Settings(method, "synth_town", seed, lr, size=(height, 224), options=options or {})
    iou = {name: {"sky": value, "road": value} for name, value in (("val", 50.0), ("dusk", dusk), ("fog", dusk - 10))}
    return {
        "settings": asdict(settings),
        "parameters": 1000,
        "seconds_per_step": 0.5,
        "peak_memory_mib": 100.0,
        "machine": "CPU",
        "torch": "2",
        "miou": {name: values["sky"] for name, values in iou.items()},
        "iou": iou,
    }


class TestTables:
    @pytest.fixture
    def found(self, tmp_path: Path) -> dict[str, str]:
        runs = [full_record("rein", seed, 99.0, lr=1e-4) for seed in range(4)]  # of an earlier search
        runs += [full_record("mgfc", seed, 40.0 + 2 * seed) for seed in range(3)]
        runs += [full_record("rein", seed, 39.0 + seed) for seed in range(3)]
        runs += [full_record("mgfc", seed, 38.0 + 2 * seed, {"coarse": None}) for seed in range(3)]
        runs += [full_record("mgfc", 0, 99.0, {"rank": 8}), full_record("mgfc", 0, 99.0, height=336)]
        (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
        short = [full_record("rein", seed, 0.0) | {"seconds_per_step": 0.5 + seed**2} for seed in range(3)]
        (tmp_path / "cost.jsonl").write_text("".join(json.dumps(run) + "\n" for run in short))
        return tables.sections(tmp_path, (168, 224))

    def test_peers_are_ranked_and_paired(self, found: dict[str, str]) -> None:
        assert found["synth_town peers"].splitlines()[2:] == [
            "| Rein, low-rank tokens | 0.001 | 3 | 50.00 ± 0.00 | 40.00 ± 1.00 | 30.00 ± 1.00 | 35.00 ± 1.00 "
            "| +0.00 [+0.00, +0.00] | +2.00 [-0.48, +4.48] |",
            "| **mgfc** | 0.001 | 3 | 50.00 ± 0.00 | 42.00 ± 2.00 | 32.00 ± 2.00 | 37.00 ± 2.00 |  |  |",
        ]
        assert "| **mgfc** | 42.0 | 42.0 |" in found["synth_town classes"]

    def test_cost_is_the_median_of_runs_of_its_own(self, found: dict[str, str]) -> None:
        assert found["cost"].splitlines()[2:] == ["| Rein, low-rank tokens | 1,000 | 1.50 | 100 |"]

    def test_ablations_are_paired_with_the_default(self, found: dict[str, str]) -> None:
        rows = found["synth_town ablations"].splitlines()[2:]
        assert [row.split(" | ")[0] for row in rows] == ["| default", "| without coarse"]
        assert rows[1].endswith("| +0.00 [+0.00, +0.00] | -2.00 [-2.00, -2.00] |")

    def test_no_runs(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"No runs of 168 x 224 images .* run the suite `peers` first"):
            tables.sections(tmp_path, (168, 224))

    def test_the_plot_is_the_same_for_the_same_results(self, found: dict[str, str], tmp_path: Path) -> None:
        drawn = [tmp_path / "first.svg", tmp_path / "second.svg"]
        for path in drawn:
            tables.show(tmp_path, (168, 224), path)
        assert drawn[0].read_bytes() == drawn[1].read_bytes()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random scenes under the names of the real splits."""
    draw = np.random.default_rng(0)
    places = {
        place for s in SOURCES.values() for place in (s.train, s.val, s.in_domain, *s.development.values(), *s.test.values())
    }
    for place in sorted(places):
        dataset, split = place.split(":")
        for folder in ("images", "labels", "splits"):
            (tmp_path / dataset / folder).mkdir(parents=True, exist_ok=True)
        names = [f"{split}{index}" for index in range(3)]
        (tmp_path / dataset / "splits" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            pixels = draw.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / dataset / "images" / f"{name}.jpg")
            labels = draw.choice([0, 1, 3, 255], (60, 80)).astype(np.uint8)
            Image.fromarray(labels).save(tmp_path / dataset / "labels" / f"{name}.png")
    return tmp_path


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("backbone") / "tiny"
    tiny_dinov2(num_hidden_layers=12).save_pretrained(directory)
    return directory


def tiny_settings(**changes: Any) -> training.Settings:
    values: dict[str, Any] = {"method": "mgfc", "source": "camvid_day", "seed": 0, "lr": 1e-3, "steps": 4, "batch_size": 2}
    values |= {"crop": (28, 42), "size": (42, 56), "count": 2, "options": {"rank": 8}}
    return training.Settings(**(values | changes))


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
            [(1e-4, 100), (3e-4, 100), (1e-3, 100)],
            [(3e-3, 100)],
            [(1e-2, 100)],
            [(1e-3, 101), (3e-3, 101)],
        ]

    def test_goes_down_as_well(self) -> None:
        assert plan.next_trials("full", {100: {1e-5: 3.0, 3e-5: 2.0, 1e-4: 1.0}, 101: {}}) == [(3e-6, 100)]

    def test_the_mean_over_seeds_decides_and_an_unfinished_search_nothing(self, tmp_path: Path) -> None:
        values = {(1e-4, 100): 1, (3e-4, 100): 4, (1e-3, 100): 3, (3e-4, 101): 1, (1e-3, 101): 3}
        with (tmp_path / "tuning.jsonl").open("w") as file:
            for (lr, seed), value in values.items():
                if seed == 101 and lr == 1e-3:
                    with pytest.raises(SystemExit, match="run the suite `tuning` first"):
                        plan.tuned_lr(tmp_path, "small", "rein")
                made = {"method": "rein", "size": [168, 224], "lr": lr, "seed": seed}
                file.write(json.dumps({"settings": made, "miou": {"val": value}}) + "\n")
                file.flush()
        assert plan.tuned_lr(tmp_path, "small", "rein") == 1e-3


class TestRuns:
    def test_resumes_where_it_was(self, data: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings, checkpoint = tiny_settings(average=0.5), tmp_path / "run.pt"
        whole = training.build(settings, backbone)
        training.train(whole, settings, data, tmp_path / "never.pt", save_every=math.inf)

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

        interrupted = training.build(settings, backbone)
        monkeypatch.setattr(F, "cross_entropy", fail)
        with pytest.raises(PowerCutError):
            training.train(interrupted, settings, data, checkpoint, save_every=0)
        monkeypatch.setattr(F, "cross_entropy", cross_entropy)
        resumed = training.build(settings, backbone)
        training.train(resumed, settings, data, checkpoint, save_every=math.inf)
        assert same(resumed.state_dict(), whole.state_dict())

    def test_heads_start_alike_whatever_the_method(self, backbone: Path) -> None:
        models = [training.build(tiny_settings(method=method, options={}), backbone) for method in ("frozen", "rein", "haar")]
        assert same(models[0][1].state_dict(), models[1][1].state_dict())
        assert same(models[0][1].state_dict(), models[2][1].state_dict())

    def test_command_writes_one_line_a_run_and_does_none_twice(
        self, data: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        results = tmp_path / "results" / "runs.jsonl"
        words = "run --method lora_attention --source synth_town --seed 3 --lr 1e-3 --steps 1 --batch-size 1 --count 3"
        words += f" --crop 28 42 --size 42 56 --data {data} --backbone {backbone} --results {results.parent}"
        arguments = words.split()
        command.main(arguments)
        command.main(arguments)
        assert "Done before" in capsys.readouterr().out
        (line,) = results.read_text().splitlines()
        found = json.loads(line)
        assert set(found["miou"]) == {"val", "day", "dusk", *KINDS}
        assert found["settings"]["lr"] == 1e-3
        assert found["parameters"] > 0
        assert found["seconds_per_step"] > 0
        assert not list(results.parent.glob(".*.pt"))

    def test_suite_does_what_is_missing_and_the_table_shows_it(
        self, data: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiny = {"steps": 2, "batch_size": 1, "crop": (28, 42), "size": (42, 56), "count": 1}
        monkeypatch.setitem(plan.SCALES, "small", tiny)
        monkeypatch.setattr(plan, "LADDER", plan.START)
        places = f"--data {data} --backbone {backbone} --results {tmp_path} --device cpu".split()
        monkeypatch.chdir(ROOT / "examples")
        with pytest.raises(SystemExit, match=r"No learning rate for rein.*run the suite `tuning` first"):
            command.main(["suite", "peers", "--methods", "rein", *places])
        command.main(["suite", "tuning", "--methods", "rein", *places])
        tuning = report.read(tmp_path / "tuning.jsonl")
        first, second = ([r["settings"]["lr"] for r in tuning if r["settings"]["seed"] == s] for s in plan.TUNING_SEEDS)
        assert first == list(plan.START) and len(second) == 2
        assert all(run["settings"]["split"] == "val" and set(run["miou"]) == {"val"} for run in tuning)
        found = [(run["miou"]["val"], run["settings"]["lr"]) for run in tuning]
        best = max(second, key=lambda lr: sum(value for value, tried in found if tried == lr))
        for _ in range(2):
            command.main(["suite", "peers", "--methods", "frozen", "rein", "--seeds", "0", "--jobs", "2", *places])
        runs = report.read(tmp_path / "runs.jsonl")
        assert sorted((run["settings"]["method"], run["settings"]["source"]) for run in runs) == [
            ("frozen", "camvid_day"),
            ("frozen", "synth_town"),
            ("rein", "camvid_day"),
            ("rein", "synth_town"),
        ]
        assert {run["settings"]["lr"] for run in runs if run["settings"]["method"] == "rein"} == {best}
        capsys.readouterr()
        command.main(["table", "--results", str(tmp_path)])
        printed = capsys.readouterr().out
        assert "Rein, low-rank tokens | " in printed
        assert "head on the frozen backbone | 0 |" in printed
