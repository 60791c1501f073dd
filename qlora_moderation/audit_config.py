"""The options of `audit`.

In: YAML and flags through `options`. Out: a frozen dataclass. Step 1 of the straight line.
"""

from __future__ import annotations

import dataclasses

from qlora_moderation.options import option


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """What `qlora-moderation audit` reads."""

    train_data_name_or_path: str = option(
        help="rows to describe: `hub/name:split[@revision]` or a file; several joined with +"
    )
    eval_data_name_or_path: str | None = option(None, "rows that judge, looked for among the others")
    model_name_or_path: str | None = option(
        None, "a model or backbone, directory or hub name, whose tokenizer counts the tokens; default: characters only"
    )
    model_revision: str | None = option(None, "revision of a model from the hub")
    max_length: int | None = option(
        None, "tokens beyond which a text counts as long; default the model's, or 512", minimum=16
    )
    taxonomy: str | None = option(
        None, "YAML file with categories and template; default the model's, or BeaverTails' 14"
    )
    show_bad_rows: int = option(5, "broken rows that are printed with place and reason; audit.json has all", minimum=0)
    output_dir: str | None = option(None, "where audit.json goes; default: nothing is written")

    def find_faults(self) -> list[str]:
        """Return contradictions between options."""
        if self.max_length is not None and self.model_name_or_path is None:
            return ["--max_length counts tokens, which needs --model_name_or_path"]
        if self.model_revision is not None and self.model_name_or_path is None:
            return ["--model_revision needs --model_name_or_path"]
        return []
