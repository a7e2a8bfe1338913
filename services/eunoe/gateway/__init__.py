"""The gateway: the public API in front of the state store and the model workers.

It authenticates, checks, and passes on; it owns nothing durable, so that any number of gateways may run side by side
and any of them may die. Appends go to the state store alone and are durable without a worker. Everything that needs a
memory goes to the worker that owns the stream (`placement`).
"""
