"""Requests: frozen descriptions of one call, checked once, when made."""
