"""The state store: the one owner of the durable protocol, and the only process that talks to Redis.

Every decision is a pure function in `log_rules`, `lease_rules`, `checkpoint_rules` or `stream_rules`: a stream's record
(`metadata`) and an event in, a new record and effects out; clock, ids and randomness are arguments. `transactions`
reads records, asks the rules, and swaps the records for the new ones in one atomic step of a `storage` driver; where
somebody else was faster, it does all of that again. So no lock is ever held, and a crash leaves either all of a
decision or nothing.

What makes repeating harmless: a swap carries a token that becomes the version of what it writes; an append compares
bytes, a commit compares manifests, a creation its request id, an acquisition its worker.
"""
