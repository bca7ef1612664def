"""What was recorded: events, traces, segments, steps and their graph. Imports no torch and nothing of the rest."""
