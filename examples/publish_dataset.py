"""Publish a relabeled dataset: the library's sample, judged offline, with its verdicts and a card.

    python examples/publish_dataset.py                       # a dry run: builds and checks a folder
    python examples/publish_dataset.py --push me/my-dataset  # to the Hub, or to HF_ENDPOINT

Needs the extras `local` and `report`, and for --push a token with write access (`hf auth login`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_relabel import Relabeler, publish
from hf_relabel.demo import load_sample


def main() -> None:
    """Judge, build, check; push and load back when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--push", metavar="OWNER/NAME", help="send it there")
    parser.add_argument("--tag", help="a tag such as v1.0")
    parser.add_argument("--folder", type=Path, default=Path("sample-for-the-hub"))
    args = parser.parse_args()

    rows = load_sample()
    relabeler = Relabeler("offline", action="drop")
    relabeler.judge(rows)
    done = publish(
        rows,
        args.push or "your-name/sample",
        relabeler=relabeler,
        license="apache-2.0",
        languages=["en"],
        tag=args.tag,
        folder=args.folder,
        dry_run=args.push is None,
    )
    print(done.url)
    print(done.snippet or f"Nothing was sent; read {args.folder / 'README.md'}.")


if __name__ == "__main__":
    main()
