"""`plan`: what a config takes on devices that are not there, and how fast it could be."""
