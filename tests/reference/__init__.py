"""Naive twins: slow, obvious, in float64. What is fast in compression/ has to agree with them."""
