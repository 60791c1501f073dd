"""Every knob of the server.

In: flags and YAML. Out: a checked `ServeConfig`. Before step 13 of the straight line.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from pathlib import Path
from typing import Literal

from qlora_moderation.options import option
from qlora_moderation.sources import find_kind


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What `qlora-moderation serve` reads."""

    model_path: str = option(help="full model, adapter or merged directory")
    served_model_name: str | None = option(None, "name in answers; default: that of the directory, or of its run")
    host: str = option("127.0.0.1", "address to listen on; another than this machine's own needs keys")
    port: int = option(8000, "port to listen on; 0: a free one, which the log names", minimum=0, maximum=65535)
    api_key_file: str | None = option(
        None, "file with one bearer key a line; MODERATION_API_KEY in the environment adds keys"
    )
    allow_unauthenticated: bool = option(False, "serve other machines without keys")
    metrics_need_key: bool = option(True, "whether /metrics asks for a key where there are keys")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute type; auto: bfloat16 on CUDA, float32 on CPU"
    )
    max_length: int | None = option(None, "longest window in tokens; default the model's", minimum=16)
    long_text: Literal["window", "truncate"] | None = option(None, "texts beyond max_length; default the model's")
    max_tokens_per_micro_batch: int | None = option(
        None, "token budget of one forward, shared by all clients; default 16384 on CUDA, 512 on CPU", minimum=1
    )
    max_windows_per_micro_batch: int = option(512, "most texts and windows of one forward", minimum=1)
    forwards_at_once: int | None = option(
        None,
        "forwards that run side by side; default: 1 on CUDA, on a CPU one a core unless the model is large",
        minimum=1,
    )
    batch_wait_ms: float = option(
        2.0, "longest wait for requests that have arrived but are not tokenised yet", minimum=0, maximum=1000
    )
    max_queue_pairs: int = option(1024, "pairs accepted and not answered, beyond which 429 is the answer", minimum=1)
    max_queue_tokens: int | None = option(
        None,
        "tokens accepted and not scored, beyond which 429 is the answer; default 32 forwards, at least 32768",
        minimum=1,
    )
    max_body_bytes: int = option(1048576, "longest body of a request", minimum=1024)
    max_text_length: int = option(40000, "longest question or answer in characters", minimum=1)
    max_texts: int = option(64, "most inputs of one request", minimum=1)
    request_timeout: float = option(60.0, "seconds to read a request, and again to answer it", above=0)
    drain_seconds: float = option(
        0.0, "after SIGTERM, go on taking requests for so long while /readyz says no", minimum=0
    )
    shutdown_timeout: float = option(30.0, "then finish what was accepted, for at most so many seconds", minimum=0)
    reload_seconds: float = option(2.0, "how often thresholds.json is looked at; 0: at SIGHUP alone", minimum=0)
    log_requests: bool = option(True, "a log line for each request: route, status, time; never a text")
    log_level: Literal["debug", "info", "warning"] = option("info", "what the log holds")
    use_cpu: bool = option(False, "stay on the CPU even when CUDA is there")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def model_name(self) -> str:
        """The name in answers; a path never is one."""
        path = Path(self.model_path).resolve()
        generic = path.name in ("merged", "adapter", "model")
        return self.served_model_name or (path.parent.name if generic else path.name) or "moderation"

    def find_faults(self) -> list[str]:
        """Return contradictions between options."""
        faults = []
        if find_kind(Path(self.model_path)) != "directory":
            faults.append(f"--model_path {self.model_path}: no such directory; give an adapter, full or merged model")
        if self.max_texts > self.max_queue_pairs:
            faults.append(
                f"--max_texts {self.max_texts}: a full request would never fit --max_queue_pairs {self.max_queue_pairs}; "
                "lower the one or raise the other"
            )
        return faults
