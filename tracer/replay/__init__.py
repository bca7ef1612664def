"""Teacher-forced passes of recorded ids through a white-box copy of the served weights."""
