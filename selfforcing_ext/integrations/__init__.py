"""Our ops in models of other projects, one module per project.

Nothing is imported here: every module says what it needs, and takes the models it works on from its caller.
"""
