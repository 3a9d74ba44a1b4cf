"""One output by several processes.

The one that holds the lease drives: it prepares (`attempt`, in which `Driver.meet` is called before anything
is changed), shares out the blocks (`plan.partition`), and at the end commits (`commit`). Every other process
carries out parts (`carry_out`) with a plan of its own making, into the same folder, with a journal of its own
there. `write` is all of this for processes that a launcher started together.
"""
