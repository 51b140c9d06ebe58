"""A model behind an OpenAI-compatible server: the backend, its connection, and the walk through the alternatives."""

from vqr1_metric.backends.http.backend import HttpBackend, RequestRefused, ServerError

__all__ = ["HttpBackend", "RequestRefused", "ServerError"]
