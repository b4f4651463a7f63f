"""`wheels bench`: how fast and how good, beside what people would use instead."""
