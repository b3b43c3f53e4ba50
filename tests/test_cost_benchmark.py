"""The benchmark of cost, on a tiny backbone."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
sys.path.append(str(BENCHMARKS))

import cost  # noqa: E402
import measures  # noqa: E402
from contenders import build_backbone, lora, merge  # noqa: E402
from cost_table import exponent  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

from mgfc.blocks import BlockHooks  # noqa: E402

TINY = ["--device", "cpu", "--models", "T", "--sizes", "28x42", "--repetitions", "3", "--budget", "1"]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "cost.jsonl"


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_measures_each_contender_of_each_case_once(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*TINY, "--contenders", "mgfc", "lora", "--json", str(results)]
    cost.main(command)
    first = records(results)
    assert [(r["case"]["figure"], r["contender"], r["status"]) for r in first] == [
        (figure, name, "ok") for figure in ("inference", "training") for name in ("mgfc", "lora")
    ]
    for record in first:
        low, middle, high = record["ratio"]
        assert 0 < low <= middle <= high
        assert len(record["added_ms"]) == len(record["ms"]) == len(record["bare_ms"]) == record["repetitions"] == 3
        for name in ("flops", "matrix_bytes", "operators", "peak_mib", "floor_ms"):
            assert record[name] > record[f"bare_{name}"] > 0, name
        assert record["parameters"] > 0
        assert record["machine"]["threads"] == 1

    cost.main(command)
    assert records(results) == first
    capsys.readouterr()
    cost.main(["--json", str(results), "--table"])
    table = capsys.readouterr().out
    assert "training step, ViT-T/14, 4 blocks, 28 x 42, batch 1, fp32, eager" in table
    assert "| LoRA, unmerged | " in table


def test_the_time_within_hooks_is_known_of_mgfc_alone(results: Path) -> None:
    sizes = ["--figures", "tokens", "--token-sizes", "28x28", "42x42", "70x70"]
    cost.main([*TINY, *sizes, "--contenders", "mgfc", "mgfc_fused", "lora", "--json", str(results)])
    for record in cost.read(results):
        assert ("hooks_ms" in record) == (record["contender"] != "lora")
        if "hooks_ms" in record:
            assert 0 < record["hooks_ms"][0] <= record["hooks_ms"][1]
    assert not hasattr(BlockHooks._leave, "__wrapped__"), "the clocks are taken away again"


def test_a_clock_counts_each_call_of_what_was_bound_within_it_and_no_other() -> None:
    class Bell:
        def ring(self, tone: str) -> str:
            return tone

    before = Bell().ring
    with measures.timed([(Bell, "ring")]) as spent:
        within = Bell().ring
        assert before("a") == "a" and not spent
    assert within("b") == Bell().ring("b") == "b" and len(spent) == 1
    assert within(tone="c") == "c" and len(spent) == 2


def test_merged_lora_is_the_bare_backbone_and_a_line_cut_off_is_none(results: Path) -> None:
    results.write_text('{"case": {"fig\n')
    cost.main([*TINY, "--figures", "inference", "--contenders", "lora_merged", "--json", str(results)])
    (record,) = cost.read(results)
    assert record["status"] == "ok"
    for name in ("flops", "operators", "peak_mib"):
        assert record[name] == record[f"bare_{name}"], name


def test_lora_adapts_every_linear_layer_of_the_blocks() -> None:
    vit = build_backbone("T", 2, "cpu")
    linears = sum(isinstance(module, torch.nn.Linear) for module in vit.encoder.modules())
    adapted = copy.deepcopy(vit)
    lora(adapted)
    assert sum(isinstance(module, BaseTunerLayer) for module in adapted.encoder.modules()) == linears == 2 * 6
    merge(adapted)
    assert str(adapted) == str(vit)


def test_what_this_version_lacks_is_not_available(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mgfc.attachment import Attachment

    for name in ("fuse", "fused"):
        monkeypatch.delattr(Attachment, name)
    for _ in range(2):
        cost.main([*TINY, "--figures", "inference", "--contenders", "mgfc_fused", "--json", str(results)])
    assert [record["status"] for record in records(results)] == ["not available"]


def test_sizes_off_the_patch_grid_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cost.main(["--sizes", "512x1024"])
    assert "504x1022" in capsys.readouterr().err


def test_growth() -> None:
    assert exponent([(n, 3 * n**1.5) for n in (256, 676, 1369)]) == pytest.approx(1.5)
    assert math.isnan(exponent([(256, 0.1), (676, -0.1), (1369, 1)]))


def test_counts_attention_on_a_cpu() -> None:
    q = torch.randn(1, 2, 16, 8)
    counts = measures.count(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert counts["flops"] == 2 * 2 * 2 * 16 * 16 * 8
