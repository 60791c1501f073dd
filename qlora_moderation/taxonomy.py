"""Categories in their order, and the prompt template.

In: nothing, or a YAML file. Out: a `Taxonomy`, which every later step carries along and stores with the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qlora_moderation.errors import ConfigError
from qlora_moderation.strict_yaml import read_yaml

BEAVERTAILS_CATEGORIES = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)
"""The 14 categories of BeaverTails (Ji et al. 2023, arXiv:2307.04657) in the order of the data set's columns."""

RESERVED_NAMES = {"flagged", "micro", "macro"}
"""Names that stand beside the categories in metrics."""

DEFAULT_TEMPLATE = "BEGINNING OF CONVERSATION: USER: {question} ASSISTANT:{answer}"


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """What a classifier's outputs mean.

    Attributes:
        categories: C names; output c of the model is `categories[c]`.
        template: the text that is judged; holds `{question}` and then `{answer}`, each once.
        labels_from: `category` reads a row's `category` mapping; `is_safe` needs C = 1 and uses `is_safe` alone.
    """

    categories: tuple[str, ...] = BEAVERTAILS_CATEGORIES
    template: str = DEFAULT_TEMPLATE
    labels_from: Literal["category", "is_safe"] = "category"

    def __post_init__(self) -> None:
        faults = []
        names = [name for name in self.categories if isinstance(name, str) and name and _is_text(name)]
        if not names or len(names) < len(self.categories):
            faults.append("categories must be a list of non-empty names")
        elif len(set(self.categories)) != len(self.categories):
            repeated = sorted({name for name in self.categories if self.categories.count(name) > 1})
            faults.append(f"categories repeat {', '.join(repeated)}; each name may stand once")
        reserved = sorted(RESERVED_NAMES.intersection(names))
        if reserved:
            faults.append(f"categories hold {', '.join(reserved)}, which names a metric over all categories; rename it")
        question, answer = (self.template.find(slot) for slot in ("{question}", "{answer}"))
        counts = [self.template.count(slot) for slot in ("{question}", "{answer}")]
        if counts != [1, 1] or question > answer:
            faults.append("template must hold {question} and then {answer}, each exactly once")
        if not _is_text(self.template):
            faults.append("template holds a lone surrogate, which is no character")
        if self.labels_from not in ("category", "is_safe"):
            faults.append(f"labels_from is {self.labels_from!r}; allowed: category, is_safe")
        elif self.labels_from == "is_safe" and len(self.categories) != 1:
            faults.append("labels_from: is_safe needs exactly one category")
        if faults:
            raise ConfigError("taxonomy: " + "; ".join(faults))

    @property
    def template_parts(self) -> tuple[str, str, str]:
        """The literal text before the question, between question and answer, and after the answer."""
        before, rest = self.template.split("{question}")
        between, after = rest.split("{answer}")
        return before, between, after

    def render(self, question: str, answer: str) -> str:
        """Return the text that is judged, without begin and end tokens."""
        before, between, after = self.template_parts
        return f"{before}{question}{between}{answer}{after}"

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping that `from_dict` reads back and YAML or JSON can hold."""
        return {**dataclasses.asdict(self), "categories": list(self.categories)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "taxonomy") -> Taxonomy:
        """Build a taxonomy from a mapping.

        Raises:
            ConfigError: an unknown key, or values that `Taxonomy` refuses; the message starts with `source`.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}: must be a mapping with the key categories, found {type(values).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(map(str, values)) - known)
        if unknown:
            raise ConfigError(f"{source}: unknown key {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
        values = dict(values)
        if "categories" in values:
            if not isinstance(values["categories"], list | tuple):
                raise ConfigError(f"{source}: categories must be a list of names in their order")
            values["categories"] = tuple(values["categories"])
        if not isinstance(values.get("template", ""), str):
            raise ConfigError(f"{source}: template must be text")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def load_taxonomy(path: str | Path | None) -> Taxonomy:
    """Read a taxonomy from a YAML file; `None` gives BeaverTails' 14 categories.

    Raises:
        ConfigError: the file is missing, is not YAML, or describes no valid taxonomy.
    """
    if path is None:
        return Taxonomy()
    values = read_yaml(path, "--taxonomy")
    if not values:
        raise ConfigError(f"--taxonomy {path}: is empty; name the categories, or leave the option out for BeaverTails'")
    return Taxonomy.from_dict(values, source=str(path))
