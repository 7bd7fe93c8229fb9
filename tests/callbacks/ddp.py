"""Two ranks, each with half of a batch, under gloo: run by a test through torchrun's own launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(bert: str, folder: str, index_folder: str, action: str, n_ranks: int) -> None:
    """Compute the loss and gradients of sixteen rows, and write them from rank 0."""
    import torch
    import torch.distributed as dist
    from hf_relabel.callbacks import RelabelCollator, VerdictIndex
    from hf_relabel.callbacks.masking import install
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.data_collator import BaseDataCollator
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from hf_relabel import Policy
    from tests.callbacks.models import rows_as

    rank = 0
    if n_ranks > 1:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    torch.set_num_threads(1)
    policy = Policy(action=action, max_false_negatives=1)  # type: ignore[arg-type]
    model = SentenceTransformer(bert, device="cpu").eval()
    rows: Any = [dict(row) for row in rows_as("n-tuple").select(range(16))]
    rows[9]["negative_3"] = rows[0]["positive"]  # on the other rank
    rows[15]["anchor"] = rows[3]["anchor"]
    share = len(rows) // n_ranks
    mine = rows[rank * share : (rank + 1) * share]
    collator = RelabelCollator(
        BaseDataCollator(preprocess_fn=model.preprocess),
        VerdictIndex(index_folder, policy=policy),
        masked=frozenset({""}),
        keeps_size=True,
    )
    batch = collator(mine)
    features = [
        {k.removeprefix(f"{name}_"): v for k, v in batch.items() if k.startswith(f"{name}_")}
        for name in mine[0]
    ]
    directions = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    loss = MultipleNegativesRankingLoss(model, gather_across_devices=True, directions=directions)
    install(loss, masks_in_batch=True)
    value = loss(features, batch["label"])
    value.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    mean = value.detach().clone()
    if n_ranks > 1:
        for tensor in (flat, mean):
            dist.all_reduce(tensor)
        flat, mean = flat / n_ranks, mean / n_ranks
        dist.destroy_process_group()
    if rank == 0:
        torch.save(flat, f"{folder}/{n_ranks}.pt")
        Path(f"{folder}/{n_ranks}.json").write_text(json.dumps(mean.item()))


def train(bert: str, folder: str, action: str) -> None:
    """Train on this rank's share of the rows with the callback, and write its last log line."""
    import torch
    from hf_relabel.callbacks import RelabelCallback

    from tests.callbacks.models import relabeler, rows_as, trainer_of

    torch.set_num_threads(1)
    made = relabeler(Path(folder), judged=False, action=action)
    trainer = trainer_of(
        "bi", bert, rows_as("n-tuple"), Path(folder) / "run", callbacks=[RelabelCallback(made)],
        per_device_train_batch_size=4, logging_steps=1,
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        line = [line for line in trainer.state.log_history if "loss" in line][-1]
        Path(f"{folder}/log.json").write_text(json.dumps(line))


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(*sys.argv[2:5])
    else:
        main(*sys.argv[1:5], n_ranks=int(sys.argv[5]))
