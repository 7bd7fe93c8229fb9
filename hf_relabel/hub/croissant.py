"""Croissant: the dataset's description in JSON-LD, with how machines annotated it (RAI).

The Hub makes one of its own for every dataset, without the RAI fields that venues ask for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_relabel.hub.facts import ConfigFacts

__all__ = ["croissant"]

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "arrayShape": "cr:arrayShape",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_TYPES = {"string": "sc:Text", "bool": "sc:Boolean", "timestamp": "sc:DateTime"}


def croissant(facts: Mapping[str, Any], description: str) -> dict[str, Any]:
    """Describe the dataset.

    Args:
        facts: What the card says.
        description: One sentence.
    """
    licence = facts["licence"]
    configs: Sequence[ConfigFacts] = facts["configs"]
    url = f"https://huggingface.co/datasets/{facts['repo_id']}"
    repo = {
        "@type": "cr:FileObject",
        "@id": "repo",
        "name": "repo",
        "description": "The Hugging Face git repository.",
        "contentUrl": url,
        "encodingFormat": "git+https",
        # A repository has no hash of its own; the format wants one, and the Hub writes this issue.
        "sha256": "https://github.com/mlcommons/croissant/issues/80",
    }
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": [
            "http://mlcommons.org/croissant/1.1",
            "http://mlcommons.org/croissant/RAI/1.0",
        ],
        "name": facts["repo_id"].split("/")[1],
        "description": description,
        "url": url,
        "license": licence.url or (f"{url}/blob/main/LICENSE" if licence.has_file else licence.id),
        "creator": {"@type": "sc:Person", "name": facts["repo_id"].split("/")[0]},
        "keywords": ["retrieval", "hard negatives", "false negatives", "relabeled"],
        "version": "1.0.0",
        **({"datePublished": facts["date"]} if facts["date"] else {}),
        **_rai(facts),
        "distribution": [repo, *(_files(config) for config in configs)],
        "recordSet": [_records(config) for config in configs],
    }


def _rai(facts: Mapping[str, Any]) -> dict[str, Any]:
    tools = [f"{stage['model']} as judge {stage['name']!r}" for stage in facts["stages"]]
    return {
        "rai:machineAnnotationTools": [*tools, f"hf_relabel {facts['version']}"],
        "rai:dataAnnotationProtocol": (
            "A cascade of judges compared each negative with its row's positives; "
            f"{facts['settings']['escalate']} escalation, action {facts['action']}."
        ),
        "rai:dataLimitations": (
            "Labels come from language or embedding models and hold their mistakes; undecided "
            "negatives keep their label. Training data: not meant as a test set."
        ),
        "rai:dataBiases": "Those of the source and of the judging models.",
        "rai:personalSensitiveInformation": "That of the source; relabeling adds no text.",
    }


def _files(config: ConfigFacts) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": f"files-{config.name}",
        "containedIn": {"@id": "repo"},
        "encodingFormat": "application/x-parquet",
        "includes": f"{config.name}/*.parquet",
    }


def _records(config: ConfigFacts) -> dict[str, Any]:
    fields = [_field(config.name, column, column["name"]) for column in config.features]
    return {
        "@type": "cr:RecordSet",
        "@id": config.name,
        "name": config.name,
        "description": f"{config.about}; {config.n_rows} rows.",
        "field": fields,
    }


def _field(config: str, column: Mapping[str, Any], path: str) -> dict[str, Any]:
    source = {"fileSet": {"@id": f"files-{config}"}, "extract": {"column": path.split("/")[0]}}
    if "/" in path:
        source["transform"] = {"jsonPath": path.split("/")[1]}
    values: dict[str, Any] = {"@type": "cr:Field", "@id": f"{config}/{path}", "source": source}
    inner = column.get("list")
    if inner is not None:
        values |= {"isArray": True, "arrayShape": "-1"}
    if isinstance(inner, list):
        return {
            **values,
            "subField": [_field(config, sub, f"{path}/{sub['name']}") for sub in inner],
        }
    return {**values, "dataType": _type(inner or column["dtype"])}


def _type(dtype: str) -> str:
    kind = dtype.split("[")[0].rstrip("0123456789")
    if kind in ("int", "uint", "float"):
        return f"cr:{kind[0].upper()}{kind[1:]}{dtype.removeprefix(kind)}"
    return _TYPES[kind]
