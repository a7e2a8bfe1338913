"""Tasks with known answers, made from real text and code."""
