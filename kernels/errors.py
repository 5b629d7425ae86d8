"""The errors a user can meet. Each names the value that was wrong and the remedy."""


class VedaError(Exception):
    """Base of every error this project raises on purpose."""


class LayoutError(VedaError, ValueError):
    """A token layout that cannot be: zero-length segments, or lengths that do not add up."""


class PlanError(VedaError, ValueError):
    """A plan that does not fit: head counts, tile shapes, densities or score parameters."""


class ExecutorError(VedaError, ValueError):
    """A named executor cannot run this call; nothing else is tried in its place."""
