"""What adapting a backbone costs in time and memory: mgfc, its parts and its peers, each beside the bare backbone.

    python examples/benchmarks/cost.py --device cpu --threads 1 --models S B --json out.jsonl
    python examples/benchmarks/cost.py --json out.jsonl --table

A DINOv2 of patch 14 with random weights, and images of noise: neither changes the cost. Each contender runs in
alternation with a bare copy of the frozen backbone on the same images; a record holds quartiles of both times and of
their ratio. What is in the file is not measured again. `--next` starts another set of options in the same process.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

import measures
from allocator import keep_memory
from bench import Bench, Case, compare
from contenders import CONTENDERS, MODELS, PATCH, NotAvailable
from cost_table import key, read, show

GROWTH = ("mgfc", "mgfc_fused", "lora", "adaptformer")
TOKEN_SIZES = ((224, 224), (364, 364), (518, 518), (742, 742))


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Where and with what a record was measured."""
    if args.device.type == "cuda":
        where: dict[str, Any] = {"device": torch.cuda.get_device_name(args.device), "tf32": False, "cudnn_benchmark": True}
    else:
        models = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
        where = {"device": models[0].split(": ")[1] if models else platform.machine(), "threads": torch.get_num_threads()}
        where["clock"] = args.clock
    return where | {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The cases that the options name, each once."""
    seen = set()
    for figure, model, size, batch, precision, mode in itertools.product(
        args.figures, args.models, args.sizes, args.batches, args.precisions, args.modes
    ):
        depth = MODELS[model][1]
        if figure == "training" and precision == "bf16":
            precision = "autocast"  # weights in half precision are no place to train
        sizes = args.token_sizes if figure == "tokens" else (size,)
        depths = (depth // 3, 2 * depth // 3, depth) if figure == "depth" else (depth,)
        kind = "training" if figure == "training" else "inference"
        for size_, depth_ in itertools.product(sizes, depths):
            case = Case(kind, model, depth_, size_, batch, precision, mode == "compiled")
            if (case, figure) not in seen:
                yield case
            seen.add((case, figure))


def contenders(args: argparse.Namespace, case: Case) -> Iterator[str]:
    """Who takes part in a case: in growth only some, unless they were named."""
    growth = not {"inference", "training"} & set(args.figures)
    names = args.contenders or (GROWTH if growth else tuple(CONTENDERS))
    return (name for name in names if case.figure in CONTENDERS[name].figures)


def attempt(case: Case, name: str, bare: list[Bench], args: argparse.Namespace) -> dict[str, Any] | None:
    """One contender's result, or why there is none; None if the time was up. `bare` is filled once for a case."""
    left = args.deadline - time.time() if args.deadline else 0.0
    allowed = min(value for value in (args.timeout, left, 1e6) if value)
    try:
        with measures.limit(allowed):
            if not bare:
                bare.append(Bench(case, "bare", args.device))
            return {"status": "ok", **compare(Bench(case, name, args.device), bare[0], args)}
    except NotAvailable as error:
        return {"status": "not available", "why": str(error)[:300]}
    except Exception as error:  # one that fails leaves the others their turn
        if isinstance(error, TimeoutError) and allowed == left:
            return None
        return {"status": "failed", "why": f"{type(error).__name__}: {error}"[:300]}
    finally:
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


def run(args: argparse.Namespace) -> None:
    """Measures what the file does not hold, and appends a line for each contender of each case."""
    where = machine(args)
    for case in cases(args):
        bare: list[Bench] = []
        if case.compiled:
            torch._dynamo.reset()
        for name in contenders(args, case):
            record = {"case": asdict(case), "contender": name, "machine": where}
            before = {key(old): old["status"] for old in read(args.json)}.get(key(record))
            if before == "ok" or (before == "failed" and not args.retry):
                continue
            if args.deadline and time.time() > args.deadline - args.reserve:
                print("The time is up.", flush=True)
                return
            result = attempt(case, name, bare, args)
            if result is None or result["status"] == before:
                continue
            with args.json.open("a") as file:
                file.write(json.dumps(record | result) + "\n")
            print(describe(case, name, result), flush=True)


def describe(case: Case, name: str, result: dict[str, Any]) -> str:
    """A line for whoever waits."""
    size = "x".join(map(str, case.size))
    mode = "compiled" if case.compiled else "eager"
    parts = f"{case.figure} {case.model}{case.depth} {size} b{case.batch} {case.precision} {mode}"
    head = f"{measures.elapsed():6.0f} s  {parts}"
    if result["status"] != "ok":
        return f"{head} {name}: {result['status']}: {result['why']}"
    return f"{head} {name}: {result['ms'][1]:g} ms = {result['ratio'][1]:.3f} x bare {result['ratio']}"


def parse_size(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    if height % PATCH or width % PATCH:
        raise argparse.ArgumentTypeError(f"expected multiples of {PATCH}, found {text}; for 512x1024 take 504x1022")
    return height, width


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("cost.jsonl"), help="file of results, one a line")
    parser.add_argument("--table", action="store_true", help="print the file as Markdown, and measure nothing")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--clock", choices=measures.CLOCKS, default="wall", help="of a CPU; cpu: beside others' work")
    parser.add_argument("--quick", action="store_true", help="few contenders on 252x448, in two minutes on a CPU")
    parser.add_argument(
        "--figures",
        nargs="+",
        choices=("inference", "training", "tokens", "depth"),
        default=["inference", "training"],
        help="the last two: inference at four sizes and at three depths",
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["S"])
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[(518, 518)], metavar="HxW", help="multiples of 14")
    parser.add_argument("--token-sizes", nargs="+", type=parse_size, default=list(TOKEN_SIZES), metavar="HxW")
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "autocast"), default=["fp32"])
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: all; in growth some")
    parser.add_argument("--repetitions", type=int, default=9, help="pairs at most")
    parser.add_argument("--budget", type=float, default=12.0, help="seconds of pairs, of which there are three at least")
    parser.add_argument("--warm-ups", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=0.0, help="seconds for one contender of a case, compiling included")
    parser.add_argument("--deadline", type=float, default=0.0, help="time of the clock, as of `date +%%s`, to end at")
    parser.add_argument("--reserve", type=float, default=3.0, help="seconds before the deadline in which nothing starts")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--gate", nargs=3, metavar=("FOLDER", "COUNT", "UNTIL"), help="wait for others before timing")
    args = parser.parse_args(arguments)
    if args.quick:
        args.sizes, args.repetitions, args.budget = [(252, 448)], 5, 4.0
        args.contenders = args.contenders or ["mgfc", "mgfc_fused", "lora", "rein", "adaptformer"]
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    groups = [list(part) for is_next, part in itertools.groupby(words, lambda word: word == "--next") if not is_next]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    for args in [parse_arguments(group) for group in groups or [[]]]:
        if args.table:
            print(show(read(args.json)))
            continue
        if args.device.type == "cpu":
            torch.set_num_threads(args.threads)
            measures.set_clock(args.clock)
            keep_memory()
        if "compiled" in args.modes:
            torch._dynamo.config.recompile_limit = 64  # contenders share code
            torch._dynamo.config.skip_nnmodule_hook_guards = False  # and differ by hooks
        args.json.parent.mkdir(parents=True, exist_ok=True)
        try:
            run(args)
        finally:
            if args.gate:
                measures.arrive(args.gate)


if __name__ == "__main__":
    main()
