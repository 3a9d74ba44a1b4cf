"""The loss around a model: slopes and curvatures along directions, the Hessian's spectrum, planes through
checkpoints, the line from last through a merge; and where a mixture of experts sends its tokens. Models and
text are given; `looking` alone opens checkpoints, and puts the parts together.
"""
