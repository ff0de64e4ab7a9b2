"""Reading raw archives: walking tars, looking at members, spooling compressed streams."""
