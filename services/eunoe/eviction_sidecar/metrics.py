"""Prometheus metrics of an eviction sidecar, beside those of its RPCs."""

from prometheus_client import Counter, Histogram

SCORING_SECONDS = Histogram(
    "eunoe_sidecar_scoring_seconds",
    "One scoring call, without the wait for its turn",
    ["policy"],
    buckets=(0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
)
RELOADS = Counter("eunoe_sidecar_reloads", "Times that the policies or rules were loaded anew")
COMPARED_SLOTS = Counter("eunoe_sidecar_compared_slots", "Slots kept while another policy ran", ["policy", "shadow"])
AGREED_SLOTS = Counter("eunoe_sidecar_agreed_slots", "Those that the other one kept too", ["policy", "shadow"])
SKIPPED_COMPARISONS = Counter("eunoe_sidecar_skipped_comparisons", "Comparisons not made because scoring came first")
