"""The mask is exact: loss and gradients are those of a loop that leaves candidates out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_relabel.callbacks import RelabelCollator, VerdictIndex
from hf_relabel.callbacks.masking import install

from hf_relabel import Relevance
from tests.callbacks.models import relabeler, rows_as, tiny_bert

pytestmark = pytest.mark.filterwarnings("ignore")

TWO = ("query_to_doc", "doc_to_query")
FOUR = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SCALE = 20.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(tiny_bert(tmp_path_factory.mktemp("bert")), device="cpu").eval()


@pytest.fixture
def rows() -> list[dict[str, str]]:
    """Eight rows; row 1 holds row 0's positive as a negative, row 7 asks what row 0 asks."""
    found = [dict(row) for row in rows_as("n-tuple").select(range(8))]
    found[1]["negative_2"] = found[0]["positive"]
    found[7]["anchor"] = found[0]["anchor"]
    return found


def _batch(
    rows: list[dict[str, str]], model: Any, folder: Path, **settings: Any
) -> tuple[list[Any], torch.Tensor, Any]:
    """Return features, mask and collator of the rows, with verdicts on three of them."""
    from sentence_transformers.base.data_collator import BaseDataCollator

    answers = {
        (rows[0]["anchor"], rows[0]["negative_1"]): Relevance.BETTER,
        (rows[0]["anchor"], rows[3]["negative_2"]): Relevance.BETTER,  # stands in another row
        (rows[3]["anchor"], rows[3]["negative_3"]): Relevance.WORSE,
        (rows[5]["anchor"], rows[5]["negative_1"]): Relevance.BETTER,
        (rows[5]["anchor"], rows[5]["negative_2"]): Relevance.BETTER,
    }
    made = relabeler(folder, judged=False, answers=answers, **settings)
    for query in {query for query, _ in answers}:
        made.cascade.judge(query, [p for q, p in answers if q == query], cache=made.cache)
    inner = BaseDataCollator(preprocess_fn=model.preprocess)
    collator = RelabelCollator(inner, VerdictIndex.build(made), masked=frozenset({""}))
    batch = collator(rows)
    names = list(rows[0])
    features = [
        {
            key.removeprefix(f"{name}_"): value
            for key, value in batch.items()
            if key.startswith(f"{name}_") and isinstance(value, torch.Tensor)
        }
        for name in names
    ]
    return features, batch["label"], collator


def _reference(
    embeddings: list[torch.Tensor], texts: list[list[str]], out: Callable[[int, str], bool],
    directions: tuple[str, ...], similarity: Any,
) -> torch.Tensor:  # fmt: skip
    """Return the loss as a loop over queries, with `out(row, text)` left out of the candidates."""
    queries, positives = embeddings[0], embeddings[1]
    n = len(queries)
    total = torch.zeros(())
    for i in range(n):
        own = similarity(queries[i : i + 1], positives[i : i + 1])[0, 0] * SCALE
        terms = [own]
        for slot, docs in enumerate(embeddings[1:]):
            for j in range(n):
                if (slot, j) == (0, i):
                    continue
                if not out(i, texts[j][1 + slot]):
                    terms.append(similarity(queries[i : i + 1], docs[j : j + 1])[0, 0] * SCALE)
                if "doc_to_doc" in directions and j != i and not out(i, texts[j][1 + slot]):
                    pair = similarity(docs[j : j + 1], positives[i : i + 1])[0, 0]
                    terms.append(pair * SCALE)
        for j in range(n):
            if j != i and "query_to_query" in directions and texts[i][0] != texts[j][0]:
                terms.append(similarity(queries[i : i + 1], queries[j : j + 1])[0, 0] * SCALE)
            if "doc_to_query" in directions and (j == i or not out(j, texts[i][1])):
                terms.append(similarity(queries[j : j + 1], positives[i : i + 1])[0, 0] * SCALE)
        total = total + torch.logsumexp(torch.stack(terms), 0) - own
    return total / n


def _known(rows: list[dict[str, str]]) -> dict[str, set[str]]:
    """Return by hand what must not be a negative of each query."""
    known: dict[str, set[str]] = {}
    for row in rows:
        known.setdefault(row["anchor"], set()).add(row["positive"])
    known[rows[0]["anchor"]] |= {rows[0]["negative_1"], rows[3]["negative_2"]}
    known[rows[3]["anchor"]] |= {rows[3]["negative_3"]}
    known[rows[5]["anchor"]] |= {rows[5]["negative_1"], rows[5]["negative_2"]}
    return known


def _gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("action", ["drop", "promote"])
@pytest.mark.parametrize("directions", [TWO[:1], TWO, FOUR], ids=["1", "2", "4"])
@pytest.mark.parametrize("chunk", [None, 3, 8], ids=["plain", "cached-3", "cached-8"])
def test_loss_and_gradients_equal_a_loop_without_the_masked(
    chunk: int | None, directions: tuple[str, ...], action: str, model: Any,
    rows: list[dict[str, str]], tmp_path: Path,
) -> None:  # fmt: skip
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import cos_sim

    features, mask, collator = _batch(rows, model, tmp_path, action=action)
    edited = collator._editor.edit(rows, is_masked=True).rows
    texts = [list(row.values()) for row in edited]
    known = _known(rows)
    embeddings = [model(dict(each))["sentence_embedding"] for each in features]
    expected = _reference(
        embeddings, texts, lambda i, text: text in known[texts[i][0]], directions, cos_sim
    )
    expected_grad = _gradients(model, expected)
    if chunk is None:
        loss: Any = losses.MultipleNegativesRankingLoss(model, directions=directions)
    else:
        loss = losses.CachedMultipleNegativesRankingLoss(
            model, directions=directions, mini_batch_size=chunk
        )
    installed = install(loss, masks_in_batch=True)
    assert installed is not None

    value = loss([dict(each) for each in features], mask)

    assert _error(value.detach(), expected.detach()) <= 1e-5
    assert _error(_gradients(model, value), expected_grad) <= 1e-5
    swapped = [row for row, old in zip(edited, rows, strict=True) if row != old]
    assert bool(swapped) == (action == "promote")
    installed[1]()
    assert loss.similarity_fct is cos_sim


def test_masked_cells_of_other_rows_are_counted(
    model: Any, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    features, mask, _ = _batch(rows, model, tmp_path, action="drop")
    loss = MultipleNegativesRankingLoss(model)
    installed = install(loss, masks_in_batch=True)
    assert installed is not None
    known = _known(rows)

    loss(features, mask)

    assert installed[0].n_masked is not None
    assert int(installed[0].n_masked) == sum(
        text in known[row["anchor"]]
        for i, row in enumerate(rows)
        for j, other in enumerate(rows)
        for text in list(other.values())[1:]
        if i != j
    )


def test_without_labels_nothing_is_masked(
    model: Any, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    """Evaluation runs the same loss on batches of its own."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    features, mask, _ = _batch(rows, model, tmp_path, action="drop")
    loss = MultipleNegativesRankingLoss(model)
    plain = loss([dict(each) for each in features], None).detach()
    install(loss, masks_in_batch=True)

    masked = loss([dict(each) for each in features], mask).detach()

    assert torch.equal(loss([dict(each) for each in features], None).detach(), plain)
    assert not torch.equal(masked, plain)


@pytest.mark.parametrize("directions", [TWO[:1], TWO, FOUR], ids=["1", "2", "4"])
def test_a_silent_row_teaches_nothing(
    directions: tuple[str, ...], model: Any, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    """Where ranks gather, a dropped row stays in the batch: as no query and as no candidate."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    features, mask, _ = _batch(rows, model, tmp_path, action="drop")
    fewer = [{key: value[:-1] for key, value in each.items()} for each in features]
    loss = MultipleNegativesRankingLoss(model, directions=directions)
    install(loss, masks_in_batch=True)
    expected = _gradients(model, loss(fewer, mask[:-1]) * 7 / 8)
    silent = mask.clone()
    silent[-1, 2] = 1

    found = _gradients(model, loss([dict(each) for each in features], silent))

    assert _error(found, expected) <= 1e-5


@pytest.mark.parametrize("inner", ["plain", "cached"])
def test_matryoshka_masks_at_every_dimension(
    inner: str, model: Any, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import cos_sim

    features, mask, _ = _batch(rows, model, tmp_path, action="drop")
    kind: Any = (
        losses.MultipleNegativesRankingLoss
        if inner == "plain"
        else losses.CachedMultipleNegativesRankingLoss
    )
    settings = {} if inner == "plain" else {"mini_batch_size": 3}
    loss = losses.MatryoshkaLoss(model, kind(model, **settings), [16, 8])
    installed = install(loss, masks_in_batch=True)
    assert installed is not None
    texts, known = [list(row.values()) for row in rows], _known(rows)
    embeddings = [model(dict(each))["sentence_embedding"] for each in features]
    expected = sum(
        _reference(
            [e[:, :size] for e in embeddings], texts, lambda i, text: text in known[texts[i][0]],
            TWO[:1], cos_sim,
        )
        for size in (16, 8)
    )  # fmt: skip
    expected_grad = _gradients(model, expected)

    value = loss([dict(each) for each in features], mask)

    assert _error(value.detach(), expected.detach()) <= 1e-5
    assert _error(_gradients(model, value), expected_grad) <= 1e-5


def test_splade_masks_the_ranking_inside(rows: list[dict[str, str]], tmp_path: Path) -> None:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder import losses
    from sentence_transformers.util import dot_score

    sparse = SparseEncoder(tiny_bert(tmp_path / "bert"), device="cpu").train()
    features, mask, _ = _batch(rows, sparse, tmp_path, action="drop")
    ranking = losses.SparseMultipleNegativesRankingLoss(sparse, scale=SCALE)
    loss = losses.SpladeLoss(
        sparse, ranking, document_regularizer_weight=3e-5, query_regularizer_weight=5e-5
    )
    installed = install(loss, masks_in_batch=True)
    assert installed is not None
    texts, known = [list(row.values()) for row in rows], _known(rows)
    embeddings = [sparse(dict(each))["sentence_embedding"] for each in features]
    expected = _reference(
        embeddings, texts, lambda i, text: text in known[texts[i][0]], TWO[:1], dot_score
    )

    value = loss([dict(each) for each in features], mask)["base_loss"]

    assert _error(value.detach(), expected.detach()) <= 1e-5
    expected_grad = _gradients(sparse, expected)
    assert _error(_gradients(sparse, value), expected_grad) <= 1e-5
