"""The public protos, compiled from protos/eunoe/api at install."""
