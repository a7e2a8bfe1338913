"""The protos between Eunoe's own processes, compiled from protos/eunoe/internal at install."""
