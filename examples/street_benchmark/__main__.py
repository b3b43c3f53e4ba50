"""torchrun --nproc_per_node 4 -m street_benchmark run gta5 --method mgfc"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from data import find
from domain_generalization.report import read

from street_benchmark import cost, table
from street_benchmark.experiments import EXPERIMENTS, SIZES
from street_benchmark.settings import LR, Settings, published

ROOT = Path(__file__).parents[2]
WORK = ROOT / "runs" / "street_benchmark"  # git ignores it
RESULTS = Path(__file__).parent / "results.jsonl"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m street_benchmark", description="The field's benchmark, by its protocol.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, or read what was trained, and score what has no record")
    run.add_argument("experiment", choices=EXPERIMENTS)
    run.add_argument("--method", choices=LR, default="mgfc")
    run.add_argument("--head", choices=("mask2former", "small"))
    run.add_argument("--backbone", help="timm:NAME, or a Transformers name or directory (default: timm's DINOv2-L/14)")
    run.add_argument(
        "--sampling", choices=("uniform", "rare"), help="of scenes: all in turn (default), or rare classes more often"
    )
    run.add_argument("--seed", type=int)
    run.add_argument("--lr", type=float, help="of what the method trains in the backbone (default: by method)")
    run.add_argument("--head-lr", type=float)
    for name in ("steps", "batch-size", "crop", "patch", "observe"):
        run.add_argument(f"--{name}", type=positive)
    run.add_argument("--float32", dest="bf16", action="store_false", default=None, help="the backbone in float32, not bfloat16")
    run.add_argument("--sizes", choices=SIZES, default="full", help="of the images in scoring")
    run.add_argument("--data", type=Path, help="folder of data sets, looked into before the one of MGFC_DATA")
    run.add_argument("--out", type=Path, help="the run's folder (default: in runs/street_benchmark)")
    run.add_argument("--engine", choices=("ddp", "fsdp"), default="ddp", help="with several processes")
    run.add_argument("--checkpointing", action="store_true", help="less memory for a third more time")
    run.add_argument("--workers", type=int, default=4, help="processes that read images, for each process")
    run.add_argument("--save-every", type=positive, default=1000, help="steps between checkpoints")
    run.add_argument("--stop-at", type=positive, help="step to stop at; the same command without it goes on")
    show = commands.add_parser("table", help="print published figures and ours")
    for command in (run, show):
        command.add_argument("--results", type=Path, default=RESULTS)
    commands.add_parser("expect", help="print hours and memory to expect: computed, not measured")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def settings_of(args: argparse.Namespace) -> Settings:
    return published(**{field.name: getattr(args, field.name) for field in fields(Settings)})


def run(args: argparse.Namespace) -> None:
    """Trains and scores."""
    from street_benchmark.processes import processes
    from street_benchmark.scoring import score_all
    from street_benchmark.training import Running, trained

    settings = settings_of(args)
    experiment = EXPERIMENTS[settings.experiment]
    for place in (*experiment.sources, *experiment.targets.values()):
        find(place.partition(":")[0], args.data)  # what is missing is told before hours of training
    out = args.out or WORK / f"{settings.experiment}-{settings.method}-{settings.head}-{settings.seed}"
    with processes() as device:
        running = Running(out, args.data, device, args.engine, args.checkpointing, args.workers, args.save_every, args.stop_at)
        model = trained(settings, running)
        if model is not None:
            score_all(model, settings, running, args.sizes, args.results)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    match args.command:
        case "run":
            run(args)
        case "table":
            print(table.tables(read(args.results)))
        case "expect":
            print(cost.table())


if __name__ == "__main__":
    main()
