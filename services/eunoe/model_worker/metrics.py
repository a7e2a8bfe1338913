"""Prometheus metrics of a model worker."""

from prometheus_client import Counter, Gauge, Histogram

FOLDED_TOKENS = Counter("eunoe_worker_folded_tokens", "Tokens folded from logs into memory states")
GENERATED_TOKENS = Counter("eunoe_worker_generated_tokens", "Tokens decoded for answers")
SEGMENT_SECONDS = Histogram(
    "eunoe_worker_segment_seconds", "One segment's pass", buckets=(0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 5.0)
)
DECODE_BATCH = Histogram("eunoe_worker_decode_batch", "Streams in one decode step", buckets=(1, 2, 4, 8, 16))
COMMIT_SECONDS = Histogram(
    "eunoe_worker_commit_seconds", "From encoding a checkpoint to its commit", buckets=(0.05, 0.1, 0.2, 0.4, 1, 3, 10)
)
COMMITS = Counter("eunoe_worker_commits", "Checkpoints committed, or why not", ["outcome"])
QUARANTINES = Counter("eunoe_worker_quarantines", "Damaged checkpoints that were passed over for an older one")
OWNED_STREAMS = Gauge("eunoe_worker_owned_streams", "Streams that this worker holds the lease of")
RESIDENT_BYTES = Gauge("eunoe_worker_resident_bytes", "Bytes of memory states, derived copies and decoding copies")
FALLBACKS = Counter("eunoe_worker_eviction_fallbacks", "Evictions decided without the policy in charge", ["reason"])
UNANSWERED_CHOICES = Counter(
    "eunoe_worker_unanswered_choices",
    "Segments whose policy stayed because the sidecar chose none",
    ["reason"],
)
UNRECORDED_EVICTIONS = Counter("eunoe_worker_unrecorded_evictions", "Evictions that the audit log will not have")
LOST_COMPARISONS = Counter("eunoe_worker_lost_comparisons", "Comparisons with a shadow policy that failed")
SCORING_SECONDS = Histogram(
    "eunoe_worker_scoring_seconds",
    "From writing features to having the sidecar's scores",
    buckets=(0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
)
DROPPED_STREAMS = Counter("eunoe_worker_dropped_streams", "Streams let go", ["reason"])
