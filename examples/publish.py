"""Publishes this repository's adapters on the Hugging Face Hub, with their cards, figures, pictures and licence.

python examples/publish.py                                              # dry run: what would be uploaded
HF_TOKEN=hf_... python examples/publish.py --to organisation --push     # uploads it
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_url

from mgfc import MGFCError
from mgfc.storage.card import name_repository
from mgfc.storage.format import CARD, CONFIG, HEAD, WEIGHTS
from mgfc.storage.hub import upload
from mgfc.storage.info import read_info

HERE = Path(__file__).parent
LICENCE, THUMBNAIL = "LICENSE", "thumbnail.jpg"


@dataclass(frozen=True)
class Publication:
    """An adapter of this repository.

    Args:
        directory: of the adapter.
        name: of its repository on the Hub.
        picture: of what it does, a JPEG.
        caption: of the picture, with its credit.
    """

    directory: Path
    name: str
    picture: Path
    caption: str


PUBLICATIONS = (
    Publication(
        HERE / "adapter",
        "mgfc-dinov2-small-synth-town",
        HERE.parent / "docs" / "images" / "trier_basilica_parked_cars_segmented.jpg",
        "A photograph, segmented with calibrators and on the bare backbone. Photograph: Berthold Werner, public domain.",
    ),
    Publication(
        HERE / "robust",
        "mgfc-dinov2-small-synth-town-calibration-only",
        HERE / "robust" / THUMBNAIL,
        "A photograph with fog added, segmented with and without calibration. Photograph: Berthold Werner, public domain.",
    ),
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", metavar="ORGANISATION", help="or user, whose repositories they become")
    parser.add_argument(
        "--push", action="store_true", help="upload; needs a token that may write (`hf auth login` or HF_TOKEN)"
    )
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    args = parser.parse_args(arguments)
    if args.push and not args.to:
        parser.error("--push needs --to ORGANISATION")
    return args


def stage(publication: Publication, repo_id: str, folder: Path) -> None:
    """Puts what belongs into a repository into a folder.

    Raises:
        MGFCError: if the adapter is incomplete or damaged.
    """
    for name in (CONFIG, WEIGHTS, HEAD, CARD):
        shutil.copyfile(publication.directory / name, folder / name)
    shutil.copyfile(publication.picture, folder / THUMBNAIL)
    shutil.copyfile(HERE.parent / LICENCE, folder / LICENCE)
    read_info(str(folder))
    name_repository(folder, repo_id)
    card = ModelCard.load(folder / CARD)
    card.data.thumbnail = hf_hub_url(repo_id, THUMBNAIL)
    card.text = card.text.replace(
        "## Use", f"![{publication.caption}]({THUMBNAIL})\n\n<sub>{publication.caption}</sub>\n\n## Use"
    )
    card.save(folder / CARD)


def publish(publication: Publication, args: argparse.Namespace) -> None:
    """Uploads an adapter, or says what would be uploaded."""
    repo_id = f"{args.to or 'organisation'}/{publication.name}"
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        stage(publication, repo_id, folder)
        if args.push:
            print(upload(folder, repo_id, private=args.private or None))
            return
        print(f"{repo_id} would hold:")
        for path in sorted(folder.iterdir()):
            print(f"  {path.name:<20} {path.stat().st_size:>10,} bytes")
        print(f"\n{(folder / CARD).read_text(encoding='utf-8')}")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        for publication in PUBLICATIONS:
            publish(publication, args)
    except (MGFCError, OSError, ValueError) as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return 1
    if not args.push:
        print("Nothing was uploaded. To upload: HF_TOKEN=hf_... python examples/publish.py --to ORGANISATION --push")
    return 0


if __name__ == "__main__":
    sys.exit(main())
