"""python -m domain_generalization run --method mgfc --source synth_town --seed 0"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from domain_generalization import plan, tables
from domain_generalization.domains import SOURCES
from domain_generalization.methods import METHODS
from domain_generalization.report import read
from domain_generalization.training import Settings, run

SHARED = Path(__file__).parents[3] / "shared"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m domain_generalization", description="Train on one domain, test on others.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train and score one method once; done runs are not done again")
    one.add_argument("--method", choices=METHODS, required=True)
    one.add_argument("--source", choices=SOURCES, required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--lr", type=float, help="of what the method trains (default: the best one of the suite `tuning`)")
    one.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="further arguments of the method")
    one.add_argument("--average", type=float, default=0.0, help="decay of a running average of the weights")
    one.add_argument("--split", choices=("test", "development", "val"), default="test")
    one.add_argument("--steps", type=int)
    one.add_argument("--batch-size", type=int)
    one.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"))
    one.add_argument("--size", type=int, nargs=2, metavar=("H", "W"))
    one.add_argument("--count", type=int, help="images in each set")
    one.add_argument("--file", default="runs.jsonl", help="in the folder of results")
    many = commands.add_parser("suite", help="all runs of a table, each in a process of its own")
    many.add_argument("name", choices=plan.SUITES)
    many.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    many.add_argument("--seeds", type=int, nargs="+", default=plan.SEEDS)
    many.add_argument("--jobs", type=int, default=1, help="runs at a time")
    show = commands.add_parser("table", help="print the tables")
    show.add_argument("--plot", type=Path, metavar="FILE", help="draw unseen mIoU against trained parameters, too")
    for command in (one, many, show):
        command.add_argument("--scale", choices=plan.SCALES, default="small")
        command.add_argument("--results", type=Path, default=plan.RESULTS)
    for command in (one, many):
        command.add_argument("--data", type=Path, default=SHARED / "data")
        command.add_argument("--backbone", type=Path, help="Transformers directory of DINOv2-S/14 (default: from the Hub)")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--threads", type=int, help="of a run on a CPU")
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> Settings:
    scale = {name: getattr(args, name) or value for name, value in plan.SCALES[args.scale].items()}
    lr = plan.tuned_lr(args.results, args.scale, args.method) if args.lr is None else args.lr
    values = {name: getattr(args, name) for name in ("method", "source", "seed", "split", "options", "average")}
    return Settings(lr=lr, **values, **{name: tuple(v) if isinstance(v, list) else v for name, v in scale.items()})


def as_json(settings: Settings) -> str:
    return json.dumps(asdict(settings), sort_keys=True)


def done(file: Path) -> set[str]:
    """The settings of the runs in a file."""
    return {json.dumps(record["settings"], sort_keys=True) for record in read(file)}


def run_one(settings: Settings, file: Path, args: argparse.Namespace) -> None:
    if as_json(settings) in done(file):
        print(f"Done before: {as_json(settings)}")
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    file.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = file.parent / f".{hashlib.sha256(as_json(settings).encode()).hexdigest()[:16]}.pt"
    record: dict[str, Any] = run(settings, args.data, args.backbone, args.device, checkpoint)
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")
    print(json.dumps({key: record[key] for key in ("parameters", "seconds_per_step", "peak_memory_mib", "miou")}))


def command_of(settings: Settings, file: str, args: argparse.Namespace) -> list[str]:
    """The command line that repeats a run."""
    words = [sys.executable, "-m", "domain_generalization", "run", "--scale", args.scale, "--file", file]
    for name, value in asdict(settings).items():
        if name == "options":
            words += ["--options", json.dumps(value)]
        elif value is not None:
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + name.replace("_", "-"), *map(str, values)]
    words += ["--results", str(args.results), "--data", str(args.data), "--device", args.device]
    words += ["--backbone", str(args.backbone)] if args.backbone else []
    return words + (["--threads", str(args.threads)] if args.threads else [])


def run_suite(args: argparse.Namespace) -> None:
    file = plan.FILES[args.name]

    def one(settings: Settings) -> int:
        return subprocess.run(command_of(settings, file, args), check=False).returncode

    def missing() -> list[Settings]:
        before = done(args.results / file)
        return [settings for settings in plan.SUITES[args.name](args) if as_json(settings) not in before]

    while todo := missing():  # what the search tries next depends on what it has found
        print(f"{len(todo)} runs to do")
        with ThreadPoolExecutor(args.jobs) as pool:
            failed = [settings for settings, code in zip(todo, pool.map(one, todo), strict=True) if code]
        if failed:
            raise SystemExit(f"{len(failed)} runs failed, the first one: {as_json(failed[0])}")
    print("All runs are done")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.command == "run":
        run_one(settings_of(args), args.results / args.file, args)
    elif args.command == "suite":
        run_suite(args)
    else:
        tables.show(args.results, plan.SCALES[args.scale]["size"], args.plot)


if __name__ == "__main__":
    main()
