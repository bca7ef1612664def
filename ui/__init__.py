"""The app: reads the store through tracer's public names and imports no torch."""
