"""A script that sweeps word puzzles and writes its table, for a test to kill and start again."""

from __future__ import annotations

import sys

from datasets import Dataset

from hf_relabel.prune import prune
from tests.prune.trainings import slow_train_words, word_ndcg, word_rows

if __name__ == "__main__":
    report = prune(
        Dataset.from_list(word_rows(0)),
        train=slow_train_words,
        evaluate=word_ndcg,
        output=sys.argv[1],
        seeds=2,
        jobs=2,
        file_type="jsonl",
    )
    sys.stdout.write(report.table())
