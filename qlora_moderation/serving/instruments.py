"""What the server counts, for Prometheus.

In: requests, batches, verdicts. Out: the text of `/metrics`. Labels come from fixed lists alone, so that no text of a client
becomes one and their number stays bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from qlora_moderation.thresholds import Judgement

PREFIX = "qlora_moderation_"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_SHARES = tuple(round(0.05 * step, 2) for step in range(1, 21))


class Instruments:
    """All figures of one server, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(PREFIX + name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests answered.", "route", "status")
        self.seconds = histogram("request_seconds", "From the first byte to the answer.", _SECONDS, "route")
        self.refused = counter("refused", "Requests refused, by the code in the answer.", "code")
        self.disconnects = counter("disconnects", "Clients that went before their answer.")
        self.queue_pairs = gauge("queue_pairs", "Pairs accepted and not answered.")
        self.queue_tokens = gauge("queue_tokens", "Tokens accepted and not scored.")
        self.queue_seconds = histogram("queue_seconds", "From tokenised to handed to the model.", _SECONDS)
        self.pairs = counter("pairs", "Pairs judged, by what was known beside the answer.", "context")
        self.cut_pairs = counter("long_pairs", "Pairs longer than a window.", "how")
        self.tokens = counter("tokens", "Tokens scored.")
        self.batch_windows = histogram("batch_windows", "Texts and windows of one forward.", _COUNTS)
        self.batch_tokens = histogram("batch_tokens", "Tokens of one forward.", _TOKENS)
        self.batch_seconds = histogram("batch_seconds", "Time of one forward.", _SECONDS)
        self.batch_failures = counter("batch_failures", "Forwards that failed.", "reason")
        self.flagged = counter("flagged", "Pairs flagged; divided by pairs, the flag rate.")
        self.risk = histogram("risk", "What flagged is decided by.", _SHARES)
        self.scores = histogram("category_score", "Calibrated probability of each category.", _SHARES, "category")
        self.decided = counter("category_flagged", "Pairs above the threshold of a category.", "category")
        self.thresholds = gauge("thresholds_info", "The thresholds in use.", "version", "rule")
        self.reloads = counter("thresholds_reloads", "Changed thresholds.json read, by outcome.", "outcome")
        self.intact = gauge("thresholds_file_ok", "1: the file in use is the one on disk; 0: that one is broken.")
        self.ready = gauge("ready", "1: /readyz says yes.")
        self.intact.set(1)

    def watch(self, pairs: Callable[[], float], tokens: Callable[[], float], ready: Callable[[], float]) -> None:
        """Read the depth of the queue, and whether the server is ready, when they are asked for."""
        self.queue_pairs.set_function(pairs)
        self.queue_tokens.set_function(tokens)
        self.ready.set_function(ready)

    def count_verdicts(self, names: Sequence[str], judgement: Judgement, contexts: Sequence[str]) -> None:
        """Count what was said of N pairs."""
        for context in contexts:
            self.pairs.labels(context).inc()
        self.flagged.inc(int(judgement.flagged.sum()))
        for value in judgement.risk.tolist():
            self.risk.observe(value)
        decided = judgement.categories.sum(axis=0)
        for c, name in enumerate(names):
            scores = self.scores.labels(name)
            for value in judgement.probabilities[:, c].tolist():
                scores.observe(value)
            if decided[c]:
                self.decided.labels(name).inc(int(decided[c]))

    def count_long(self, windows: np.ndarray, truncated: np.ndarray) -> None:
        """Count the pairs that did not fit one window."""
        self.cut_pairs.labels("windows").inc(int((windows > 1).sum()))
        self.cut_pairs.labels("truncated").inc(int(truncated.sum()))

    def render(self) -> bytes:
        """Return everything in Prometheus' text form."""
        return generate_latest(self.registry)
