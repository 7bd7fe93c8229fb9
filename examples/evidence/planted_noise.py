"""Does putting false negatives right help, when it is known which they are? Planted noise.

    python examples/evidence/planted_noise.py FOLDER... [--seeds 3] [--output FOLDER]

Each FOLDER holds a collection in BEIR's layout. Known positives are hidden among the negatives of
training rows (`planted_data` says how), a simulated cascade with the error rates of the paper's
judges looks for them (`simulated_judges` derives the rates), all-MiniLM-L6-v2 is trained on what
each arm makes of the rows (`planted_training`), and tested on other queries over the whole corpus:

- not trained: the model as it was.
- never noisy: rows with mined negatives in the places of the hidden positives.
- default: the noisy rows as they are.
- remove, HN remove, RLHN: what the cascade flags costs the row, is dropped, or is promoted.
- TopK-PercPos: what a cross-encoder scores above 95 % of the row's highest positive is dropped.
  The lowest one (`--reference lowest`) of several is lower than most negatives here.
- PercPos by cosine: the same rule on the untrained model's cosines (`drop_by_score`).
- screened: as in the preset of that name, the cross-encoder is the first stage. What it scores
  lower than 95 % of the known positives is settled; the cascade judges the rest, passage by
  passage, and promotes.

The cross-encoder is a one-logit head on MiniLM, trained on the noisy rows in two halves: each half is
scored by the model that saw the other. Every arm goes through `Relabeler` and `convert`, as a user's
data would. Results are kept in the output folder as they come; the same command goes on where it was
stopped, and prints the tables from the files.

Figures are nDCG@10 x100: mean and standard deviation over seeds, and the difference to default with
its 95 % interval and p-value. Both are about queries: each query's difference is first averaged
over the seeds that tested it, then tested by paired randomization. P-values are not corrected for
the number of arms.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from planted_data import Collection, Planted, load_collection, plant
from planted_training import (
    Training,
    in_bf16,
    load_model,
    train_bi_encoder,
    train_cross_encoder,
    with_cosines,
)
from simulated_judges import Rates, paper_rates, simulated_cascade

from hf_relabel import Cascade, Relabeler, Stage
from hf_relabel.cache import VerdictCache
from hf_relabel.compare import compare
from hf_relabel.evaluate import Evaluation, evaluate, score
from hf_relabel.formats import content_hash, resolve
from hf_relabel.judges.cross_encoder import CrossEncoderJudge
from hf_relabel.questions import Question
from hf_relabel.scores import drop_by_score
from hf_relabel.search import SearchSettings, retrieve

ACTIONS = {
    "remove": "remove_row",
    "HN remove": "drop",
    "RLHN": "promote",
    "TopK-PercPos": "drop",
    "screened": "promote",
}
BY_COSINE = "PercPos by cosine"
ARMS = ("not trained", "never noisy", "default", *ACTIONS, BY_COSINE)
METRIC = "nDCG@10"
SCREEN_RECALL = 0.95
FLAGGED = ("better", "worse")


def main() -> None:
    """Run what is missing, and print the tables."""
    args = parsed()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    store = Store(Path(args.output), _settings(args))
    collections = [load_collection(Path(folder), n_train=args.n_train) for folder in args.folders]
    jobs = [
        Job(collection=collection, seed=seed, arm=arm)
        for seed in seeds
        for collection in collections
        for arm in args.arms
    ]
    run_missing(jobs, store, args)
    print(tables(jobs, store))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One arm of one collection and seed."""

    collection: Collection
    seed: int
    arm: str

    @property
    def file_name(self) -> str:
        return f"{self.collection.name}-{self.seed}-{self.arm.replace(' ', '-').lower()}.json"


class Store:
    """Results in a folder, one file each; all of them with the same settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, job: Job) -> dict[str, Any] | None:
        """Return a job's result, or None while there is none."""
        file = self.folder / job.file_name
        if not file.exists():
            return None
        result: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if changed := [n for n, v in self.settings.items() if result["settings"].get(n) != v]:
            raise SystemExit(
                f"expected results with the settings of this run in {self.folder}, found others "
                f"({', '.join(changed)}) in {file.name}. Give another --output."
            )
        return result

    def save(self, job: Job, result: Mapping[str, Any]) -> None:
        """Write a result, whole or not at all."""
        file = self.folder / job.file_name
        unfinished = file.with_suffix(".part")
        text = json.dumps({**result, "settings": self.settings}, indent=1)
        unfinished.write_text(text + "\n", "utf-8")
        unfinished.replace(file)


def run_missing(jobs: Sequence[Job], store: Store, args: argparse.Namespace) -> None:
    """Run every job without a result, and say how far it is."""
    noise: Noise | None = None
    for number, job in enumerate(jobs, start=1):
        if store.load(job) is not None:
            continue
        if noise is None or not noise.is_for(job):
            noise = Noise(job.collection, job.seed, store.folder, args)
        result = noise.run(job.arm)
        store.save(job, result)
        value = 100 * Evaluation.from_json(result["evaluation"]).mean(METRIC)
        spent = ", ".join(f"{what} {seconds:.0f}" for what, seconds in result["seconds"].items())
        print(
            f"[{number}/{len(jobs)}] {job.collection.name}, seed {job.seed}, {job.arm}: "
            f"{value:.2f} ({spent} s); about {_time_left_s(jobs, store) / 60:.0f} min left",
            flush=True,
        )


def _time_left_s(jobs: Sequence[Job], store: Store) -> float:
    """Estimate from what is done: an arm takes as long as the same one of another seed did."""
    done, missing = [], []
    for job in jobs:
        result = store.load(job)
        if result is None:
            missing.append(job)
        else:
            seconds = sum(result["seconds"].values())
            done.append((job, seconds, seconds / len(job.collection.passages)))

    def expected_s(job: Job) -> float:
        of_collection = [each for each in done if each[0].collection is job.collection]
        of_arm = [each for each in of_collection if each[0].arm == job.arm]
        if same := of_arm or of_collection:
            return statistics.fmean(seconds for _, seconds, _ in same)
        return len(job.collection.passages) * statistics.fmean(share for _, _, share in done)

    return sum(map(expected_s, missing))


class Noise:
    """One collection with one seed's noise, and what the arms make of it."""

    def __init__(
        self, collection: Collection, seed: int, folder: Path, args: argparse.Namespace
    ) -> None:
        self.collection = collection
        self.seed = seed
        self._args = args
        self._how = _training(args)
        self._folder = folder
        self._train, self._test = collection.split(seed, is_development=args.development)

    def is_for(self, job: Job) -> bool:
        return job.collection is self.collection and job.seed == self.seed

    def run(self, arm: str) -> dict[str, Any]:
        """Relabel, train and test one arm."""
        clock = Clock()
        if arm == "not trained":
            evaluation = self._as_it_was(arm)
            clock.lap("rank")
            return self._result(arm, evaluation, clock, rows=None, judged=None)
        rows, judged = self.rows(arm)
        clock.lap("judge")
        if not len(rows):  # a judge that flags everything leaves nothing to learn from
            return self._result(arm, self._as_it_was(arm), clock, rows=rows, judged=judged)
        model = train_bi_encoder(rows, self._how, seed=self.seed)
        clock.lap("train")
        found = evaluate(
            in_bf16(model, self._how), self._test, max_seq_length=self._args.test_length
        )
        clock.lap("test")
        return self._result(arm, replace(found, model=arm), clock, rows=rows, judged=judged)

    def _as_it_was(self, arm: str) -> Evaluation:
        """Return the untrained model's evaluation."""
        found = score(self._test.qrels, self._untrained)
        return Evaluation(model=arm, benchmark=self._test.name, per_query=found)

    def _result(
        self,
        arm: str,
        evaluation: Evaluation,
        clock: Clock,
        *,
        rows: Dataset | None,
        judged: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        return {
            "collection": self.collection.name,
            "seed": self.seed,
            "arm": arm,
            "n_rows": None if rows is None else len(rows),
            "n_positives": None if rows is None else sum(map(len, rows["positive_passages"])),
            "judged": judged,
            "seconds": clock.laps,
            "cpu_seconds": clock.cpu_s(),
            "evaluation": evaluation.to_json(),
        }

    def rows(self, arm: str) -> tuple[Dataset, dict[str, Any] | None]:
        """Return an arm's rows, and what its judges found."""
        if arm == "default":
            return self.planted.rows, None
        if arm == "never noisy":
            return self.planted.clean, None
        if arm == BY_COSINE:
            scored = with_cosines(self.planted.rows, in_bf16(load_model(self._how), self._how))
            new = drop_by_score(scored, reference=self._args.reference, scale="probability")
            return new, count_dropped(self.planted, new)
        parts = [(self._relabeler(arm, half), rows) for half, rows in self._parts(arm)]
        # `map` asks the judges; decisions are read from the cache afterward.
        written = [rows.map(relabeler, batched=True) for relabeler, rows in parts]
        decided = [relabeler.decisions(rows) for relabeler, rows in parts]
        titles = [stage.title for stage in parts[0][0].cascade.stages]
        new = _in_order(concatenate_datasets(written), self.planted.rows["query_id"])
        judged = count(concatenate_datasets(decided), self.planted, titles)
        return new, {**judged, "rows_dropped": len(self.planted.rows) - len(new)}

    def _parts(self, arm: str) -> list[tuple[int, Dataset]]:
        """Return the rows that one relabeler works on: two halves where a cross-encoder judges."""
        if arm in ("TopK-PercPos", "screened"):
            return list(enumerate(self._halves))
        return [(0, self.planted.rows)]

    def _relabeler(self, arm: str, half: int) -> Relabeler:
        if arm == "TopK-PercPos":
            cascade = Cascade([Stage(self._cross_encoder(half, threshold=None))])
        else:
            cascade = self._screened(half) if arm == "screened" else self._cascade
        return Relabeler(cascade, action=ACTIONS[arm], cache=self._cache, seed=self.seed)

    def _screened(self, half: int) -> Cascade:
        screen = self._cross_encoder(half, name="screen")
        questions = [
            Question(query=row.query, passages=tuple(p.shown for p in row.positives))
            for row in self._plain.rows(self._halves[half])
        ]
        everything = [[True] * len(question.passages) for question in questions]
        screen = screen.fit_threshold(questions, everything, min_recall=SCREEN_RECALL)
        return Cascade([Stage(screen), *self._cascade.stages], escalate="passage")

    @cached_property
    def _plain(self) -> Relabeler:
        return Relabeler(self._cascade, cache=self._cache)

    @cached_property
    def _cache(self) -> VerdictCache:
        return VerdictCache(self._folder / "verdicts" / f"{self.collection.name}-{self.seed}")

    @cached_property
    def _cascade(self) -> Cascade:
        return simulated_cascade(self.planted.key, rates=_rates(self._args), seed=self.seed)

    @cached_property
    def _halves(self) -> tuple[Dataset, Dataset]:
        n_rows = len(self.planted.rows)
        first, second = (self.planted.rows.select(range(k, n_rows, 2)) for k in range(2))
        return first, second

    def _cross_encoder(self, half: int, **rule: Any) -> CrossEncoderJudge:
        """Return a judge of one half, whose model was trained on the other half and is kept."""
        name = f"{self.collection.name}-{self.seed}-{half}"
        folder = self._folder / "cross-encoders" / name
        if not folder.exists():
            train_cross_encoder(self._halves[1 - half], self._how, folder, seed=self.seed)
        dtype = "bfloat16" if self._how.bf16 else "float32"
        return CrossEncoderJudge(
            str(folder),
            device=self._how.device,
            dtype=dtype,
            reference=self._args.reference,
            **rule,
        )

    @cached_property
    def planted(self) -> Planted:
        """The rows, and the key to them."""
        return plant(
            self.collection,
            self._train,
            self._untrained,
            seed=self.seed,
            n_negatives=self._args.negatives,
            n_hidden=self._args.hidden,
            noisy_share=self._args.noisy_share,
        )

    @cached_property
    def _untrained(self) -> Mapping[str, Mapping[str, float]]:
        """The untrained model's ranking of all queries, kept for other seeds."""
        file = self._folder / f"{self.collection.name}-untrained-{self._args.test_length}.json"
        if not file.exists():
            model = in_bf16(load_model(self._how), self._how)
            settings = SearchSettings(max_seq_length=self._args.test_length)
            run = retrieve(model, self.collection.everything, settings)
            file.write_text(json.dumps(run), "utf-8")
        found: dict[str, dict[str, float]] = json.loads(file.read_text("utf-8"))
        return found


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()
        self._first_cpu_s = time.process_time()

    def lap(self, what: str) -> None:
        """Book the time since the last lap."""
        now = time.monotonic()
        self.laps[what] = round(now - self._last, 1)
        self._last = now

    def cpu_s(self) -> float:
        """Return the processor time since the start: the same on a busy machine as on a quiet one."""
        return round(time.process_time() - self._first_cpu_s, 1)


def _in_order(rows: Dataset, query_ids: Sequence[str]) -> Dataset:
    places = {query_id: place for place, query_id in enumerate(query_ids)}
    found = rows["query_id"]
    return rows.select(sorted(range(len(rows)), key=lambda number: places[found[number]]))


def count(decisions: Dataset, planted: Planted, titles: Sequence[str]) -> dict[str, Any]:
    """Hold an arm's decisions against the key.

    Args:
        decisions: One row for each negative, as `Relabeler.decisions` returns them.
        planted: The noise.
        titles: The stages', in order.
    """
    keys = list(zip(decisions["query_hash"], decisions["passage_hash"], strict=True))
    flags = [relevance in FLAGGED for relevance in decisions["relevance"]]
    reached = [titles.index(stage) if stage else -1 for stage in decisions["stage"]]
    rows = list(zip(decisions["query_id"], reached, flags, strict=True))
    is_hidden = [key in planted.key for key in keys]
    return {
        "negatives": len(keys),
        "hidden": sum(is_hidden),
        "found": sum(flag for flag, hidden in zip(flags, is_hidden, strict=True) if hidden),
        "false_flags": sum(
            flag for flag, hidden in zip(flags, is_hidden, strict=True) if not hidden
        ),
        "asked": {
            title: sum(last >= index for last in reached) for index, title in enumerate(titles)
        },
        "rows_asked": {
            title: len({query for query, last, _ in rows if last >= index})
            for index, title in enumerate(titles)
        },
        "rows_flagged": len({query for query, _, flag in rows if flag}),
        "rows": len({query for query, _, _ in rows}),
    }


def count_dropped(planted: Planted, new: Dataset) -> dict[str, Any]:
    """Hold what was dropped against the key, where scores decided and no judge was asked."""
    kept = {
        (row["query_id"], passage["docid"]) for row in new for passage in row["negative_passages"]
    }
    flags = [
        (row.query_id, (content_hash(row.query), passage.key) in planted.key)
        for row in resolve(planted.rows.column_names).read(planted.rows[:])
        for passage in row.negatives
        if (row.query_id, passage.docid) not in kept
    ]
    n_rows, n_found = len(planted.rows), sum(is_hidden for _, is_hidden in flags)
    n_negatives = sum(map(len, planted.rows["negative_passages"]))
    return {
        "negatives": n_negatives,
        "hidden": len(planted.key),
        "found": n_found,
        "false_flags": len(flags) - n_found,
        "asked": {"cosine": n_negatives},
        "rows_asked": {"cosine": n_rows},
        "rows_flagged": len({query for query, _ in flags}),
        "rows": n_rows,
        "rows_dropped": n_rows - len(new),
    }


# Tables ----------------------------------------------------------------------------------------


def tables(jobs: Sequence[Job], store: Store) -> str:
    """Return all tables as Markdown, from the results that are there."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for job in jobs:
        result = store.load(job)
        if result is not None:
            of_collection = found.setdefault(job.collection.name, {})
            of_collection.setdefault(job.arm, []).append(result)
    parts = [
        part
        for name, arms in found.items()
        for part in (f"\n**{name}**\n", quality_table(arms), "", judge_table(arms))
    ]
    return "\n".join(parts)


def quality_table(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return how well each arm's model retrieves, and its difference to default."""
    lines = [
        "| arm | nDCG@10 x100, mean ± sd | difference to default [95 %] | by seed | p |",
        "|---|---|---|---|---|",
    ]
    default = _evaluations(arms.get("default", ()))
    for arm, results in arms.items():
        by_seed = _evaluations(results)
        means = [100 * evaluation.mean(METRIC) for evaluation in by_seed.values()]
        spread = f" ± {statistics.stdev(means):.2f}" if len(means) > 1 else ""
        shown = _difference(by_seed, default) if arm != "default" else " | | "
        lines.append(f"| {arm} | {statistics.fmean(means):.2f}{spread} | {shown} |")
    return "\n".join(lines)


def _evaluations(results: Sequence[Mapping[str, Any]]) -> dict[int, Evaluation]:
    return {result["seed"]: Evaluation.from_json(result["evaluation"]) for result in results}


def _difference(arm: Mapping[int, Evaluation], default: Mapping[int, Evaluation]) -> str:
    shared = sorted(arm.keys() & default.keys())
    if not shared:
        return " | | "
    found = compare(
        _pooled([default[seed] for seed in shared]), _pooled([arm[seed] for seed in shared]), METRIC
    )
    gains = (100 * (arm[seed].mean(METRIC) - default[seed].mean(METRIC)) for seed in shared)
    low, high = (100 * end for end in found.interval)
    return (
        f"{100 * found.difference:+.2f} [{low:+.2f}, {high:+.2f}] | "
        f"{', '.join(f'{gain:+.2f}' for gain in gains)} | {found.p_value:.3f}"
    )


def _pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Average each query over the seeds that tested it."""
    values: dict[str, list[float]] = {}
    for evaluation in evaluations:
        for query_id, value in evaluation.per_query[METRIC].items():
            values.setdefault(query_id, []).append(value)
    means = {query_id: statistics.fmean(found) for query_id, found in values.items()}
    return replace(evaluations[0], per_query={METRIC: means})


def judge_table(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return what each arm's judges found, all seeds together, and what became of the rows."""
    lines = [
        "| arm | hidden ones found | irrelevant ones flagged | right flags | "
        "rows seen by the last stage | rows flagged | rows dropped | passages asked, by stage |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, results in arms.items():
        judged = [result["judged"] for result in results if result["judged"]]
        if judged:
            lines.append(f"| {arm} | {_judge_cells(judged)} |")
    return "\n".join(lines)


def _judge_cells(judged: Sequence[Mapping[str, Any]]) -> str:
    total: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for counts in judged:
        total.update({name: n for name, n in counts.items() if isinstance(n, int)})
        asked.update(counts["asked"])
        total["rows_last"] += list(counts["rows_asked"].values())[-1]
    flagged = total["found"] + total["false_flags"]
    cells = [
        _share(total["found"], total["hidden"]),
        _share(total["false_flags"], total["negatives"] - total["hidden"]),
        _share(total["found"], flagged),
        _share(total["rows_last"], total["rows"]),
        _share(total["rows_flagged"], total["rows"]),
        _share(total["rows_dropped"], total["rows"]),
        ", ".join(f"{title} {n:,}" for title, n in asked.items()),
    ]
    return " | ".join(cells)


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / whole:.1f} %)" if whole else "-"


# Arguments -------------------------------------------------------------------------------------


def _training(args: argparse.Namespace) -> Training:
    return Training(
        model=args.model,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        n_negatives=args.trained_negatives,
        max_seq_length=args.train_length,
        cross_steps=args.cross_steps,
        cross_learning_rate=args.cross_learning_rate,
        cross_max_length=args.cross_length,
        bf16=args.precision == "bf16",
        device=args.device,
    )


def _rates(args: argparse.Namespace) -> Rates:
    return Rates(
        misses=tuple(args.misses), false_flags=tuple(args.false_flags), agreement=args.agreement
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what results depend on."""
    others = {"folders", "output", "seeds", "first_seed", "arms", "threads", "quick"}
    return {name: value for name, value in vars(args).items() if name not in others}


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    rates = paper_rates()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--output", default="planted-noise")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, 24 rows, short texts: shows that it runs"
    )
    parser.add_argument(
        "--development",
        action="store_true",
        help="test on a third of the training queries, to choose settings by",
    )
    noise = parser.add_argument_group("noise")
    noise.add_argument("--negatives", type=int, default=7, help="in a row, hidden ones included")
    noise.add_argument("--hidden", type=int, default=2, help="in a row with several positives")
    noise.add_argument("--noisy-share", type=float, default=1.0, help="of the rows")
    noise.add_argument("--n-train", type=int, default=None, help="at most so many queries")
    judges = parser.add_argument_group("simulated judges, stage 1 and stage 2")
    judges.add_argument("--misses", type=float, nargs=2, default=list(rates.misses))
    judges.add_argument("--false-flags", type=float, nargs=2, default=list(rates.false_flags))
    judges.add_argument("--agreement", type=float, default=rates.agreement)
    judges.add_argument(
        "--reference",
        choices=("lowest", "highest"),
        default="highest",
        help="the positive that the cross-encoder's scores are compared with",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--model", default=None, help="all-MiniLM-L6-v2 of its package if not set"
    )
    training.add_argument("--epochs", type=int, default=2)
    training.add_argument("--learning-rate", type=float, default=2e-5)
    training.add_argument("--batch-size", type=int, default=16)
    training.add_argument("--trained-negatives", type=int, default=3, help="of a row, in an epoch")
    training.add_argument("--train-length", type=int, default=64, help="tokens of a text")
    training.add_argument("--test-length", type=int, default=128, help="likewise")
    training.add_argument("--cross-steps", type=int, default=200, help="of 32 pairs")
    training.add_argument("--cross-length", type=int, default=64, help="tokens of a pair")
    training.add_argument("--cross-learning-rate", type=float, default=1e-4)
    training.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    training.add_argument("--device", default="cpu")
    training.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(words)
    if args.quick:
        quick = {"seeds": 1, "n_train": 24, "epochs": 1, "train_length": 32, "test_length": 32}
        vars(args).update(quick, cross_steps=8)
    return args


if __name__ == "__main__":
    main()
