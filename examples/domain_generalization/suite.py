"""Does the runs that are missing, in processes that take many runs each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import torch

from domain_generalization.crops import Stream, prepare
from domain_generalization.report import append, read
from domain_generalization.training import Places, Settings, trained_or_train
from domain_generalization.variants import plain_model, score_variant

Done = set[tuple[str, str]]
Todo = Sequence[tuple[Settings, tuple[str, ...]]]


def as_json(settings: Settings) -> str:
    return json.dumps(asdict(settings), sort_keys=True)


def done(file: Path) -> Done:
    """The settings and variants of the records in a file."""
    return {(json.dumps(record["settings"], sort_keys=True), record["variant"]) for record in read(file)}


def run(settings: Settings, variants: Iterable[str], places: Places, file: Path) -> None:
    """Trains, unless the weights are there, and scores the variants that have no record yet."""
    before = done(file)
    missing = [variant for variant in variants if (as_json(settings), variant) not in before]
    if not missing:
        return
    trained = trained_or_train(settings, places)
    plain = plain_model(settings, trained, places)
    for variant in missing:
        record = score_variant(variant, plain, settings, trained, places)
        append(file, record)
        figures = {name: value for name, value in record["miou"].items() if "," not in name}
        print(f"{settings.method} {settings.source} {settings.seed} {settings.lr:g} | {variant} | {figures}", flush=True)


def start_process(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
    cv2.setNumThreads(1)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, nothing on a CPU


def run_all(todo: Todo, places: Places, file: Path, jobs: int, threads: int | None) -> None:
    """Does runs, some at a time.

    Args:
        todo: runs and the variants to score of each.
        places: where things are.
        file: takes the records.
        jobs: processes.
        threads: of each on a CPU; None for as many as torch chooses.

    Raises:
        SystemExit: if runs failed, once the others are done.
    """
    if jobs == 1:
        start_process(threads)
        for settings, variants in todo:
            run(settings, variants, places, file)
        return
    failed: dict[str, BaseException] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), start_process, (threads,)) as pool:
        streams: set[Stream] = {settings.stream for settings, _ in todo}
        list(pool.map(partial(prepare, cache=places.crops, packed=places.packed), streams))
        running = {pool.submit(run, made, variants, places, file): made for made, variants in todo}
        for future in as_completed(running):
            if error := future.exception():
                failed[as_json(running[future])] = error
    if failed:
        first, error = next(iter(failed.items()))
        raise SystemExit(f"{len(failed)} runs failed, the first one: {first}: {error!r}")
