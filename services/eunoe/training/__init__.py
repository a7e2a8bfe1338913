"""Offline jobs: tasks that measure a memory, and the training of what they measure."""
