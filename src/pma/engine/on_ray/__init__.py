"""One output by the nodes of a Ray cluster.

The process that was started drives: it holds the lease, has every node look at the sources and the place of
the output (`checking`), gives parts of the blocks (`sharing`) to nodes that have room (`roster`), and
commits (`writing`). A part is carried out by `together.part` in a task (`task`); what is done is told by
journals alone, so any task may die at any moment.
"""
