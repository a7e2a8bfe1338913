"""The `eunoe` command: one module a group of commands, which import what is heavy only when they run."""
