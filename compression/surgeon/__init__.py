"""LLM Surgeon: pruning by Kronecker-factored curvature (van der Ouderaa et al. 2023, arXiv 2312.17244).

The loss around a layer's weights is taken to be a bowl, tr(dW^T G dW A) / 2: A is the mean outer product of what goes
into the layer and G that of the gradients that come back to what goes out of it. What to remove is what costs least
in the bowl, over all layers at once, and what stays moves to where the bowl is lowest without it.

    run.py          from checkpoint to checkpoint, shot by shot
    settings.py     what the stage says to it
    curvature.py    A and G of a model's layers, block by block
    factors.py      what is dead in them, and their damped inverses
    costs.py        what an element, a row, a column or a group of columns costs
    threshold.py    which rows and columns of which layers go: one threshold for all
    updates.py      what is removed becomes zero, and what stays makes up for it
    correction.py   what is left learns a little between shots

    way.py          what may go, and the questions that each kind answers:
    elements.py     single weights, N:M
    lines.py        rows and columns of each linear
    coupled.py      hidden units and heads, in all layers that hold a part of them
    structures.py   where those are found
    allot.py        how many of them each block keeps
    widths.py       which widths transformers builds
    shrink.py       a checkpoint without them
    stream.py       dimensions of the residual stream, in all layers, embedding and head
    hidden.py       a checkpoint without those

Symbols: a layer's weight W [R, C]; with a bias, W' = [W | b] [R, C + 1], fed with [a ; 1]. c is C or C + 1. Costs are
predicted increases of the loss in nats a token.
"""
