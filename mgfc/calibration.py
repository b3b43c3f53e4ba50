"""The calibrators of one backbone: what users train, check, use and save."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgfc import reports
from mgfc.attachment import Attachment
from mgfc.backbones.modes import evaluating
from mgfc.blocks import BlockReport
from mgfc.config import AdapterConfig
from mgfc.distributed import process
from mgfc.errors import AdapterMismatchError, CalibrationError
from mgfc.storage import hub
from mgfc.storage.card import name_repository
from mgfc.storage.directory import save
from mgfc.storage.loading import make_adapter


class Calibration(Attachment):
    """The trainable calibrators of one backbone, reached as `backbone.calibration`.

    `wrap_backbone` makes it; its parameters are what a user's loop trains. It calibrates the images that enter the
    backbone and the patch tokens that leave each calibrated block, whoever calls the block, and changes nothing else. It
    holds one or more adapters by name, of which one is active; `wrap_backbone` gives it the first, "default". In a state
    dict their keys begin with `calibration.adapter_NAME`.

    Args:
        tower: the backbone.
        adapter: the first adapter.
        name: of the first adapter.

    Attributes:
        active_adapter: name of the adapter that the backbone uses and training trains.
    """

    def add_adapter(self, name: str, adapter: AdapterConfig | str | os.PathLike[str] | None = None, **hub_options: Any) -> None:
        """Adds an adapter beside the others. The active one stays active: `set_adapter` switches.

        Args:
            name: new among `adapters`, without dots.
            adapter: as in `wrap_backbone`.
            **hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, as in `wrap_backbone`.

        Raises:
            ConfigError: if the name is taken or cannot be one, or the configuration does not fit the backbone.
            AdapterNotFoundError, AdapterFileError, AdapterMismatchError: as in `wrap_backbone`.
        """
        self._check_new(name)
        built, tuner = make_adapter(self.tower, adapter, **hub_options)
        if tuner is not None:
            raise AdapterMismatchError(
                f"{adapter}: expected calibrators alone, found an adapter of PEFT's beside them, which all adapters would "
                "share. Load it with wrap_backbone."
            )
        self._add(name, built)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Within it, forwards gather the statistics of the source anew, and change nothing else.

        It is the last step of a training, and the only one of `MGFCConfig(rank=None)`: call the model on images of the
        source, in random order and as evaluation gives them. The backbone is in eval mode meanwhile, without gradients;
        put the rest of the model there yourself. What training gathered on the way is forgotten, unless an exception ends it.

        Warns:
            UserWarning: if no image came.

        Examples:
            >>> with vit.calibration.observing():
            ...     for images in source:
            ...         model(images)
        """
        adapter = self.adapter
        before = [(mean, mean.start_observing()) for mean in adapter.statistics]
        try:
            with evaluating(self.backbone), torch.no_grad():
                yield
        except BaseException:
            for mean, state in before:
                mean.give_up(state)
            raise
        for mean, _ in before:
            mean.stop_observing()
        if adapter.num_batches == 0:
            warnings.warn("observing: no image reached the backbone, so that the statistics are empty now.", stacklevel=3)

    @contextmanager
    def scene(self, images: Tensor) -> Iterator[None]:
        """Within it, forwards of parts of images are calibrated by the coarse statistics of the whole images.

        A window is no scene of its own: one of sky alone would be brought to the brightness of a street. Use it around
        sliding windows, scales and flips of an image.

        Args:
            images: (B, C, H, W) as the backbone is given them; B is 1, or that of each forward.
        """
        with self.images.scene(images):
            yield

    def distance(self) -> Tensor:
        """How far the images of this thread's last forward in evaluation lay from the source: (B,).

        It is z of the coarse stage, the mean squared distance of the channels' statistics in variances of the source:
        about 1 or less for images like the source's, 2 to 10 in dense fog or at night. A compiled forward does not tell it.
        `docs/deployment.md`, "How far from the source", has measured values.

        Raises:
            CalibrationError: if there was no such forward.
        """
        return self.images.distance()

    def losses(self, labels: Tensor, ignore_index: int = 255) -> dict[str, Tensor]:
        """The hierarchical losses of the last forward, each already times its weight, averaged over the blocks.

        Frees the intermediate tensors that the losses need.

        Args:
            labels: (B, H, W) integer class ids of the images of the last forward, at any resolution.
            ignore_index: id of pixels that do not count.

        Returns:
            Scalars by granularity: those of "coarse", "medium" and "fine" whose weight is above 0. In eval mode nothing
            is recorded, and the dict is empty.

        Raises:
            LabelError: if labels have a wrong shape, dtype or class id.
            CalibrationError: in training mode, if no forward came before.
        """
        return self.adapter.losses(labels, ignore_index)

    def loss(self, labels: Tensor, ignore_index: int = 255) -> Tensor:
        """The sum of `losses`: a scalar to add to the task's loss; 0 with all weights at 0 and in eval mode."""
        losses = self.losses(labels, ignore_index)
        return sum(losses.values(), start=torch.zeros((), device=labels.device))

    def check(self, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> list[BlockReport]:
        r"""Runs one forward and reports what each calibrated block saw.

        Args:
            *args: of the forward.
            model: what to call; None for the backbone. Give the host model to learn whether the host reaches every block.
            **kwargs: of the forward.

        Returns:
            One report a block, in order; `print(*reports, sep="\n")` shows them.

        Raises:
            CalibrationError: naming the blocks that the forward did not call.

        Warns:
            UserWarning: if a host called none of the blocks, but is not given, so that this says nothing of it.
        """
        if not self.enabled:
            raise CalibrationError("check: expected calibrators that are in use, found them disabled.")
        last = self.active.reached
        if model is None and last is not None and not last.left:
            warnings.warn(
                "check: the last forward of a host called none of the calibrated blocks; this one calls the backbone itself. "
                "Give it the host: calibration.check(images, model=MODEL).",
                stacklevel=2,
            )
        model = self.backbone if model is None else model
        return reports.check(self.blocks, self.images, self.adapter, model, args, kwargs)

    def summary(self) -> str:
        """A table of trainable parameters per block and granularity, their share of the backbone, and batches seen."""
        self._settle()
        num_backbone = sum(p.numel() for p in self.backbone.parameters()) - sum(p.numel() for p in self.parameters())
        return reports.summary(self.block_names, self.adapter, num_backbone)

    def save_pretrained(self, directory: str | os.PathLike[str], *, head: nn.Module | None = None, **card: Any) -> None:
        """Writes the active adapter into a directory.

        Args:
            directory: made if missing.
            head: a segmentation head to keep beside the adapter.
            **card: `training`, `base_model` and `license`, as in `mgfc.storage.directory.save`, which tells the rest.
        """
        self._settle()
        save(directory, self.tower, self.adapter, head=head, with_peft=self.has_peft, **card)

    def push_to_hub(self, repo_id: str, *, head: nn.Module | None = None, **options: Any) -> str:
        """Uploads the active adapter to the Hugging Face Hub, making the repository if it is missing.

        Args:
            repo_id: organisation/name.
            head: a segmentation head to keep beside the adapter.
            **options: `training`, `base_model` and `license`, as in `save_pretrained`; `private`, `token`, `revision`,
                `commit_message` and `create_pr`, as in `mgfc.storage.hub.upload`, which tells the rest.

        Returns:
            Address of the commit. Under `torch.distributed` the first process uploads, and the others return "".
        """
        card = {key: options.pop(key) for key in ("training", "base_model", "license") if key in options}
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, head=head, **card)
            name_repository(Path(directory), repo_id)
            return hub.upload(Path(directory), repo_id, **options) if process()[0] == 0 else ""
