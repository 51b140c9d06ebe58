"""A model behind an OpenAI-compatible server: the backend, its connection, and the walk through the alternatives."""

from vqr1_metric.backends.http.backend import HttpBackend, RequestFailed, RequestRefused, ServerError

__all__ = ["HttpBackend", "RequestFailed", "RequestRefused", "ServerError"]
