"""One file a verb: parse, call one function that a test can call too, say what now exists."""
