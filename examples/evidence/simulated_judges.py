"""A simulated cascade: judges that know the truth, and err as often as the paper's judges do.

The rates are derived, not fitted to an outcome. Sources: Thakur et al. (2025), arXiv:2505.16967
(Table 1; section 7), and 25 FiQA rows of the authors' repository castorini/rlhn with the replies of
both judges (375 negatives, 15 a row), counted with this library's parser:

    stage 1, gpt-4o-mini: flags 55 of 375; 17 of 25 rows go on
    stage 2, gpt-4o:      is asked about 255, flags 23, all of them in 10 rows (150 negatives)
    in those 10 rows, stage 1 flags 40 of 150: 19 of the 23, and 21 others

People judged 670 negatives of rows in which stage 2 had found something: Cohen's kappa is 0.320
for gpt-4o-mini and 0.390 for gpt-4o. Taking people as the truth, with t = 23/150 of the negatives
of such rows relevant, and r the share that a judge flags, the share that both flag is

    a = t r + kappa (t + r - 2 t r) / 2

stage 2: r = t      -> it finds a/t = 48 % (misses 52 %), and as many of its flags are right; the
                       other 12 are false flags, of 375 - 23 = 352 irrelevant negatives: 3.4 %
stage 1: r = 40/150 -> it finds 62 % (misses 38 %); 41 of its 55 flags are false: 11.6 % of 352
agreement: stage 1 flags 19 of stage 2's 23 (83 %). Judges that err independently at these rates
           would share 36 %; so on 73 % of the passages both are given the same draw.

Assumed, because the paper did not measure it:
- The sample of people is like the 10 rows: as many relevant as gpt-4o flags (kappa alone leaves one
  number free), and no relevant one in the 15 rows where stage 2 found nothing. Nobody looked at rows
  that stage 1 passed over, so its recall is known in the rows of the sample alone.
- Stage 2 would have flagged nothing in the 8 rows that it was not asked about.
- People make no mistakes. Where they do, the judges are better than this: with a kappa of 0.55
  between two people, gpt-4o's of 0.39 would be one of 0.53 with the truth.
- Passages err alike and apart from each other. Real flags gather in some rows: at 11.6 % a passage,
  84 % of clean rows of 15 would go on, and 47 % did. With 7 negatives a row it is 58 %.

As a check, the table of judges says which share of rows the last stage saw and flagged. In the paper
it is 66 % and 52 % over all sets, 81 % and 67 % on MS MARCO, 66 % and 33 % on FiQA (Table 1).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from hf_relabel import Cascade, LocalJudge, Relevance, Stage, Verdict
from hf_relabel.formats import content_hash
from hf_relabel.questions import Question

__all__ = ["Rates", "SimulatedJudge", "paper_rates", "simulated_cascade"]

Key = frozenset[tuple[str, str]]
"""(query, passage) of every negative that is relevant in truth, each as its `content_hash`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How often the two stages err, each as (stage 1, stage 2).

    Attributes:
        misses: Of the relevant negatives, the share that is not flagged.
        false_flags: Of the irrelevant ones, the share that is.
        agreement: Of all passages, the share on which both stages are given the same draw.
    """

    misses: tuple[float, float]
    false_flags: tuple[float, float]
    agreement: float


def paper_rates() -> Rates:
    """Return the rates that the module's docstring derives."""
    n_relevant, n_in_rows, n_all = 23, 150, 375
    truth = n_relevant / n_in_rows
    both = [
        truth * flagged + kappa * (truth + flagged - 2 * truth * flagged) / 2
        for kappa, flagged in ((0.320, 40 / n_in_rows), (0.390, truth))
    ]
    found_1, found_2 = (share / truth for share in both)
    false_1 = (55 - both[0] * n_in_rows) / (n_all - n_relevant)
    false_2 = (n_relevant - both[1] * n_in_rows) / (n_all - n_relevant)
    by_chance = found_2 * found_1 + (1 - found_2) * false_1
    return Rates(
        misses=(1 - found_1, 1 - found_2),
        false_flags=(false_1, false_2),
        agreement=(19 / 23 - by_chance) / (1 - by_chance),
    )


class SimulatedJudge(LocalJudge):
    """One stage that knows the key, and errs by a draw that (query, passage) and the seed decide.

    Args:
        name: "stage 1" or "stage 2".
        key: What is relevant in truth.
        rates: How often it errs.
        seed: Of the draws.
    """

    def __init__(self, name: str, key: Key, *, rates: Rates, seed: int) -> None:
        self.name = name
        self._key = key
        self._rates = rates
        self._seed = seed
        self._stage = ("stage 1", "stage 2").index(name)
        parts = [name, sorted(key), asdict(rates), seed]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def judge(self, question: Question) -> list[Verdict]:
        query = content_hash(question.query)
        # Worse, as 21 of gpt-4o's 23 are; the paper's last stage counts both.
        return [
            Verdict(
                relevance=Relevance.WORSE
                if self._flags(query, content_hash(passage))
                else Relevance.NOT_RELEVANT,
                judge=self.name,
            )
            for passage in question.passages
        ]

    def _flags(self, query: str, passage: str) -> bool:
        is_shared = self._draw("shared?", query, passage) < self._rates.agreement
        draw = self._draw("both" if is_shared else self.name, query, passage)
        if (query, passage) in self._key:
            return draw < 1 - self._rates.misses[self._stage]
        return draw < self._rates.false_flags[self._stage]

    def _draw(self, what: str, query: str, passage: str) -> float:
        text = f"{self._seed}:{what}:{query}:{passage}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13


def simulated_cascade(key: Key, *, rates: Rates, seed: int) -> Cascade:
    """Return the paper's cascade: a flag of stage 1 sends the whole row to stage 2."""
    stages = [
        Stage(SimulatedJudge(name, key, rates=rates, seed=seed)) for name in ("stage 1", "stage 2")
    ]
    return Cascade(stages, escalate="row")
