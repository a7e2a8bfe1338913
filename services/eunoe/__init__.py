"""Eunoe: language models over streams that never end, with a memory that is bounded, durable, portable, forkable."""
