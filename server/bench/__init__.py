"""`wheels bench`: speed and quality compared with the alternatives."""
