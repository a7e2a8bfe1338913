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
DROPPED_STREAMS = Counter("eunoe_worker_dropped_streams", "Streams let go", ["reason"])
