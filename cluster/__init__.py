"""Machines: starting Ray, submitting jobs, writing schedules. No model is known here."""
