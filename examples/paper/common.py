"""What the trainings share: arguments, rows, settings of the trainers, adapters, and the end."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from recipes import Recipe, shrunk
from smoke import tiny_model
from transformers import set_seed

from hf_relabel import Relabeler, RelabelError
from hf_relabel.demo import load_sample
from hf_relabel.files import load_source

__all__ = [
    "ResumesAdapters",
    "finish",
    "load_rows",
    "parse",
    "run",
    "settings",
    "with_adapters",
]

ACTIONS = {"remove": "remove_row", "hn-remove": "drop", "rlhn": "promote"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
_SMOKE_ROWS = 24


def parse(description: str, recipes: dict[str, Recipe]) -> tuple[argparse.Namespace, Recipe]:
    """Read the command line; return it with the recipe that it makes."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        epilog=description.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", choices=recipes, required=True)
    add("--data", help="a file, a folder or a Hub id, in any format of hf_relabel; else the sample")
    add("--config", help="the Hub dataset's subset")
    add("--split", default="train")
    add("--limit", type=int, help="the first N rows, for a trial")
    add("--variant", choices=["default", *ACTIONS], default="default", help="what becomes of false "
        "negatives, by verdicts that are there; default: the rows as they are")  # fmt: skip
    add("--verdicts", metavar="OWNER/NAME[@REV]", help="published verdicts, for --variant")
    add("--preset", default="paper", help="whose cached verdicts, for --variant")
    add("--cache", type=Path, help="the folder of verdicts, for --variant")
    add("--output", type=Path, help="checkpoints, and the model in final/  [runs/RECIPE-VARIANT]")
    add("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    add("--model", help="another model to start from")
    add("--negatives", type=int, help="beside one positive")
    add("--epochs", type=float)
    add("--learning-rate", type=float)
    add("--batch-size", type=int, help="rows on one device at once")
    add("--accumulate", type=int, help="batches to a step of the optimizer")
    add("--mini-batch", type=int, help="texts that pass through the model at once")
    add("--gather", action="store_true", help="in-batch negatives of the other devices too")
    add("--attention", help="sdpa, flash_attention_2, …  [the model's own choice]")
    add("--workers", type=int, default=0, help="processes that load data, for each device")
    add("--save-steps", type=int, help="steps from checkpoint to checkpoint  [500]")
    add("--report-to", default="none", help="trackio, wandb, …")
    add("--seed", type=int, default=42)
    add("--smoke", action="store_true", help="a tiny model on CPU, in seconds")
    args = parser.parse_args()
    set_seed(args.seed)  # for what a checkpoint lacks: adapters, a head
    args.output = args.output or Path("runs") / f"{args.recipe}-{args.variant}"
    return args, _changed(recipes[args.recipe], args)


def _changed(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    if args.smoke:
        with PartialState(cpu=True).local_main_process_first():
            model = tiny_model(args.recipe, args.output / "tiny")
        recipe = shrunk(recipe, args.recipe, model)
    given = {
        "model": args.model,
        "n_negatives": args.negatives,
        "n_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "batch_size": args.batch_size,
        "accumulation": args.accumulate,
        "mini_batch": args.mini_batch,
    }
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def say(text: str) -> None:
    """Print once, whatever the number of processes."""
    if PartialState().is_main_process:
        print(text, flush=True)


# Rows ----------------------------------------------------------------------------------------


def load_rows(args: argparse.Namespace) -> Dataset:
    """Load the rows, and put them right as the variant says."""
    if args.data is None:
        rows = load_sample().select(range(_SMOKE_ROWS if args.smoke else 45))
    else:
        rows = load_source(args.data, split=args.split, config=args.config, limit=args.limit)[
            args.split
        ]
    if args.variant != "default":
        rows = _relabeled(rows, args)
    say(f"{len(rows):,} rows ({args.variant}).")
    return rows


def _relabeled(rows: Dataset, args: argparse.Namespace) -> Dataset:
    state = PartialState()
    apply = FromCache(_relabeler(args))
    # One process of a node writes the rows, and its others read what it wrote.
    with state.local_main_process_first():
        relabeled = rows.map(
            apply, batched=True, load_from_cache_file=not state.is_local_main_process
        )
    if state.is_local_main_process:
        _check_verdicts(apply, args)
    return relabeled


def _relabeler(args: argparse.Namespace) -> Relabeler:
    action = ACTIONS[args.variant]
    if args.verdicts:
        repo_id, _, revision = args.verdicts.partition("@")
        return Relabeler.from_verdicts(
            repo_id, revision=revision or None, cache=args.cache, action=action
        )
    return Relabeler(args.preset, cache=args.cache, action=action)


class FromCache:
    """Relabels batches by the verdicts that are there: a training never starts to buy some."""

    def __init__(self, relabeler: Relabeler) -> None:
        self.relabeler = relabeler
        self.tally = relabeler.new_tally()
        self.n_known = 0

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        done = self.relabeler.relabel(batch, self.tally)
        last = [trace[-1] for found in done.traces for trace in found.values()]
        self.n_known += sum(verdict.relevance.is_decided for verdict in last)
        return done.written.batch

    def __getstate__(self) -> dict[str, Any]:
        return {"relabeler": self.relabeler}  # a count would make `map` start over

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["relabeler"])


def _check_verdicts(apply: FromCache, args: argparse.Namespace) -> None:
    report = apply.tally.report
    say(str(report))
    n_undecided = report.negatives.undecided
    if n_undecided and not apply.n_known:
        raise RelabelError(
            f"expected verdicts for --variant {args.variant}, found none for {n_undecided:,} "
            f"negatives. Judge first: hf-relabel run {args.data} --preset {args.preset} --output "
            "judged, or name published verdicts with --verdicts OWNER/NAME."
        )
    if n_undecided:
        say(f"{n_undecided:,} negatives have no verdict, and stay; hf-relabel run asks about them.")


# Training ------------------------------------------------------------------------------------


def settings(args: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """Return the training arguments that retrievers and rerankers share."""
    on_gpu = torch.cuda.is_available() and not args.smoke
    # Re-entrant checkpointing needs inputs with a gradient, and clashes with DDP.
    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return {
        "output_dir": str(args.output),
        "run_name": args.output.name,
        "num_train_epochs": recipe.n_epochs,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "learning_rate": recipe.learning_rate,
        "warmup_steps": recipe.warmup,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "use_cpu": args.smoke,
        "gradient_checkpointing": recipe.is_decoder,
        **(checkpointing if recipe.is_decoder else {}),
        "ddp_find_unused_parameters": False,
        # Ranks must all have as many batches, and as many rows in them.
        "dataloader_drop_last": True,
        "dataloader_num_workers": args.workers,
        "logging_steps": 1 if args.smoke else 10,
        "save_steps": args.save_steps or 500,
        "save_total_limit": 2,
        "report_to": args.report_to,
        "seed": args.seed,
    }


def model_settings(args: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """Return what `from_pretrained` is told."""
    chosen = {"attn_implementation": args.attention} if args.attention else {}
    return {"dtype": recipe.dtype, **chosen}


def with_adapters(backbone: Any, *, task: str, train_too: list[str] | None = None) -> PeftModel:
    """Put LoRA on all linear projections; rank, alpha and dropout are Tevatron's defaults."""
    config = LoraConfig(
        task_type=task,
        r=16,
        lora_alpha=64,
        lora_dropout=0.1,
        target_modules=PROJECTIONS,
        modules_to_save=train_too,
    )
    return get_peft_model(backbone, config)


class ResumesAdapters:
    """A trainer's way to read a checkpoint of adapters.

    The trainers load a checkpoint as a model of its own, with the base model once more, and through
    an integration that wants one version of peft. The adapters alone are all that changed.
    """

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        backbone = self.model[0].model
        if not isinstance(backbone, PeftModel):
            super()._load_from_checkpoint(checkpoint_path)
            return
        weights = load_peft_weights(checkpoint_path, device="cpu")
        result = set_peft_model_state_dict(backbone, weights)
        if result.unexpected_keys:
            raise RelabelError(
                f"expected the adapters of this recipe in {checkpoint_path}, found others: "
                f"{result.unexpected_keys[:3]}. Give the run another --output."
            )


def run(trainer: Any, args: argparse.Namespace) -> None:
    """Train, from the last whole checkpoint where that is asked for."""
    last = last_checkpoint(args.output)
    if last and not args.resume:
        raise RelabelError(
            f"expected no earlier run in {args.output}, found {last.name}. Go on with --resume, or "
            "give another --output."
        )
    say(f"Goes on from {last}." if last else "Starts from the beginning.")
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    trainer.save_state()


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint that was written to its end, or None."""
    # The trainer's state is written last: a folder without it is what a kill left behind.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def finish(trainer: Any, args: argparse.Namespace, recipe: Recipe, *, then: str) -> None:
    """Save a model that loads by its path alone, adapters merged, and say what comes next."""
    if not trainer.is_world_process_zero():
        return
    model, folder = trainer.model, args.output / "final"
    if isinstance(model[0].model, PeftModel):
        model[0].model = model[0].model.merge_and_unload()
    model.max_seq_length = recipe.max_length_used
    model.save_pretrained(str(folder))
    print(f"Saved in {folder}. Next:\n    hf-relabel evaluate {folder} {then}", flush=True)


def start(main: Any) -> None:
    """Run a script's main function; what a user can mend is said in one message, on one rank."""
    # Tokenizers in forked workers warn otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except RelabelError as error:
        say(f"{type(error).__name__}: {error}")
        sys.exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
