"""Ray Serve wiring, nothing else: what a deployment is, not what it does."""
