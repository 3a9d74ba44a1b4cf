"""The loss around a model: slopes and curvatures along directions, the Hessian's spectrum, planes through
checkpoints; and where a mixture of experts sends its tokens. No files, no clock: models and text are given.
"""
