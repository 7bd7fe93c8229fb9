"""Licences: inherited from the source, never made up.

Not legal advice. A relabeled dataset is a copy of its source with other labels: it goes out under
the source's terms, says what was changed, or goes out without the source's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_relabel.errors import SettingError

__all__ = ["KNOWN", "Licence", "decide_licence"]

URLS: dict[str, str] = {
    "apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "mit": "https://opensource.org/license/mit",
    "cc0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "cc-by-2.0": "https://creativecommons.org/licenses/by/2.0/",
    "cc-by-2.5": "https://creativecommons.org/licenses/by/2.5/",
    "cc-by-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "cc-by-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "cc-by-sa-3.0": "https://creativecommons.org/licenses/by-sa/3.0/",
    "cc-by-sa-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "cc-by-nc-2.0": "https://creativecommons.org/licenses/by-nc/2.0/",
    "cc-by-nc-3.0": "https://creativecommons.org/licenses/by-nc/3.0/",
    "cc-by-nc-4.0": "https://creativecommons.org/licenses/by-nc/4.0/",
    "cc-by-nd-4.0": "https://creativecommons.org/licenses/by-nd/4.0/",
    "cc-by-nc-sa-2.0": "https://creativecommons.org/licenses/by-nc-sa/2.0/",
    "cc-by-nc-sa-3.0": "https://creativecommons.org/licenses/by-nc-sa/3.0/",
    "cc-by-nc-sa-4.0": "https://creativecommons.org/licenses/by-nc-sa/4.0/",
    "cc-by-nc-nd-3.0": "https://creativecommons.org/licenses/by-nc-nd/3.0/",
    "cc-by-nc-nd-4.0": "https://creativecommons.org/licenses/by-nc-nd/4.0/",
    "odc-by": "https://opendatacommons.org/licenses/by/1-0/",
    "odbl": "https://opendatacommons.org/licenses/odbl/1-0/",
    "pddl": "https://opendatacommons.org/licenses/pddl/1-0/",
}
_NO_DERIVATIVES = "-nd-"
KNOWN: frozenset[str] = frozenset(
    [
        *URLS,
        *("afl-3.0", "agpl-3.0", "artistic-2.0", "bigscience-openrail-m", "bsd", "bsd-2-clause"),
        *("bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cdla-permissive-1.0"),
        *("cdla-permissive-2.0", "cdla-sharing-1.0", "deepfloyd-if-license", "ecl-2.0", "epl-1.0"),
        *("epl-2.0", "eupl-1.1", "eupl-1.2", "etalab-2.0", "gemma", "gfdl", "gpl", "gpl-2.0"),
        *("gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "llama2", "llama3", "llama3.1"),
        *("llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mpl-2.0", "ms-pl", "ncsa", "ofl-1.1"),
        *("open-mdw", "openrail", "openrail++", "osl-3.0", "other", "postgresql", "unlicense"),
        *("wtfpl", "zlib", "creativeml-openrail-m"),
    ]
)
"""Licence ids that the Hub's metadata knows. `unknown` is one of them too, and no licence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """What a dataset goes out under.

    Attributes:
        id: The id in the card; "other" for terms without one, and for mixed sources.
        name: With "other": a name for the terms.
        by_subset: Subset → id, where sources are mixed.
        origin: Who said so: "source" or "publisher".
    """

    id: str
    name: str = ""
    by_subset: Mapping[str, str]
    origin: str

    @property
    def url(self) -> str:
        return URLS.get(self.id, "")

    @property
    def has_file(self) -> bool:
        """Whether a LICENSE file says what the id alone does not."""
        return self.id == "other"

    def metadata(self) -> dict[str, str]:
        """Return the card's keys."""
        if not self.has_file:
            return {"license": self.id}
        return {"license": "other", "license_name": self.name, "license_link": "LICENSE"}


def decide_licence(
    given: str | Mapping[str, str],
    source_card: Mapping[str, object],
    subsets: Sequence[str],
    *,
    text_free: bool,
) -> Licence:
    """Return the licence to publish under.

    Args:
        given: What the publisher said: an id, or subset → id.
        source_card: The metadata of the source's card.
        subsets: The subsets in the data.
        text_free: Whether none of the source's text goes out.

    Raises:
        SettingError: None is known, one is no id of the Hub's, or it forbids changed copies.
    """
    origin = "publisher" if given else "source"
    found = given or _of_card(source_card)
    if not found:
        raise SettingError(
            "expected a licence in the source's card, found none. Look it up at the source and give "
            "it (license='cc-by-4.0', or --license SUBSET=ID for each of mixed sources); where the "
            "text may not be redistributed, publish without it (text_free=True, --text-free)."
        )
    by_subset = {"": found} if isinstance(found, str) else dict(found)
    for id_ in by_subset.values():
        _check(id_, text_free=text_free)
    if isinstance(found, str):
        name = str(source_card.get("license_name") or "see-license")
        return Licence(id=found, name=name if found == "other" else "", by_subset={}, origin=origin)
    missing = [subset for subset in subsets if subset not in by_subset]
    if missing:
        raise SettingError(
            f"expected a licence for every subset, found none for {missing}. Give SUBSET=ID for each."
        )
    ids = set(by_subset.values())
    id_, name = (ids.pop(), "") if len(ids) == 1 else ("other", "mixed-by-subset")
    return Licence(id=id_, name=name, by_subset=by_subset, origin=origin)


def _of_card(card: Mapping[str, object]) -> str:
    found = card.get("license")
    ids = [str(id_) for id_ in found] if isinstance(found, list) else [str(found or "")]
    if len(ids) > 1:
        raise SettingError(
            f"expected one licence in the source's card, found {ids}. Say which one holds for which "
            "subset: license={'subset': 'id'}, or --license SUBSET=ID."
        )
    return "" if ids[0].lower() in ("unknown", "none") else ids[0].lower()


def _check(id_: str, *, text_free: bool) -> None:
    if id_ not in KNOWN:
        raise SettingError(
            f"expected a licence id of the Hub such as 'cc-by-sa-4.0', found {id_!r}. "
            "Terms without an id are 'other'."
        )
    if _NO_DERIVATIVES in f"{id_}-" and not text_free:
        raise SettingError(
            f"expected a licence that allows changed copies, found {id_!r}: a relabeled dataset is "
            "one. Publish without its text (text_free=True, --text-free)."
        )


def licence_text(licence: Licence, source: str) -> str:
    """Return the LICENSE file: which terms hold for what, and what was changed."""
    lines = ["Licence of this dataset", "", "Query and passage texts are the source's"]
    lines[-1] += f" ({source})" if source else ""
    lines[-1] += " and stay under the source's terms."
    if licence.by_subset:
        lines += ["", "Subset: licence"]
        lines += [f"- {s}: {i} {URLS.get(i, '')}".rstrip() for s, i in licence.by_subset.items()]
    else:
        lines += ["", f"The source names its terms {licence.name!r}; read them at the source."]
    lines += [
        "",
        "Changes: passages labeled as negatives were judged again; those found relevant were moved",
        "to the positives or taken out, as the README says. No text was changed.",
    ]
    return "\n".join(lines) + "\n"
