"""The language model: a Llama-family decoder whose memory of a stream is bounded.

`Decoder` folds tokens into a `MemoryState` segment by segment and evicts with a policy at each segment boundary.
`checkpoint` reads weights, `state_codec` turns states into bytes, `tokenizer` and `log_tokenizer` bytes into tokens.
"""
