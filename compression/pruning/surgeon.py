"""LLM Surgeon (van der Ouderaa et al. 2023, arXiv 2312.17244): by the loss's curvature.

It looks at the whole model, shot by shot, so that it has no `prune` for a layer: see compression/surgeon.
"""

STATISTIC = None
SCOPES = ("layer",)
