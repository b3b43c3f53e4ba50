"""The command line: `mgfc info`, `mgfc check`, `mgfc show`, `mgfc convert-rein`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mgfc._version import __version__
from mgfc.adapter import GRANULARITIES
from mgfc.errors import MGFCError

if TYPE_CHECKING:
    from mgfc.storage.snapshot import Files

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
    info = commands.add_parser("info", help="what an adapter is, for which backbone, and its figures", epilog=EXIT_CODES)
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
    convert.set_defaults(run=_convert)
    for command in (info, check, show, convert):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _info(args: argparse.Namespace) -> dict[str, Any]:
    from mgfc.storage.loading import locate
    from mgfc.storage.snapshot import consistently

    content = consistently(locate(args.adapter, revision=args.revision), _read_info)
    return content | {"text": _describe_adapter(content)}


def _read_info(find: Files) -> dict[str, Any]:
    from mgfc.storage.format import CONFIG, HEAD, WEIGHTS, calibration_of, read_config
    from mgfc.storage.tensors import read_header

    content = read_config(find(CONFIG))
    calibration_of(content, find(CONFIG))
    names = [WEIGHTS, *([HEAD] if content.get("head") else [])]
    headers = {name: read_header(find(name)) for name in names}
    content["files"] = {
        name: {"values": sum(math.prod(entry.shape) for entry in header.values()), "bytes": os.path.getsize(find(name))}
        for name, header in headers.items()
    }
    return content


def _describe_adapter(content: dict[str, Any]) -> str:
    backbone, calibration, training = content["backbone"], content["calibration"], content.get("training") or {}
    patch = " x ".join(map(str, backbone["patch_size"] or ["unknown size"]))
    weights = backbone.get("base_model") or "weights of unknown name"
    lines = [
        f"mgfc adapter, format {content['format_version']}, written by mgfc {content.get('mgfc_version')}",
        f"backbone     {backbone.get('architecture')} ({backbone.get('library')}), {weights}",
        f"             {backbone['depth']} blocks of width {backbone['embed_dim']}, patches of {patch}, "
        f"{backbone['num_prefix_tokens']} prefix tokens",
    ]
    plain = {key: value for key, value in calibration.items() if key not in GRANULARITIES}
    lines.append(f"calibrators  {content.get('method', 'mgfc')}: {_list(plain)}")
    lines += [f"  {stage:<10} {_list(calibration[stage] or {})}" for stage in GRANULARITIES if stage in calibration]
    if content.get("peft"):
        lines.append("beside them  an adapter of PEFT's")
    for name, file in content["files"].items():
        lines.append(f"{name:<20} {file['values']:,} values, {file['bytes']:,} bytes")
    lines += [f"{key}: {_list(value)}" for key, value in training.items()]
    lines.append(f"licence: {content.get('license')}")
    return "\n".join(lines)


def _list(value: object) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from mgfc.interop.rein import convert_rein

    adapter = convert_rein(args.checkpoint, args.directory)
    values = adapter.config.to_dict()
    blocks = f"{len(adapter.layers)} blocks of {values['num_tokens']} tokens"
    text = f"{args.directory}: {blocks}, {adapter.num_parameters:,} parameters"
    return {"directory": args.directory, "calibration": values, "parameters": adapter.num_parameters, "text": text}


def _show(args: argparse.Namespace) -> dict[str, Any]:
    from mgfc.viz.show import show

    options = {key: value for key, value in vars(args).items() if key not in ("command", "run", "json")}
    shown, prediction = show(**options)
    lines = [
        f"{item.picture}  {item.size[0]} x {item.size[1]} pixels, "
        + ("no statistics of a source" if item.distance is None else f"distance from the source {item.distance:.1f}")
        for item in shown
    ]
    return {"images": [asdict(item) for item in shown], "prediction": prediction, "text": "\n".join([*lines, prediction])}


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
