"""python -m domain_generalization run --method mgfc --source synth_town --seed 0"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from domain_generalization import pack, plan, tables
from domain_generalization.domains import SOURCES
from domain_generalization.methods import METHODS
from domain_generalization.suite import as_json, done, run, run_all, start_process
from domain_generalization.training import Places, Settings
from domain_generalization.variants import variants

ROOT = Path(__file__).parents[2]
WORK = ROOT / "runs" / "domain_generalization"  # git ignores it


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m domain_generalization", description="Train on one domain, test on others.")
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("pack", help="write what runs read: scenes at their size, corrupted copies, the backbone")
    write.add_argument("--data", type=Path, help="folder of data sets, looked into before the one of MGFC_DATA")
    write.add_argument("--backbone", type=Path, help="Transformers directory of DINOv2-S/14 (default: from the Hub)")
    write.add_argument("--quality", type=int, default=90, help="of the images' WebP")
    one = commands.add_parser("run", help="train a method once, or read what was trained, and score its variants")
    one.add_argument("--method", choices=METHODS, required=True)
    one.add_argument("--source", choices=SOURCES, required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--lr", type=float, help="of what the method trains (default: the best one of the suite `tuning`)")
    one.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="further arguments of the method")
    one.add_argument("--average", type=float, default=0.0, help="decay of a running average of the weights")
    for name in ("steps", "batch-size"):
        one.add_argument(f"--{name}", type=int)
    one.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"))
    one.add_argument("--file", default="runs.jsonl", help="in the folder of results of the scale")
    many = commands.add_parser("suite", help="all runs of a table that are missing")
    many.add_argument("name", choices=plan.SUITES)
    many.add_argument("--methods", nargs="+", choices=METHODS, default=list(plan.ORDER))
    many.add_argument("--seeds", type=int, nargs="+", default=plan.SEEDS)
    many.add_argument("--jobs", type=int, default=1, help="processes")
    show = commands.add_parser("table", help="print the tables of a scale")
    show.add_argument("--plot", type=Path, metavar="FILE", help="draw unseen mIoU against trained parameters, too")
    for command in (write, one, many, show):
        scales = [name for name in plan.SCALES if command is not show or name != "small"]
        command.add_argument("--scale", choices=scales, default="medium")
    for command in (write, many):
        command.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    for command in (write, one, many):
        splits = ("test", "development") if command is write else ("test", "development", "val")
        command.add_argument("--split", choices=splits, default="test", help="frames of the unseen domains")
        command.add_argument("--packed", type=Path, help="the folder that `pack` wrote (default: in runs/, by scale and split)")
    for command in (one, many, show):
        command.add_argument("--results", type=Path, default=plan.RESULTS)
    for command in (one, many):
        command.add_argument("--variants", nargs="+", metavar="NAME", help="what to score (default: all)")
        command.add_argument("--weights", type=Path, default=WORK / "weights", help="what was trained, kept for more variants")
        command.add_argument("--crops", type=Path, default=WORK / "crops", help="training crops, made once")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--threads", type=int, help="of a run on a CPU")
    args = parser.parse_args(arguments)
    if args.command != "table" and args.packed is None:
        args.packed = WORK / "packed" / f"{args.scale}-{'development' if args.split == 'development' else 'test'}"
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    scale = dict(plan.SCALES[args.scale])
    scale |= {name: getattr(args, name) for name in ("steps", "batch_size") if getattr(args, name)}
    scale |= {"crop": tuple(args.crop)} if args.crop else {}
    lr = plan.tuned_lr(args.results, args.method) if args.lr is None else args.lr
    values = {name: getattr(args, name) for name in ("method", "source", "seed", "split", "options", "average")}
    return Settings(lr=lr, **values, **scale)


def places_of(args: argparse.Namespace) -> Places:
    return Places(args.packed, args.weights, args.crops, torch.device(args.device))


def run_one(args: argparse.Namespace) -> None:
    start_process(args.threads)
    settings = settings_of(args)
    run(settings, args.variants or variants(settings.method), places_of(args), args.results / args.scale / args.file)


def run_suite(args: argparse.Namespace) -> None:
    file = args.results / args.scale / plan.FILES[args.name]

    def missing() -> list[tuple[Settings, tuple[str, ...]]]:
        before = done(file)
        runs = [(made, plan.wanted(args, made)) for made in plan.SUITES[args.name](args)]
        return [(made, names) for made, names in runs if not {(as_json(made), name) for name in names} <= before]

    while todo := missing():  # what the search tries next depends on what it has found
        print(f"{len(todo)} runs to do", flush=True)
        run_all(todo, places_of(args), file, args.jobs, args.threads)
    print("All runs are done")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    match args.command:
        case "pack":
            scale = plan.SCALES[args.scale]
            pack.write(args.packed, args.data, args.backbone, scale, args.split, args.sources, args.quality)
            print(f"{args.packed}: {pack.size_of(args.packed):.1f} MB")
        case "run":
            run_one(args)
        case "suite":
            run_suite(args)
        case "table":
            tables.show(args.results, args.scale, args.plot)


if __name__ == "__main__":
    main()
