"""WordNet's glosses as a csv of `text,label`: what a word means, and the lexicographer file (45 of them) it is from.

    apt-get install wordnet-base
    python benchmarks/wordnet_glosses.py > rows.csv
    shoestring train classify-csv

Which rows are taken depends on the glosses alone, so everybody gets the same.
"""

from __future__ import annotations

import csv
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

# by their numbers in the data files; lexnames(5WN)
FILES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute",
    "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group",
    "noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession",
    "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption",
    "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession",
    "verb.social", "verb.stative", "verb.weather", "adj.ppl",
)  # fmt: skip


def glosses(folder: Path) -> Iterator[tuple[str, str]]:
    """(gloss, lexicographer file) of every set of synonyms."""
    for part in ("noun", "verb", "adj", "adv"):
        with open(folder / f"data.{part}", encoding="utf-8") as lines:
            for line in lines:
                if not line.startswith("  "):  # the licence
                    data, _, gloss = line.partition("|")
                    yield gloss.strip(), FILES[int(data.split()[1])]


def main() -> None:
    given = ArgumentParser(description=__doc__)
    given.add_argument("--folder", type=Path, default=Path("/usr/share/wordnet"), help="WordNet's data files")
    given.add_argument("--rows", type=int, default=20_000)
    chosen = given.parse_args()
    rows = sorted(set(glosses(chosen.folder)), key=lambda row: sha256("\t".join(row).encode()).digest())
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("text", "label"))
    writer.writerows(rows[: chosen.rows])


if __name__ == "__main__":
    main()
