"""Prefect, and what runs on a machine for weeks: flows, their pages, servers, schedules, watching, collecting."""
