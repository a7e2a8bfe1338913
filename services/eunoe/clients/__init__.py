"""The only way one service calls another: typed calls with deadlines, whose failures are the error tree.

A client wraps a channel and owns nothing else; whoever opened the channel closes it. Calls that are idempotent as a
whole are repeated inside where the network failed; everything else is left to the caller, who knows more.
"""
