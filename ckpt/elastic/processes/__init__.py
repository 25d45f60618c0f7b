"""Supervisor and trainer: how processes start, are watched and end."""
