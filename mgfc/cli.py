"""The command line: `mgfc search`, `mgfc info`, `mgfc check`, `mgfc show`, `mgfc convert-rein`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from mgfc._version import __version__
from mgfc.errors import MGFCError

EXIT_CODES = "exit status: 0 if all is well; 1 if the adapter or the model is not, with the reason; 2 if the command is wrong"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 0; 1 with a reason in words; 2 for a wrong one, by argparse."""
    args = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], dict[str, Any]] = args.run
    try:
        result = run(args)
    except (MGFCError, OSError, ImportError) as error:
        if args.json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        else:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    text = result.pop("text")
    print(json.dumps(result, indent=2) if args.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mgfc", description="Calibrators for vision transformers.", epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"mgfc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    search = commands.add_parser("search", help="adapters on the Hugging Face Hub", epilog=EXIT_CODES)
    search.add_argument("words", nargs="*", metavar="WORD", help="that the name contains")
    search.add_argument("--base-model", metavar="ID", help="backbone: its Hub repository, or its name in timm")
    search.add_argument("--limit", type=_count, default=30, metavar="N", help="list so many, by downloads (default: 30)")
    search.set_defaults(run=_search)
    info = commands.add_parser("info", help="what an adapter is, for which backbone, and how to load it", epilog=EXIT_CODES)
    info.add_argument("adapter", metavar="PATH_OR_REPO", help="directory or Hub repository of an adapter")
    info.add_argument("--revision", help="branch, tag or commit of the repository")
    info.set_defaults(run=_info)
    check = commands.add_parser("check", help="what would be attached to a model, and where", epilog=EXIT_CODES)
    check.add_argument("model", metavar="MODEL", help="timm model name, or directory or Hub repository of a Transformers model")
    check.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the trial image (default: the model's own)")
    check.add_argument("--blocks", help="regular expression for the names of the blocks, where detection fails")
    check.set_defaults(run=_check)
    show = commands.add_parser("show", help="pictures of what an adapter does to images", epilog=EXIT_CODES)
    show.add_argument("images", nargs="+", metavar="IMAGE", help="files")
    show.add_argument("--adapter", required=True, metavar="PATH_OR_REPO", help="directory or Hub repository of an adapter")
    show.add_argument("--revision", help="branch, tag or commit of the adapter's repository")
    show.add_argument("--backbone", metavar="MODEL", help="as MODEL of check (default: the one that the adapter names)")
    show.add_argument("--out", default="shown", metavar="DIR", help="where the pictures go; made if missing (default: shown)")
    show.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="that the model sees (default: the image's shape)")
    show.add_argument("--out-indices", type=int, nargs="+", metavar="BLOCK", help="whose maps the head reads")
    show.add_argument("--overwrite", action="store_true", help="write over pictures that are there")
    show.set_defaults(run=_show)
    convert = commands.add_parser("convert-rein", help="turn a Rein checkpoint into an adapter", epilog=EXIT_CODES)
    convert.add_argument("checkpoint", metavar="IN.pth", help="with keys backbone.reins.*; read without running its code")
    convert.add_argument("directory", metavar="OUT", help="where the adapter goes; made if missing")
    convert.add_argument("--no-softmax", action="store_true", help="for a checkpoint trained with use_softmax=False")
    convert.set_defaults(run=_convert)
    for command in (search, info, check, show, convert):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def _info(args: argparse.Namespace) -> dict[str, Any]:
    from mgfc.storage.info import describe, read_info

    content = read_info(args.adapter, args.revision)
    return content | {"text": describe(content)}


def _search(args: argparse.Namespace) -> dict[str, Any]:
    from mgfc.storage.search import client, describe, search

    words = " ".join(args.words)
    # Names without an organisation are timm's, whose weights are on the Hub under its name.
    base_model = args.base_model if args.base_model is None or "/" in args.base_model else f"timm/{args.base_model}"
    found = search(words, base_model=base_model, limit=args.limit)
    return {
        "endpoint": client().endpoint,
        "words": words,
        "base_model": base_model,
        "adapters": [asdict(listing) for listing in found],
        "text": describe(found, words, base_model, args.limit),
    }


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from mgfc.interop.rein import convert_rein

    adapter = convert_rein(args.checkpoint, args.directory, use_softmax=not args.no_softmax)
    values = adapter.config.to_dict()
    blocks = f"{len(adapter.layers)} blocks of {values['num_tokens']} tokens"
    text = f"{args.directory}: {blocks}, {adapter.num_parameters:,} parameters"
    return {"directory": args.directory, "calibration": values, "parameters": adapter.num_parameters, "text": text}


def _show(args: argparse.Namespace) -> dict[str, Any]:
    from mgfc.storage.parsing import printable
    from mgfc.viz.show import show

    options = {key: value for key, value in vars(args).items() if key not in ("command", "run", "json")}
    shown, prediction = show(**options)
    lines = [
        f"{item.picture}  {item.size[0]} x {item.size[1]} pixels, "
        + ("no statistics of a source" if item.distance is None else f"distance from the source {item.distance:.1f}")
        for item in shown
    ]
    return {
        "images": [asdict(item) for item in shown],
        "prediction": prediction,
        "text": "\n".join(map(printable, [*lines, prediction])),
    }


def _check(args: argparse.Namespace) -> dict[str, Any]:
    """Builds the model with random weights, wraps it, and runs one image through its vision tower."""
    import torch

    from mgfc.backbones.description import describe
    from mgfc.backbones.named import build, told_of_size
    from mgfc.wrapping import get_calibration, wrap_backbone

    named = build(args.model)
    calibration = get_calibration(wrap_backbone(named.model, blocks=args.blocks))
    height, width = args.size or named.size
    with told_of_size(args.model, (height, width)):
        reports = calibration.check(torch.rand(1, named.channels, height, width))
    backbone = {key: value for key, value in describe(calibration.tower).items() if key not in ("fingerprint", "base_model")}
    head = f"{args.model}: {backbone['architecture']}, {height} x {width} pixels"
    text = "\n".join([head, *map(str, reports), "", calibration.summary()])
    return {
        "backbone": backbone,
        "size": [height, width],
        "calibration": calibration.config.to_dict(),
        "parameters": calibration.num_parameters,
        "blocks": [asdict(report) for report in reports],
        "text": text,
    }
