"""Pruning: which subsets of a training set do harm, found by training without each of them.

    report = prune(
        dataset,
        train=TrainCommand(template="python train.py --data {data} --output {output} --seed {seed}"),
        evaluate=BenchmarkScores(folders=("benchmarks/scifact",)),
        output="prune",
        seeds=3,
    )
    print(report.keep)

Every run (one left-out subset or none, one seed) is a process of its own, and its result a file:
a sweep that was interrupted goes on where it was.

Modules, each importing only from those before it: runs (values), subsets (the rows of a run),
training (commands and benchmarks as functions), effects (what is noise, and what is not), worker
(the process of a run), scheduler (several at once), report, heatmap, sweep.
"""

from __future__ import annotations

from hf_relabel.prune.effects import Effect, Effects, measure_effects
from hf_relabel.prune.heatmap import draw_heatmap
from hf_relabel.prune.report import PruneReport, Round
from hf_relabel.prune.runs import Run
from hf_relabel.prune.scheduler import Progress
from hf_relabel.prune.sweep import Sweep, prune
from hf_relabel.prune.training import BenchmarkScores, TrainCommand

__all__ = [
    "BenchmarkScores",
    "Effect",
    "Effects",
    "Progress",
    "PruneReport",
    "Round",
    "Run",
    "Sweep",
    "TrainCommand",
    "draw_heatmap",
    "measure_effects",
    "prune",
]
