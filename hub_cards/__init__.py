"""Hub cards: the templates of dataset and model cards, their rendering, and the plots in them.

Everything between our two markers is ours and is written anew at each publish; everything outside
is the reader's, and stays.
"""

from __future__ import annotations

from hf_relabel.hub_cards.rendering import (
    END,
    START,
    insert_block,
    render_dataset_card,
    render_model_card_note,
)

__all__ = ["END", "START", "insert_block", "render_dataset_card", "render_model_card_note"]
