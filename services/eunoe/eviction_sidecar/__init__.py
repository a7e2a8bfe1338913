"""The eviction sidecar: which eviction policy a stream has, scores, shadow comparison and the audit log.

A process beside the model workers of a machine. Workers compute features and keep statistics as part of the memory
state; nothing of a stream is remembered here.
"""
