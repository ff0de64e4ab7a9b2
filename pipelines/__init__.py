"""The hallway: raw archive to report, one file per hop; the command line walks through it."""
