"""What can be told of params.yaml without computing: a rule is a function, and says what is wrong.

Its arguments' types say which sections it needs; `layers` comes last, the shape [out, in] of each linear by name, empty
if no model has been downloaded yet.
"""
