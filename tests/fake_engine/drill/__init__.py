"""Drills: the daemon dies, stops, is slow or is restarted at a chosen callback of the engine."""
