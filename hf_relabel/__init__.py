"""hf_relabel: find the false negatives in retrieval training data, and drop or promote them.

Names are loaded when they are first used, so that `import hf_relabel` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_relabel.cache import VerdictCache as VerdictCache
    from hf_relabel.cascade import Cascade as Cascade
    from hf_relabel.cascade import Stage as Stage
    from hf_relabel.errors import RelabelError as RelabelError
    from hf_relabel.formats import convert as convert
    from hf_relabel.hub import publish as publish
    from hf_relabel.judges.batches import BatchSettings as BatchSettings
    from hf_relabel.judges.chat import ChatJudge as ChatJudge
    from hf_relabel.judges.cross_encoder import CrossEncoderJudge as CrossEncoderJudge
    from hf_relabel.judges.embedding import EmbeddingJudge as EmbeddingJudge
    from hf_relabel.judges.endpoint import Endpoint as Endpoint
    from hf_relabel.judges.protocol import Judge as Judge
    from hf_relabel.judges.protocol import LocalJudge as LocalJudge
    from hf_relabel.judges.scripted import ScriptedJudge as ScriptedJudge
    from hf_relabel.policy import Policy as Policy
    from hf_relabel.questions import Question as Question
    from hf_relabel.questions import Reply as Reply
    from hf_relabel.report import RelabelReport as RelabelReport
    from hf_relabel.scores import drop_by_score as drop_by_score
    from hf_relabel.scores import score as score
    from hf_relabel.transform import Relabeler as Relabeler
    from hf_relabel.verdicts import Action as Action
    from hf_relabel.verdicts import Relevance as Relevance
    from hf_relabel.verdicts import Verdict as Verdict

__version__ = "0.1.0"

_HOMES = {
    "Action": "verdicts",
    "BatchSettings": "judges.batches",
    "Cascade": "cascade",
    "ChatJudge": "judges.chat",
    "CrossEncoderJudge": "judges.cross_encoder",
    "EmbeddingJudge": "judges.embedding",
    "Endpoint": "judges.endpoint",
    "Judge": "judges.protocol",
    "LocalJudge": "judges.protocol",
    "Policy": "policy",
    "Question": "questions",
    "RelabelError": "errors",
    "RelabelReport": "report",
    "Relabeler": "transform",
    "Relevance": "verdicts",
    "Reply": "questions",
    "ScriptedJudge": "judges.scripted",
    "Stage": "cascade",
    "Verdict": "verdicts",
    "VerdictCache": "cache",
    "convert": "formats",
    "drop_by_score": "scores",
    "publish": "hub",
    "score": "scores",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"hf_relabel.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
