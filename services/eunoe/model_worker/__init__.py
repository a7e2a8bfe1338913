"""The model worker: one process that serves one model and owns the running memory of the streams it has leased.

An asyncio loop speaks gRPC and talks to the state store; one engine thread alone touches the decoder. The files, in the
order a document passes them: servicer (translates), worker (wires the parts), ownership (who may fold), stream (one
leased stream: reads the log, commits), fold (its memory state, on the engine thread), engine (whose turn it is),
checkpoints (states to the store and back), generation (answers and scores on copies).
"""
